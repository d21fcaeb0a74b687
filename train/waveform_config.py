"""Settings of the phases that train the waveform decoder, `loss.waveform` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from data.segments import CONTEXT
from train.adversary import AdversaryConfig
from train.errors import RecipeError
from train.waveform_loss import SpectralConfig

DECODER_PHASES = ("waveform", "adversarial")  # of a recipe: the waveform decoder learns, the other parts stand still


@dataclass(frozen=True)
class WaveformConfig:
    """How the waveform decoder learns. Weights are HiFi-GAN's 1, 2 and 45 (Kong et al. 2020, section 2.4), the 45
    shared by three spectral terms."""

    frames: int = 50
    """Frames of a piece that are scored; shorter utterances are taken whole."""
    context: int = CONTEXT
    """Frames before a piece that are decoded with it and not scored."""
    stft_linear: float = 15.0
    """Weight of the distance of magnitudes."""
    stft_log: float = 15.0
    """Weight of the distance of logarithms of magnitudes."""
    mel: float = 15.0
    """Weight of the distance of log-mels."""
    adversarial: float = 1.0
    """Weight of what the discriminators say, in phases with speech=adversarial, as is the next one."""
    matching: float = 2.0
    """Weight of the distance of the discriminators' features."""
    spectral: SpectralConfig = field(default_factory=SpectralConfig)
    """Windows and floor of the three distances."""
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    """Sizes of the discriminators."""

    def __post_init__(self) -> None:
        """Reject sizes without sense, and what would be a reward."""
        if self.frames < 1:
            raise RecipeError(f"loss.waveform.frames={self.frames}: it must be at least 1")
        for name in ("context", "stft_linear", "stft_log", "mel", "adversarial", "matching"):
            if getattr(self, name) < 0:
                raise RecipeError(f"loss.waveform.{name}={getattr(self, name)}: it must not be below 0")
