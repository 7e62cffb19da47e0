"""The figures of a sweep: what each draws, one look for all of them, the command that writes them."""
