"""Settings of the data, as they stand under `data:` in a recipe."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from data.audio import Limits
from data.augment import Augment
from data.document import MediaLimits
from data.errors import DataError
from data.mixture import Mixture
from data.store import StoreSettings
from data.video import Sampling, VideoLimits
from data.vision import ImageLimits

MISSING = "???"  # omegaconf's mark of a value that the recipe must give


@dataclass(frozen=True)
class DataConfig:
    """What to read, how to cut it into sequences and steps, and what to do with what does not fit."""

    shards: list[str] = field(default_factory=list)
    """Paths of .tar shards, patterns or URLs (http, https, s3), each shard with its NAME.tar.index beside it."""
    tokenizer: str = MISSING
    """Folder of the tokenizer (tokenizer.json); the indexes must have been made with the same one."""
    sequence_length: int = 8192
    """Most tokens in one packed sequence."""
    sequences_per_step: int = 8
    """Packed sequences in one optimizer step, over all ranks: the global batch."""
    window: int = 65536
    """Samples that are shuffled and packed together: more mixes better, packs tighter, takes more memory."""
    too_long: str = "error"
    """A sample above sequence_length: "error" stops before training; "drop" leaves it out, counted by source; "split"
    cuts documents into pieces (data/split.py says where) and drops conversations."""
    learn: str = "all"
    """Answers that carry loss: "all" of a conversation's but those that say otherwise, or only the "last"."""
    mixture: Mixture | None = None
    """Shares of sources and languages (data/mixture.py); without one, every sample comes once an epoch."""
    max_bad_samples: int = 100
    """Damaged samples that one run may leave out before it stops."""
    workers: int = 2
    """Processes that read and decode for each rank; 0 decodes in the training process. Changes no result."""
    prefetch: int = 4
    """Packed sequences that each worker prepares ahead."""
    speeds: list[float] = field(default_factory=lambda: [1.0])
    """Factors of which one is drawn for each sample and epoch to change its speech's speed; [1.0] does nothing."""
    augment: Augment = field(default_factory=Augment)
    """Vary level, noise and spectrum of training audio; all off by default (data/augment.py says what there is)."""
    max_audio_seconds: float = 3600.0
    """A clip or film that lasts longer is refused."""
    image: ImageLimits = field(default_factory=ImageLimits)
    """Smallest and largest number of pixels that an image is resized to, and what is refused (data/vision.py)."""
    video: Sampling = field(default_factory=Sampling)
    """Frames a second, fewest and most frames, pixels of a frame, tokens of a clip (data/video.py)."""
    codec: str = ""
    """Folder of the codec whose codes lie beside the shards (python -m data.codes); phases with speech need it."""
    store: StoreSettings = field(default_factory=StoreSettings)
    """Where blocks of remote shards are kept, and when a server counts as gone (data/store.py)."""

    @property
    def limits(self) -> MediaLimits:
        """What media may be, as readers take it."""
        longest = self.max_audio_seconds
        return MediaLimits(Limits(max_seconds=longest), self.image, VideoLimits(max_seconds=longest), self.video)

    def validate(self) -> None:
        """Raise DataError naming the first setting that cannot be used."""
        positive = ("sequence_length", "sequences_per_step", "window", "prefetch", "max_audio_seconds")
        for name in positive:
            if not getattr(self, name) > 0:
                raise DataError(f"data.{name}={getattr(self, name)}: must be above 0")
        for name in ("workers", "max_bad_samples"):
            if getattr(self, name) < 0:
                raise DataError(f"data.{name}={getattr(self, name)}: must be 0 or more")
        if self.too_long not in ("error", "drop", "split"):
            raise DataError(f'data.too_long={self.too_long}: must be "error", "drop" or "split"')
        if self.learn not in ("all", "last"):
            raise DataError(f'data.learn={self.learn}: must be "all" or "last"')
        if not self.speeds or not all(0.5 <= speed <= 2.0 for speed in self.speeds):
            raise DataError(f"data.speeds={list(self.speeds)}: must be one or more factors between 0.5 and 2")
        check_sizes(self.image, self.video)
        if self.mixture is not None:
            self.mixture.validate()
        self.store.validate()
        if not self.shards:
            raise DataError("data.shards is empty: name at least one shard (a path or a glob pattern)")
        if not self.tokenizer or self.tokenizer == MISSING:
            raise DataError("data.tokenizer is not set: name the folder that holds tokenizer.json")


def check_sizes(image: ImageLimits, video: Sampling) -> None:
    """Raise DataError naming the first setting of images and videos that cannot be used."""
    for name, group in {"data.image": image, "data.video": video}.items():
        for key, value in asdict(group).items():
            if not 0 < value < math.inf:
                raise DataError(f"{name}.{key}={value}: must be above 0")
        if group.min_pixels > group.max_pixels:
            raise DataError(f"{name}.min_pixels={group.min_pixels}: must be at most {name}.max_pixels")
    if video.min_frames > video.max_frames:
        raise DataError(f"data.video.min_frames={video.min_frames}: must be at most data.video.max_frames")
