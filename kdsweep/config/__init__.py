"""The meaning of a configuration: allowed values, the cell that it describes, the fingerprint of that."""
