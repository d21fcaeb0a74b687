"""Shapes of the speaking half, and of the whole model.

    CodePredictorConfig + TextConfig  ->  TalkerConfig  --.
    ThinkerConfig  ---------------------------------------+-->  OmniConfig  ->  the whole model, config.json
    Code2WavConfig  --------------------------------------'

Field names and defaults are those of the released Qwen3-Omni-30B-A3B checkpoint where it has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import prod

from models.config import TextConfig, ThinkerConfig, require, require_positive


@dataclass(frozen=True)
class CodePredictorConfig:
    """The dense decoder that predicts a frame's residual codes. `vocab_size` codes in each codebook."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_code_groups: int = 16
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Reject shapes that do not fit together."""
        require_positive(self)
        require(self.head_dim % 2 == 0, f"head_dim must be even, not {self.head_dim}")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({self.num_key_value_heads})",
        )
        require(self.num_code_groups >= 2, f"num_code_groups must be at least 2, not {self.num_code_groups}")


@dataclass(frozen=True)
class TalkerConfig:
    """The decoder of speech codes: codebook 0 by itself, the rest of a frame by its code predictor.

    `text.vocab_size` counts codes and control tokens together; the control ids lie above the codes. Multimodal
    context is the Thinker's hidden state after `accept_hidden_layer` layers. `speaker_id` maps names to control ids.
    """

    text: TextConfig
    code_predictor: CodePredictorConfig
    thinker_hidden_size: int
    accept_hidden_layer: int
    codec_pad_id: int = 2148
    codec_bos_id: int = 2149
    codec_eos_token_id: int = 2150
    codec_nothink_id: int = 2155
    codec_think_bos_id: int = 2156
    codec_think_eos_id: int = 2157
    speaker_id: dict[str, int] = field(default_factory=lambda: {"chelsie": 2301, "ethan": 2302, "aiden": 2303})

    def __post_init__(self) -> None:
        """Reject parts that do not fit together."""
        require(self.thinker_hidden_size > 0, f"thinker_hidden_size must be above 0, not {self.thinker_hidden_size}")
        require(self.accept_hidden_layer > 0, f"accept_hidden_layer must be above 0, not {self.accept_hidden_layer}")
        require(
            self.code_predictor.hidden_size == self.text.hidden_size,
            f"code_predictor hidden_size ({self.code_predictor.hidden_size}) must equal the Talker's "
            f"({self.text.hidden_size}): frames go from one to the other as they are",
        )
        require(
            self.text.shared_expert_intermediate_size > 0,
            "shared_expert_intermediate_size must be above 0: every layer of the Talker has a shared expert",
        )
        control = {name: getattr(self, name) for name in CONTROL_IDS} | self.speaker_id
        for name, value in control.items():
            require(
                self.code_predictor.vocab_size <= value < self.text.vocab_size,
                f"{name} ({value}) must lie above the {self.code_predictor.vocab_size} codes and below vocab_size "
                f"({self.text.vocab_size})",
            )

    @property
    def num_code_groups(self) -> int:
        """Codes of a frame: one of the backbone, the rest of the code predictor."""
        return self.code_predictor.num_code_groups


CONTROL_IDS = (
    "codec_pad_id",
    "codec_bos_id",
    "codec_eos_token_id",
    "codec_nothink_id",
    "codec_think_bos_id",
    "codec_think_eos_id",
)


@dataclass(frozen=True)
class Code2WavConfig:
    """The waveform decoder: codes at 12.5 frames a second to 24 kHz. `upsample_rates` are those of its last blocks."""

    codebook_size: int
    num_quantizers: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    decoder_dim: int = 1536
    sliding_window: int = 72
    upsample_rates: tuple[int, ...] = (8, 5, 4, 3)
    upsampling_ratios: tuple[int, ...] = (2, 2)
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    layer_scale_initial_scale: float = 0.01

    def __post_init__(self) -> None:
        """Reject shapes that do not fit together."""
        object.__setattr__(self, "upsample_rates", tuple(self.upsample_rates))
        object.__setattr__(self, "upsampling_ratios", tuple(self.upsampling_ratios))
        require_positive(self)
        require(
            self.hidden_size % (2 * self.num_attention_heads) == 0,
            f"hidden_size ({self.hidden_size}) must be an even multiple of num_attention_heads "
            f"({self.num_attention_heads})",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({self.num_key_value_heads})",
        )
        require(
            self.decoder_dim % 2 ** len(self.upsample_rates) == 0,
            f"decoder_dim ({self.decoder_dim}) is halved {len(self.upsample_rates)} times and must stay whole",
        )

    @property
    def samples_per_frame(self) -> int:
        """Samples at 24 kHz that one frame of codes becomes: 1,920 in the released model."""
        return prod(self.upsample_rates) * prod(self.upsampling_ratios)


@dataclass(frozen=True)
class OmniConfig:
    """The whole model, and the text tokens by which Thinker and Talker are joined."""

    thinker: ThinkerConfig
    talker: TalkerConfig | None = None
    code2wav: Code2WavConfig | None = None
    im_start_token_id: int = 151644
    im_end_token_id: int = 151645
    system_token_id: int = 8948
    user_token_id: int = 872
    assistant_token_id: int = 77091
    tts_pad_token_id: int = 151671
    tts_bos_token_id: int = 151672
    tts_eos_token_id: int = 151673
    audio_start_token_id: int = 151669
    audio_end_token_id: int = 151670
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    def __post_init__(self) -> None:
        """Reject parts that do not fit together."""
        if self.talker is None:
            require(self.code2wav is None, "code2wav needs a talker: nothing else makes its codes")
            return
        text = self.thinker.text
        for name in (item.name for item in fields(self) if item.name.endswith("_token_id")):
            require(
                0 <= getattr(self, name) < text.vocab_size,
                f"{name} ({getattr(self, name)}) must lie below vocab_size ({text.vocab_size}) of the Thinker, whose "
                "embeddings the Talker takes",
            )
        require(
            self.talker.thinker_hidden_size == text.hidden_size,
            f"talker thinker_hidden_size ({self.talker.thinker_hidden_size}) must equal the Thinker's hidden_size "
            f"({text.hidden_size})",
        )
        require(
            self.talker.accept_hidden_layer <= text.num_hidden_layers,
            f"talker accept_hidden_layer ({self.talker.accept_hidden_layer}) must not exceed the Thinker's "
            f"{text.num_hidden_layers} layers",
        )
        if self.code2wav is not None:
            require(
                self.code2wav.num_quantizers == self.talker.num_code_groups,
                f"code2wav num_quantizers ({self.code2wav.num_quantizers}) must equal the Talker's num_code_groups "
                f"({self.talker.num_code_groups})",
            )
