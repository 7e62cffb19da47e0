"""The folder of a run: its record, its lock and its checkpoint, and the file of each sweep."""
