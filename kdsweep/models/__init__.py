"""The U-Nets of Teacher and Student, and their weights."""
