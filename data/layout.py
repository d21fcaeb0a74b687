"""What the model knows of tokens, as `data` sees it: it arrives from outside, since data imports no model.

media sizes --num_audio_tokens, grids--> lengths, for the plan
segments of a document, ids of its text --lay_out--> token ids with placeholders, position ids, for the reader
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from data.vision import Grid, Patching

WRAP = 2  # tokens around the placeholders of an audio, an image or a video; as many again around a video's sound
Segment = Any  # the model's own; made and read by the layout alone


class Layout(Protocol):
    """Tokens and positions of documents. train.layout has the released model's."""

    @property
    def patching(self) -> Patching | None:
        """How frames are cut; None for a model without a vision encoder."""
        ...

    @property
    def audio_window(self) -> int:
        """Log-mel frames that the audio encoder sees together: long audio may be cut at multiples of it."""
        ...

    def num_audio_tokens(self, frames: np.ndarray) -> np.ndarray:
        """Placeholders of clips of so many log-mel frames, int64, elementwise; an int gives an int."""
        ...

    def text(self, num_tokens: int) -> Segment:
        """A stretch of text."""
        ...

    def audio(self, frames: int) -> Segment:
        """A clip of so many log-mel frames."""
        ...

    def image(self, grid: Grid) -> Segment:
        """A picture of so many patches."""
        ...

    def video(self, grid: Grid, times: Sequence[float], frames: int | None) -> Segment:
        """A film: seconds of each temporal patch; log-mel frames of its sound, None where that is not heard."""
        ...

    def num_tokens(self, segment: Segment) -> int:
        """Tokens of a segment, those that wrap it included."""
        ...

    def speech(self, ids_T: Tensor, position_ids_3T: Tensor, speaker: str, codes_GF: Tensor) -> Any:
        """How the last answer of a conversation is spoken, from its codes int64 [G, F]: a data.types.Speech.

        Raises BadSample for a speaker or codes that the model does not have.
        """
        ...

    def join_speech(self, parts: Sequence[Any]) -> Any:
        """The speech of documents end to end."""
        ...

    def lay_out(self, segments: Sequence[Segment], text_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One document: token ids int64 [T] and position ids float32 [3, T]; `text_ids` fill the text, in order."""
        ...
