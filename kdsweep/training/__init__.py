"""From a configuration to a trained network: building, the loop over a group, Teachers trained once."""
