"""Shapes of the Thinker, under transformers' field names, checked when they are made.

    TextConfig + AudioConfig [+ VisionConfig] + placeholder ids  ->  ThinkerConfig  ->  models.thinker.Thinker
    ThinkerConfig's encoder + AudioDecoderConfig  ->  TranscriberConfig  ->  models.transcriber.Transcriber

Frozen dataclasses of plain numbers: a recipe fills them, a checkpoint records them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


class ConfigError(ValueError):
    """A setting that no model can be built from; the message names it and says what to do."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(config: Any, but: tuple[str, ...] = ()) -> None:
    """Refuse numbers of a dataclass that are not above 0, except in the fields `but`."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int | float) and field.name not in but:
            require(value > 0, f"{field.name} must be above 0, not {value}")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary positions beyond the trained length, under transformers' names; all three axes alike.

    linear: every position divided by `factor`. yarn (Peng et al. 2023): only frequencies that turn less than
    `beta_slow` times over the original length, none that turn more than `beta_fast` times, a ramp between; queries and
    keys are scaled by `attention_factor`, 0.1 ln(factor) + 1 where it is not given.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no scaling."""
        require(self.rope_type in ("linear", "yarn"), f"rope_type is {self.rope_type!r}; it is linear or yarn")
        require(self.factor >= 1, f"factor of a rope_scaling must be at least 1, not {self.factor}")
        if self.rope_type == "yarn":
            length = self.original_max_position_embeddings
            require(
                length is not None and length > 0,
                "a rope_scaling of rope_type yarn needs original_max_position_embeddings, the length trained so far",
            )
            require(
                0 < self.beta_slow <= self.beta_fast,
                f"beta_slow ({self.beta_slow}) must be above 0 and at most beta_fast ({self.beta_fast})",
            )


@dataclass(frozen=True)
class TextConfig:
    """A mixture-of-experts decoder, the Thinker's or the Talker's.

    `mrope_section` counts rotary frequencies for time, height and width. The Talker's layers have a shared expert
    beside the routed ones; a width of 0 means none.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    shared_expert_intermediate_size: int = 0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        """Reject shapes that do not fit together."""
        object.__setattr__(self, "mrope_section", tuple(self.mrope_section))  # a list, where YAML filled it
        require_positive(self, but=("shared_expert_intermediate_size",))
        require(
            self.shared_expert_intermediate_size >= 0,
            f"shared_expert_intermediate_size must be 0 (none) or more, not {self.shared_expert_intermediate_size}",
        )
        require(self.head_dim % 2 == 0, f"head_dim must be even, not {self.head_dim}")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({self.num_key_value_heads})",
        )
        require(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed num_experts ({self.num_experts})",
        )
        section = self.mrope_section
        require(
            len(section) == 3
            and sum(section) == self.head_dim // 2
            and 0 <= min(section)
            and section[0] == max(section),
            f"mrope_section must be three counts that sum to head_dim / 2 = {self.head_dim // 2}, the first the "
            f"largest, such as {scaled_mrope_section(self.head_dim)}; not {section}",
        )


@dataclass(frozen=True)
class AudioConfig:
    """The audio encoder. Windows are counted in mel frames of 10 ms; a chunk is 2 * n_window frames, one second."""

    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    output_dim: int
    downsample_hidden_size: int = 480
    num_mel_bins: int = 128
    n_window: int = 50
    n_window_infer: int = 800
    max_source_positions: int = 1500

    def __post_init__(self) -> None:
        """Reject shapes that do not fit together."""
        require_positive(self)
        require(
            self.d_model % (2 * self.encoder_attention_heads) == 0 or self.encoder_attention_heads == 1,
            f"d_model ({self.d_model}) must be an even multiple of encoder_attention_heads "
            f"({self.encoder_attention_heads})",
        )
        require(self.d_model % 2 == 0 and self.d_model >= 4, f"d_model must be even and at least 4: {self.d_model}")
        require(self.n_window == 50, f"n_window must be 50 (chunks of one second), not {self.n_window}")
        require(
            self.n_window_infer % 100 == 0,
            f"n_window_infer must be a multiple of 100 frames (whole seconds), not {self.n_window_infer}",
        )


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder: patches of `patch_size` pixels over `temporal_patch_size` frames.

    `deepstack_visual_indexes` are the blocks after which features are also taken for the decoder's first layers, one
    layer each. `num_position_embeddings` is a square: the grid from which positions are interpolated.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    num_position_embeddings: int = 2304
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3

    def __post_init__(self) -> None:
        """Reject shapes that do not fit together."""
        object.__setattr__(self, "deepstack_visual_indexes", tuple(self.deepstack_visual_indexes))
        require_positive(self)
        require(
            self.hidden_size % (4 * self.num_heads) == 0,
            f"hidden_size ({self.hidden_size}) must be a multiple of 4 * num_heads ({self.num_heads}): half of a "
            "head's channels turn with the row, half with the column",
        )
        side = round(self.num_position_embeddings**0.5)
        require(
            side * side == self.num_position_embeddings,
            f"num_position_embeddings must be a square number, not {self.num_position_embeddings}",
        )
        taken = self.deepstack_visual_indexes
        require(
            all(0 <= index < self.depth for index in taken) and sorted(set(taken)) == list(taken),
            f"deepstack_visual_indexes {list(taken)} must be rising block numbers below depth ({self.depth})",
        )

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class ThinkerConfig:
    """Decoder and encoders together. The ids are the placeholders that features replace.

    `vision` None is a model of text and audio. `position_id_per_seconds` is how far the time axis of video advances in
    a second; audio has as many tokens in a second.
    """

    text: TextConfig
    audio: AudioConfig
    audio_token_id: int
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    position_id_per_seconds: int = 13

    def __post_init__(self) -> None:
        """Reject parts that do not fit together."""
        require(
            self.audio.output_dim == self.text.hidden_size,
            f"audio output_dim ({self.audio.output_dim}) must equal text hidden_size ({self.text.hidden_size})",
        )
        ids = {"audio_token_id": self.audio_token_id}
        if self.vision is not None:
            require(
                self.vision.out_hidden_size == self.text.hidden_size,
                f"vision out_hidden_size ({self.vision.out_hidden_size}) must equal text hidden_size "
                f"({self.text.hidden_size})",
            )
            require(
                len(self.vision.deepstack_visual_indexes) <= self.text.num_hidden_layers,
                f"deepstack_visual_indexes {list(self.vision.deepstack_visual_indexes)} must not be more than the "
                f"decoder's {self.text.num_hidden_layers} layers",
            )
            for name in ("image_token_id", "video_token_id"):
                value = getattr(self, name)
                require(value is not None, f"{name} must be given where there is a vision encoder")
                ids[name] = value
        for name, value in ids.items():
            require(
                0 <= value < self.text.vocab_size,
                f"{name} ({value}) must lie below vocab_size ({self.text.vocab_size})",
            )
        require(len(set(ids.values())) == len(ids), f"placeholder ids must differ: {ids}")
        require(self.position_id_per_seconds > 0, "position_id_per_seconds must be above 0")


@dataclass(frozen=True)
class AudioDecoderConfig:
    """The dense text decoder that an audio encoder learns with; its vocabulary is the Thinker's."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    tie_word_embeddings: bool = True
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Reject shapes that do not fit together."""
        require_positive(self, but=("tie_word_embeddings",))
        require(
            self.hidden_size % (2 * self.num_attention_heads) == 0,
            f"hidden_size ({self.hidden_size}) must be an even multiple of num_attention_heads "
            f"({self.num_attention_heads})",
        )


@dataclass(frozen=True)
class TranscriberConfig:
    """An audio encoder and the decoder that it learns with. Of `thinker`, which the encoder is for, no more is made."""

    thinker: ThinkerConfig
    decoder: AudioDecoderConfig

    def __post_init__(self) -> None:
        """Reject what it cannot see."""
        require(self.thinker.vision is None, "audio_decoder: the model hears alone, and cannot have a vision encoder")


def scaled_mrope_section(head_dim: int) -> tuple[int, int, int]:
    """The released model's 24/20/20 split of 64 frequencies, scaled to head_dim / 2; time takes the remainder."""
    half = head_dim // 2
    width = half * 20 // 64
    return half - 2 * width, width, width
