"""A sweep: its plan, its preview, the executors that run it, and its progress."""
