"""What samples cost, from their index alone: lengths in tokens, and work for the decoder and for each encoder.

    index columns --ShardIndex.costs--> Costs --Sizing.sizes--> Sizes of media --> tokens of samples, work of samples

Nothing is decoded. The lengths are exact: a sample whose tokens differ once it is read is left out and counted.
Cost: about 0.3 us a sample, all of it numpy over whole windows.

N samples, M media of all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np

from data.audio import MIN_SAMPLES
from data.layout import Layout
from data.mel import HOP
from data.video import Sampling, frame_counts, frame_sides
from data.vision import ImageLimits, image_sides

AUDIO, IMAGE, VIDEO, FILM = range(4)  # kinds of media in an index; a FILM is a video whose sound is heard
KINDS = ("audio", "image", "video", "film")


@dataclass(frozen=True)
class Costs:
    """What the index says of N samples and their M media, in order."""

    text_tokens_N: np.ndarray  # int64: all tokens but placeholders
    document_N: np.ndarray  # bool: a document, not a conversation
    owner_M: np.ndarray  # int64: which of the N samples a medium belongs to, rising
    kind_M: np.ndarray  # uint8: AUDIO, IMAGE, VIDEO or FILM
    samples_M: np.ndarray  # int64: of audio and of sound, at 16 kHz
    height_M: np.ndarray  # int64: pixels of an image or video, upright
    width_M: np.ndarray  # int64
    frames_M: np.ndarray  # int64: frames that a video has
    seconds_M: np.ndarray  # float64: that a video lasts
    text_before_M: np.ndarray  # int64: text tokens between the medium before and this one
    speech_N: np.ndarray | None = None  # int64: codec frames of the answer's speech, where codes are read; 0 for none

    @staticmethod
    def join(parts: Sequence[Costs]) -> Costs:
        """The samples of `parts`, end to end."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0, *(len(part.text_tokens_N) for part in parts)])
        columns = {
            column.name: np.concatenate([getattr(part, column.name) for part in parts])
            for column in fields(Costs)
            if column.name != "owner_M" and getattr(parts[0], column.name) is not None
        }
        owner_M = np.concatenate([part.owner_M + start for part, start in zip(parts, starts, strict=False)])
        return Costs(owner_M=owner_M, **columns)

    def sum_media(self, values_M: np.ndarray) -> np.ndarray:
        """float64 [N]: sum over each sample's media of values [M]."""
        return np.bincount(self.owner_M, values_M, len(self.text_tokens_N))

    @cached_property
    def fixed_speed_N(self) -> np.ndarray:
        """bool: samples that must be heard as they are.

        A film's sound would fall out of step, and a clip so short would fall below one analysis window.
        """
        fixed_M = (self.kind_M == FILM) | ((self.kind_M == AUDIO) & (self.samples_M < 2 * MIN_SAMPLES))
        return np.bincount(self.owner_M[fixed_M], minlength=len(self.text_tokens_N)) > 0


@dataclass(frozen=True)
class Sizes:
    """What M media become."""

    frames_M: np.ndarray  # int64: log-mel frames
    heard_M: np.ndarray  # int64: placeholders of audio or of a film's sound
    grid_M3: np.ndarray  # int64: frames, rows and columns of patches; 0 where nothing is seen
    seen_M: np.ndarray  # int64: placeholders of an image or of a video's pictures

    @property
    def tokens_M(self) -> np.ndarray:
        """int64: placeholders."""
        return self.heard_M + self.seen_M


@dataclass(frozen=True)
class Sizing:
    """How media become tokens: the model's layout, and the recipe's sizes of images and videos."""

    layout: Layout
    image: ImageLimits = field(default_factory=ImageLimits)
    video: Sampling = field(default_factory=Sampling)

    def sizes(self, costs: Costs, speeds_N: np.ndarray | float = 1.0) -> Sizes:
        """Sizes of media whose samples are heard at their speeds, a factor for each or one for all."""
        speed_M = speeds_N[costs.owner_M] if isinstance(speeds_N, np.ndarray) else speeds_N
        samples_M = costs.samples_M if isinstance(speed_M, float) and speed_M == 1 else costs.samples_M / speed_M
        frames_M = np.rint(samples_M).astype(np.int64) // HOP
        heard_M = np.asarray(self.layout.num_audio_tokens(frames_M), np.int64)
        grid_M3 = self._grids(costs)
        patching = self.layout.patching
        seen_M = grid_M3.prod(axis=1) // patching.merge_size**2 if patching else np.zeros(len(grid_M3), np.int64)
        return Sizes(frames_M, heard_M, grid_M3, seen_M)

    def tokens(self, costs: Costs, sizes: Sizes) -> np.ndarray:
        """int64 [N]: tokens of samples, and frames of speech."""
        tokens_N = costs.text_tokens_N + costs.sum_media(sizes.tokens_M).astype(np.int64)
        return tokens_N if costs.speech_N is None else tokens_N + costs.speech_N

    def _grids(self, costs: Costs) -> np.ndarray:
        """int64 [M, 3]: patches of images and videos; a kind that the model cannot take counts nothing."""
        grid_M3 = np.zeros((len(costs.kind_M), 3), np.int64)
        patching = self.layout.patching
        if patching is None:
            return grid_M3
        image = np.flatnonzero(costs.kind_M == IMAGE)
        if len(image):
            rows, columns = image_sides(costs.height_M[image], costs.width_M[image], self.image, patching)
            grid_M3[image] = np.stack([np.ones_like(rows), rows, columns], axis=1)
        video = np.flatnonzero(costs.kind_M >= VIDEO)
        if len(video):
            temporal = patching.temporal_patch_size
            counts = frame_counts(costs.seconds_M[video], costs.frames_M[video], self.video, temporal)
            rows, columns = frame_sides(costs.height_M[video], costs.width_M[video], counts, self.video, patching)
            grid_M3[video] = np.stack([-(-counts // temporal), rows, columns], axis=1)
        grid_M3[:, 1:] //= patching.patch_size
        return grid_M3


@dataclass(frozen=True)
class Work:
    """What a sample costs, in units of one decoder token.

    The defaults are the FLOPs of Qwen3-Omni-30B-A3B: 3.04 G active weights, 48 layers of 32 heads of 128, an audio
    encoder of 0.64 G weights at 13 tokens for 100 frames, a vision encoder of 0.44 G weights whose 27 layers attend
    within a frame. Only ratios matter, and those move little.
    """

    per_token: float = 1.0
    per_token_squared: float = 6.5e-5
    per_frame: float = 0.027
    per_patch: float = 0.146
    per_patch_squared: float = 2.05e-5  # of the patches of one frame

    def decoder(self, tokens: np.ndarray) -> np.ndarray:
        """float64: of sequences of so many tokens."""
        return self.per_token * tokens + self.per_token_squared * np.square(tokens, dtype=np.float64)

    def audio(self, frames: np.ndarray) -> np.ndarray:
        """float64: of clips of so many log-mel frames."""
        return self.per_frame * frames

    def vision(self, grid_M3: np.ndarray) -> np.ndarray:
        """float64: of images and videos."""
        patches_M = grid_M3[:, 1] * grid_M3[:, 2]
        return grid_M3[:, 0] * (self.per_patch * patches_M + self.per_patch_squared * np.square(patches_M, dtype=float))
