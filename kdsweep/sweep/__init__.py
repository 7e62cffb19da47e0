"""A whole sweep: what will run, what is told before it starts, how far it is."""
