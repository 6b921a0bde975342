"""The one exception that the command lines show as a single line."""


class UserError(ValueError):
    """A mistake that its reader can mend: the message names the key or file, the value and the fix, in one line."""
