"""The folder of a run: its record, its lock and its checkpoint, and the cells that each sweep asked for."""
