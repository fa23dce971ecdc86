"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A user's mistake: one line saying what, where (file, line, field), and how to mend it.

    The command line prints the line and exits with code 2; a traceback always means a bug of ours.
    """
