"""The one error a user can cause."""


class InputError(ValueError):
    """Something the caller can mend: one sentence naming the file, field or shape, what was expected and what came."""
