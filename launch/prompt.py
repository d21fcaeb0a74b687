"""One conversation from files and text: what a user asks, ready for models.generate and models.speak.

    system, text, audio, image, video files --decode, log-mel, patches--> segments --lay_out--> ids, positions --> Batch

Media come in the order in which they are given, before the text, in ChatML. A video brings its sound, interleaved by
time, unless told otherwise. Cost: that of decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.audio import decode
from data.errors import DataError
from data.mel import NUM_MELS, log_mel
from data.tokenizer import IM_END, IM_START, Tokenizer
from data.types import Batch
from data.video import load_sound, load_video
from data.vision import Patching, load_image
from models.audio_encoder import num_audio_tokens
from models.omni_config import OmniConfig
from models.positions import Audio, Image, MediaTokens, Text, Video, VideoWithAudio, lay_out

KINDS = ("audio", "image", "video")


@dataclass(frozen=True)
class Medium:
    """A file to ask about."""

    kind: str  # one of KINDS
    path: Path


def conversation(
    config: OmniConfig,
    tokenizer: Tokenizer,
    text: str,
    media: Sequence[Medium] = (),
    system: str = "",
    video_sound: bool = True,
) -> Batch:
    """A prompt of one document that ends where the assistant's answer begins. Raises DataError, naming the file."""
    thinker = config.thinker
    if thinker.vision is None and any(medium.kind != "audio" for medium in media):
        raise DataError("this model has no vision encoder: it takes audio and text")
    vision = thinker.vision
    patching = Patching(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size) if vision else None
    segments, mels, pixels, grids = [], [], [], []

    def hear(wave_S) -> int:
        mels.append(log_mel(wave_S))
        return int(num_audio_tokens(len(mels[-1])))

    def see(pixels_PX, grid):
        pixels.append(pixels_PX)
        grids.append(grid)
        return grid

    for medium in media:
        try:
            payload = medium.path.read_bytes()
            if medium.kind == "audio":
                segments.append(Audio(hear(decode(payload))))
            elif medium.kind == "image":
                segments.append(Image(see(*load_image(payload, patching=patching))))
            else:
                clip = load_video(payload, patching=patching)
                sound_S = load_sound(payload) if video_sound else None
                grid = see(clip.pixels_PX, clip.grid)
                if sound_S is None:
                    segments.append(Video(grid, clip.times))
                else:
                    segments.append(VideoWithAudio(grid, clip.times, hear(sound_S)))
        except OSError as error:
            raise DataError(f"{medium.path}: {error.strerror}") from None
        except DataError as error:
            raise DataError(f"{medium.path}: {getattr(error, 'reason', error)}") from None

    start, end, newline = tokenizer.id(IM_START), tokenizer.id(IM_END), tokenizer.encode("\n")
    head = [start, *tokenizer.encode(f"system\n{system}"), end, *newline] if system else []
    head += [start, *tokenizer.encode("user\n")]
    tail = [*tokenizer.encode(text), end, *newline, start, *tokenizer.encode("assistant\n")]
    merge = vision.spatial_merge_size if vision else 2
    token_ids_T, position_ids_3T = lay_out(
        [Text(len(head)), *segments, Text(len(tail))],
        [*head, *tail],
        MediaTokens.of(config),
        merge=merge,
        rate=thinker.position_id_per_seconds,
    )
    return Batch(
        token_ids_T=token_ids_T,
        labels_T=torch.full_like(token_ids_T, -100),
        position_ids_3T=position_ids_3T,
        doc_lengths=(len(token_ids_T),),
        mel_FM=torch.cat([torch.empty(0, NUM_MELS), *mels]),
        mel_lengths=tuple(map(len, mels)),
        keys=("prompt",),
        pixels_PX=torch.cat(pixels) if pixels else torch.empty(0, 0),
        grids=tuple(grids),
    )
