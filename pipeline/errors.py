"""Errors that are the user's to mend."""


class UserError(Exception):
    """Something the user gave does not work. The message is one line: which key, what is wrong, what is allowed.

    The command line prints it without a traceback and exits with code 2.
    """


class DamagedError(UserError):
    """A file of finished work is not what was written.

    Args:
        work: URI of the directory that can be made again.
        file: the file's path below it.
    """

    def __init__(self, work: str, file: str) -> None:
        super().__init__(work, file)
        self.work, self.file = work, file

    def __str__(self) -> str:
        return f"{self.what}; delete {self.work} and run the same command again"

    @property
    def what(self) -> str:
        """The damage without what to do about it."""
        return f"{self.work}/{self.file} is missing, cut off or altered"
