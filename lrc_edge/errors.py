"""The one exception that the command line prints as a line instead of a traceback."""


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: where, what was found, what was needed, what to do."""
