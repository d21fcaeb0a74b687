"""The whole model: a Thinker that reads and answers, a Talker that says it, a decoder that makes it sound.

    text, speech, images, video --thinker--> text
                                   '--hidden states of media, embeddings of text--> talker --codes--> code2wav --> wave

One module so that one checkpoint holds all of it: every parameter's name is the released one, experts apart
(models/hf.py). The parts are called by themselves: training by train/speech_loss.py, generation by models/speak.py.
"""

from __future__ import annotations

from torch import nn

from models.code2wav import Code2Wav
from models.omni_config import OmniConfig
from models.talker import Talker
from models.thinker import Thinker


class Omni(nn.Module):
    """Thinker, and Talker and waveform decoder where the configuration has them, else None."""

    def __init__(self, config: OmniConfig, recompute_experts: bool = False) -> None:
        """`recompute_experts` keeps no activations of the experts for backward (a quarter more GEMM work there)."""
        super().__init__()
        self.config = config
        self.thinker = Thinker(config.thinker, recompute_experts)
        self.talker = Talker(config.talker, recompute_experts) if config.talker is not None else None
        self.code2wav = Code2Wav(config.code2wav) if config.code2wav is not None else None
