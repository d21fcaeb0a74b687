"""Settings of runs that train an audio encoder with a text decoder, `loss.transcribe` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from train.errors import RecipeError


@dataclass(frozen=True)
class TranscribeConfig:
    """How an audio encoder learns with `model.audio_decoder`."""

    windows: tuple[int, ...] = (1, 8)
    """Seconds of the encoder's attention windows: each clip's are drawn from the first to the second, anew in every
    epoch (Qwen3-Omni report, section 2.2). [8, 8] draws nothing. Evaluation and other recipes take
    model.audio.n_window_infer."""

    def __post_init__(self) -> None:
        """Reject what is no range."""
        if len(self.windows) != 2 or not 1 <= self.windows[0] <= self.windows[1]:
            raise RecipeError(
                f"loss.transcribe.windows={list(self.windows)}: it is two numbers of whole seconds, the least and the "
                "most, such as [1,8]"
            )

    @property
    def seconds(self) -> tuple[int, int]:
        """Least and most."""
        least, most = self.windows
        return least, most
