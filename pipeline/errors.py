"""Errors that are the user's to mend."""


class UserError(Exception):
    """Something the user gave does not work. The message is one line: which key, what is wrong, what is allowed.

    The command line prints it without a traceback and exits with code 2.
    """
