"""Errors that are told in one line."""


class InputError(Exception):
    """Something in the command, the configuration or the data is wrong; the user can mend it.

    The message is one line that names the file or key, the value and the remedy; the program prints it without a
    traceback and exits with code 1.
    """


class CellError(Exception):
    """A cell failed, in one line; the traceback is in the cell's log."""
