"""The error for what a user can put right: the command prints its message as one line, without a traceback."""


class InputError(ValueError):
    """A file, folder or option that can't be used; the message names it and says why."""
