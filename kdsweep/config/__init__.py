"""What a configuration means: which values are allowed, which cell it is, what its fingerprint is made of."""
