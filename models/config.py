"""Shapes of the Thinker, under transformers' field names, checked when they are made.

    TextConfig + AudioConfig + audio_token_id  ->  ThinkerConfig  ->  models.thinker.Thinker

Frozen dataclasses of plain numbers: a recipe fills them, a checkpoint records them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


class ConfigError(ValueError):
    """A setting that no model can be built from; the message names it and says what to do."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(config: TextConfig | AudioConfig) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int | float):
            _require(value > 0, f"{field.name} must be above 0, not {value}")


@dataclass(frozen=True)
class TextConfig:
    """The mixture-of-experts decoder. `mrope_section` counts rotary frequencies for time, height and width."""

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

    def __post_init__(self) -> None:
        """Reject shapes that do not fit together."""
        object.__setattr__(self, "mrope_section", tuple(self.mrope_section))  # a list, where YAML filled it
        _require_positive(self)
        _require(self.head_dim % 2 == 0, f"head_dim must be even, not {self.head_dim}")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({self.num_key_value_heads})",
        )
        _require(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed num_experts ({self.num_experts})",
        )
        section = self.mrope_section
        _require(
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
        _require_positive(self)
        _require(
            self.d_model % (2 * self.encoder_attention_heads) == 0 or self.encoder_attention_heads == 1,
            f"d_model ({self.d_model}) must be an even multiple of encoder_attention_heads "
            f"({self.encoder_attention_heads})",
        )
        _require(self.d_model % 2 == 0 and self.d_model >= 4, f"d_model must be even and at least 4: {self.d_model}")
        _require(self.n_window == 50, f"n_window must be 50 (chunks of one second), not {self.n_window}")
        _require(
            self.n_window_infer % 100 == 0,
            f"n_window_infer must be a multiple of 100 frames (whole seconds), not {self.n_window_infer}",
        )


@dataclass(frozen=True)
class ThinkerConfig:
    """Decoder and encoder together; `audio_token_id` is the placeholder that audio features replace."""

    text: TextConfig
    audio: AudioConfig
    audio_token_id: int

    def __post_init__(self) -> None:
        """Reject parts that do not fit together."""
        _require(
            self.audio.output_dim == self.text.hidden_size,
            f"audio output_dim ({self.audio.output_dim}) must equal text hidden_size ({self.text.hidden_size})",
        )
        _require(
            0 <= self.audio_token_id < self.text.vocab_size,
            f"audio_token_id ({self.audio_token_id}) must lie below vocab_size ({self.text.vocab_size})",
        )


def scaled_mrope_section(head_dim: int) -> tuple[int, int, int]:
    """The released model's 24/20/20 split of 64 frequencies, scaled to head_dim / 2; time takes the remainder."""
    half = head_dim // 2
    width = half * 20 // 64
    return half - 2 * width, width, width
