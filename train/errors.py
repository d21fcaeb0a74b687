"""What a user can get wrong in training, one class per kind: each message is one line that says what to do."""


class RecipeError(ValueError):
    """A recipe or an override that cannot be run: names the setting."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found, trusted or used: names the file or the key."""


class EngineError(ValueError):
    """An engine that cannot run what the recipe asks: names the setting."""
