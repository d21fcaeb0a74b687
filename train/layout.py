"""The model's knowledge of tokens, for `data`, which imports no model.

model's configuration --> ModelLayout --data.plan: lengths; data.document: token ids and position ids
                      --> work_of: what tokens, frames and patches cost, for balance
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from data.costs import Work
from data.errors import BadSample
from data.tokenizer import (
    AUDIO_END,
    AUDIO_START,
    IM_END,
    IM_START,
    ROLES,
    TTS,
    VISION_END,
    VISION_START,
    Tokenizer,
)
from data.vision import Grid, Patching
from models import positions
from models.audio_encoder import num_audio_tokens
from models.config import ConfigError, ThinkerConfig, TranscriberConfig
from models.flops import audio_decoder_flops, audio_flops, text_flops, vision_flops
from models.omni_config import OmniConfig
from models.positions import MediaTokens
from models.say import user_positions
from models.talker_inputs import TalkerPlan, join, plan_document


@dataclass(frozen=True)
class ModelLayout:
    """A data.layout.Layout: the released model's unless made by `of`."""

    tokens: MediaTokens = field(default_factory=MediaTokens)
    patching: Patching | None = field(default_factory=Patching)
    audio_window: int = 800
    rate: float = positions.RATE
    omni: OmniConfig | None = None  # of a model that speaks

    @classmethod
    def of(cls, thinker: ThinkerConfig, tokens: MediaTokens, omni: OmniConfig | None = None) -> ModelLayout:
        """A model's; `tokens` by MediaTokens.of or `media_tokens`, `omni` where answers are spoken."""
        vision = thinker.vision
        patching = (
            Patching(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size) if vision else None
        )
        return cls(tokens, patching, thinker.audio.n_window_infer, thinker.position_id_per_seconds, omni)

    @property
    def merge(self) -> int:
        """Side of a block of patches that becomes one token."""
        return self.patching.merge_size if self.patching else positions.MERGE

    def num_audio_tokens(self, frames: np.ndarray) -> np.ndarray:
        """Placeholders of clips of so many log-mel frames."""
        return num_audio_tokens(frames)

    def text(self, num_tokens: int) -> positions.Text:
        """A stretch of text."""
        return positions.Text(num_tokens)

    def audio(self, frames: int) -> positions.Audio:
        """A clip of so many log-mel frames."""
        return positions.Audio(int(num_audio_tokens(frames)))

    def image(self, grid: Grid) -> positions.Image:
        """A picture."""
        return positions.Image(grid)

    def video(self, grid: Grid, times: Sequence[float], frames: int | None) -> positions.Video:
        """A film: seconds of each temporal patch; log-mel frames of its sound, None where that is not heard."""
        if frames is None:
            return positions.Video(grid, times)
        return positions.VideoWithAudio(grid, times, int(num_audio_tokens(frames)))

    def num_tokens(self, segment: positions.Segment) -> int:
        """Tokens of a segment, those that wrap it included."""
        return positions.num_tokens(segment, self.merge)

    def speech(self, ids_T: Tensor, position_ids_3T: Tensor, speaker: str, codes_GF: Tensor) -> TalkerPlan:
        """See data.layout.Layout. Raises BadSample for a speaker or codes that the Talker does not have."""
        assert self.omni is not None and self.omni.talker is not None, "this layout is of a Thinker alone"
        voices = self.omni.talker.speaker_id
        if speaker not in voices:
            raise BadSample(
                f"its answer is spoken by {speaker or 'nobody that is named'!r}, and model.talker.speaker_id names "
                f"{', '.join(voices) or 'nobody'}"
            )
        try:
            return plan_document(
                self.omni, ids_T, user_positions(self.omni, ids_T, position_ids_3T), voices[speaker], codes_GF
            )
        except ValueError as error:
            raise BadSample(str(error)) from None

    def join_speech(self, parts: Sequence[TalkerPlan]) -> TalkerPlan:
        """See data.layout.Layout."""
        assert self.omni is not None and self.omni.talker is not None, "this layout is of a Thinker alone"
        return join(parts, self.omni.talker.num_code_groups)

    def lay_out(self, segments: Sequence[positions.Segment], text_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One document: token ids int64 [T] and position ids float32 [3, T]."""
        return positions.lay_out(segments, text_ids, self.tokens, merge=self.merge, rate=self.rate)


def media_tokens(thinker: ThinkerConfig, tokenizer: Tokenizer) -> MediaTokens:
    """The special tokens around media, by the tokenizer's names. Raises DataError where it lacks one that is needed."""
    start, end = tokenizer.id(AUDIO_START), tokenizer.id(AUDIO_END)
    if thinker.image_token_id is None or thinker.video_token_id is None:
        return MediaTokens(thinker.audio_token_id, -1, -1, start, end, -1, -1)
    opening, closing = tokenizer.id(VISION_START), tokenizer.id(VISION_END)
    return MediaTokens(
        thinker.audio_token_id, thinker.image_token_id, thinker.video_token_id, start, end, opening, closing
    )


def joining_ids(tokenizer: Tokenizer, speaks: bool = True) -> dict[str, int]:
    """OmniConfig's ids of the tokens by which Thinker and Talker are joined, by the tokenizer's names.

    Raises ConfigError where a model `speaks` and a role or line end is more than one token: the Talker would find the
    head of a turn of another length. Without a Talker such roles are left out.
    """
    names = {"im_start": IM_START, "im_end": IM_END, "audio_start": AUDIO_START, "audio_end": AUDIO_END}
    names |= {"vision_start": VISION_START, "vision_end": VISION_END}
    names |= dict(zip(("tts_pad", "tts_bos", "tts_eos"), TTS, strict=False))
    ids = {f"{key}_token_id": tokenizer.id(name) for key, name in names.items()}
    for word in (*ROLES, "\n"):
        tokens = tokenizer.encode(word)
        if speaks and len(tokens) != 1:
            raise ConfigError(
                f"the tokenizer makes {len(tokens)} tokens of {word!r}, and a Talker needs one: use another tokenizer"
            )
        if word in ROLES and len(tokens) == 1:
            ids[f"{word}_token_id"] = tokens[0]
    return ids


def work_of(config: ThinkerConfig | TranscriberConfig) -> Work:
    """What a model's tokens cost, from its FLOPs: a decoder token is 1, its attention apart."""
    if isinstance(config, TranscriberConfig):
        return _work_of_transcriber(config)
    text, vision = config.text, config.vision
    attention = (text_flops(text, [2]) - 2 * text_flops(text, [1])) / 2  # of one pair of tokens
    token = text_flops(text, [1]) - attention
    window = config.audio.n_window_infer
    frame = audio_flops(config.audio, [window]) / window
    if vision is None:
        return Work(1.0, attention / token, frame / token, 0.0, 0.0)
    merge = vision.spatial_merge_size
    small, large = (vision_flops(vision, [(1, merge, merge * columns)]) for columns in (1, 2))
    patches = merge * merge
    squared = (large - 2 * small) / (2 * patches**2)
    return Work(1.0, attention / token, frame / token, (small / patches - squared * patches) / token, squared / token)


def _work_of_transcriber(config: TranscriberConfig) -> Work:
    """A text token is 1. A clip's placeholders are counted as tokens, so a frame costs what it does above those."""
    token, window = audio_decoder_flops(config, [1], [0]), config.thinker.audio.n_window_infer
    tokens = int(num_audio_tokens(window))
    heard = audio_flops(config.thinker.audio, [window]) + audio_decoder_flops(config, [0], [tokens])
    return Work(1.0, 0.0, max(0.0, heard / token - tokens) / window, 0.0, 0.0)
