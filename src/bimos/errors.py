"""The one error that a user is meant to read."""


class BimosError(Exception):
    """Something the user can mend. The message is one line: it names the thing and the mend.

    The command line prints it without a traceback and exits with code 2.
    """
