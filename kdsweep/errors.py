"""The one error that the user can mend."""


class InputError(Exception):
    """Something in the command, the configuration or the data is wrong.

    The message is one line that names the file or key, the value and the remedy; the program prints it without a
    traceback and exits with code 1.
    """
