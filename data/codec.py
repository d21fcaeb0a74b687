"""What a speech codec is to the rest: waveforms to codes, and back.

    waveform [S] --encode--> codes [G, T] --decode--> waveform [S']

The Talker learns codes and the waveform decoder turns them back, so both are bound to the codec whose codes they
saw: `identity` goes with every stored code and is compared before any use.

Letters: S samples, G codebooks, T frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from data.errors import DataError


class Codec(Protocol):
    """A codec of one utterance at a time. Codes of joined utterances are not their codes joined."""

    @property
    def sample_rate(self) -> int:
        """Samples in a second: 24,000 wherever Qwen3-Omni's Talker is involved."""
        ...

    @property
    def frame_rate(self) -> float:
        """Frames of codes in a second, 12.5 there."""
        ...

    @property
    def num_codebooks(self) -> int:
        """Codes of a frame, G. The first is the Talker's, the rest refine it."""
        ...

    @property
    def codebook_size(self) -> int:
        """Codes lie in 0 .. codebook_size - 1."""
        ...

    @property
    def identity(self) -> str:
        """Says which codec made the codes: equal for equal weights and codebooks, different otherwise."""
        ...

    def encode(self, waveform_S: Tensor) -> Tensor:
        """Mono float32 [S] at `sample_rate` -> codes int64 [G, T], T = S / samples of a frame, rounded up.

        Raises BadSample for a waveform that no codes can be made of.
        """
        ...

    def decode(self, codes_GT: Tensor) -> Tensor:
        """Codes int64 [G, T] -> waveform float32 [S]. Raises BadSample for codes outside the codebooks."""
        ...


def open_codec(folder: str | Path, levels: int | None = None, device: str = "cpu") -> Codec:
    """The codec in a local folder: Mimi (config.json) or one of `python -m data.fit_codec` (codec.json).

    `levels`: decode the first so many codebooks only, which the fitted codec can. `device` is Mimi's; the fitted one
    runs on the CPU. Raises DataError, saying what is expected, for a folder that holds neither, and as the codecs do
    for one that is damaged.
    """
    folder = Path(folder)
    if (folder / "codec.json").is_file():
        from data.kmeans_codec import KMeansCodec  # only now: who decodes with one codec need not load both

        return KMeansCodec(folder, levels)
    if (folder / "config.json").is_file():
        from data.mimi import Mimi

        codec = Mimi(folder, device)
        if levels not in (None, codec.num_codebooks):
            raise DataError(f"levels={levels}: Mimi in {folder} decodes all {codec.num_codebooks} codebooks or none")
        return codec
    raise DataError(
        f"{folder} holds no codec: expected codec.json, as python -m data.fit_codec writes it, or Mimi's config.json"
    )
