"""Errors that a user of the data layer can cause and cure: one line each, naming the file, key or setting."""


class DataError(ValueError):
    """Data or a data setting is unusable; the message is one line that says what to do."""


class BadSample(DataError):
    """One sample cannot be used (undecodable, empty, too large, damaged): leave it out, count it, go on.

    `reason` is one short line without the sample's name; whoever knows shard and key puts them in front.
    """

    def __init__(self, reason: str) -> None:
        """Keep the reason, as one line of at most 300 characters, as `reason` and as the message."""
        line = " ".join(reason.split())
        self.reason = line if len(line) <= 300 else f"{line[:297]}..."
        super().__init__(self.reason)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        """Travel between processes whole."""
        return type(self), (self.reason,)
