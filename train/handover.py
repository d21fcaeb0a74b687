"""What a run takes of an audio encoder's run in `init`, and such a run of a Thinker's: the encoder.

audio_tower.*   --------------------------------> as they are there
of a Thinker    what learns, and the Talker ----> first weights of this run's seed
                what is frozen -----------------> refused: it would never learn anything
audio_decoder.* of a run that has none ---------> first weights (train.engines.setup.starts_anew)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from models.config import TranscriberConfig
from train.engines import WEIGHT, StateReader
from train.engines.setup import Drawn, EngineSetup
from train.optim import matches

DECODER = "audio_decoder.norm.weight"  # is in the state of an audio encoder's run
BESIDE = ("talker.", "code2wav.")  # which no Thinker looks at


def handed_over(source: str, weights: StateReader, setup: EngineSetup) -> tuple[StateReader, str]:
    """Weights to start from, and what of them begins anew as a line, "" for nothing."""
    alone = bool(weights.kinds(DECODER))
    if isinstance(setup.model, TranscriberConfig):
        return (
            weights,
            "" if alone else f"{source} has no audio_decoder: it begins anew, the encoder is taken",
        )
    if not alone:
        return weights, ""
    return _EncoderAlone(weights, setup), f"{source} has an audio encoder alone: what else learns begins anew"


class _EncoderAlone:
    """An audio encoder's run as a StateReader of a model with a Thinker."""

    def __init__(self, weights: StateReader, setup: EngineSetup) -> None:
        self.step, self._weights, self._phase, self._drawn = 0, weights, setup.phase, Drawn(setup, {})

    def kinds(self, name: str) -> frozenset[str]:
        """See train.engines.StateReader."""
        return self._weights.kinds(name)

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        """See train.engines.StateReader."""
        learns = matches(name, self._phase.train) and not matches(name, self._phase.freeze)
        anew = kind == WEIGHT and not self._weights.kinds(name) and (learns or name.startswith(BESIDE))
        return (self._drawn if anew else self._weights).read(kind, name, shape, start, length)
