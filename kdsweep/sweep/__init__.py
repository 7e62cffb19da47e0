"""A whole sweep: its plan, its preview, the engines that run it, and its progress."""
