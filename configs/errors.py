"""The one error that means: the user can fix this."""


class UserError(Exception):
    """A mistake in input or set-up. The message names the field, the value and the remedy; the CLI exits 2 with it."""
