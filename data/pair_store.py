"""Preference pairs beside a shard: two code sequences for one answer, of which one is better.

    launch.preferences --record after record--> NAME.tar.pairs.partial --all done--> NAME.tar.pairs (safetensors)
    NAME.tar.pairs --mmap, checked--> ShardPairs: of a row, chosen and rejected codes, speaker, reference

The file is made as that of codes is (data/code_store.py): a row's codes are the chosen frames, then the rejected ones,
so its frames are those of both and a plan counts both. Bound to codec, tar, index and to what the pairs were made with.
It keeps the log-probabilities that the Talker which spoke gave to both: DPO's reference, so that no second Talker has
to run, be kept in checkpoints or be sharded. First and residual codes apart, since their weight is the recipe's.
Cost: 2 bytes a code and 26 a pair.

Letters: N samples of the shard, G codebooks, F frames.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.code_store import COLUMNS, RowsWriter, ShardCodes, about_codes
from data.codec import Codec
from data.errors import BadSample, DataError
from data.shard_index import ShardIndex

FORMAT = "omniloom-pairs-1"
MORE_COLUMNS = {
    "chosen": np.int64,  # N: frames of the chosen sequence, the first of a row
    "logprobs": np.float32,  # 4 N, nats: chosen's first and residual codes, rejected's first and residual codes
    "errors": np.float32,  # 2 N: word error rates of chosen and rejected, where they were made by one
    "recorded": np.uint8,  # N: 1 where the recording was chosen
}
ALIKE = "its candidates score alike"  # why most samples without a pair have none


@dataclass(frozen=True)
class Pair:
    """Two ways to say an answer."""

    chosen_GF: Tensor  # int64
    rejected_GF: Tensor  # int64; it may have no frames
    logprobs_22: Tensor  # float32, by the reference: of chosen and rejected; of first codes with the end, of residual
    errors: tuple[float, float] = (0.0, 1.0)  # word error rates
    recorded: bool = False  # the chosen one is the recording


class ShardPairs(ShardCodes):
    """The pairs of one shard, mapped. Use `ShardPairs.open`."""

    suffix, format, what = "pairs", FORMAT, "preference pairs"
    command = "python -m launch.preferences run=RUN recogniser=RUN2 shards={tar}"
    columns = COLUMNS | MORE_COLUMNS
    about_types = {name: kind for name, kind in ShardCodes.about_types.items() if name != "max_seconds"} | {"made": str}

    def __init__(self, about: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> None:
        super().__init__(about, columns)
        self._chosen, self._logprobs, self._errors, self._recorded = (columns[name] for name in MORE_COLUMNS)

    def pair(self, row: int) -> Pair | None:
        """That of sample `row`, None where it has none. Raises BadSample where its codes have changed."""
        codes_GF = self.codes(row)
        if codes_GF is None:
            return None
        chosen_GF, rejected_GF = codes_GF.tensor_split([int(self._chosen[row])], dim=1)
        logprobs_22 = torch.from_numpy(self._logprobs[4 * row : 4 * row + 4].copy()).view(2, 2)
        better, worse = self._errors[2 * row : 2 * row + 2].tolist()
        return Pair(chosen_GF, rejected_GF, logprobs_22, (better, worse), bool(self._recorded[row]))

    @property
    def other(self) -> list[str]:
        """A line for each sample that is left out for another reason than that its candidates score alike."""
        return [line for line in self.about["left_out"] if not line.partition(": ")[2].startswith(ALIKE)]

    @classmethod
    def problem(cls, about: Any, columns: Mapping[str, np.ndarray]) -> str | None:
        """See ShardCodes."""
        if found := super().problem(about, columns):
            return found
        samples, frames = len(columns["sums"]), np.diff(columns["offsets"])
        chosen, logprobs, errors, recorded = (columns[name] for name in MORE_COLUMNS)
        if not (
            len(logprobs) == 4 * samples and len(errors) == 2 * samples and len(chosen) == len(recorded) == samples
        ):
            return "its columns differ in length"
        if ((chosen < 1) & (frames > 0)).any() or (chosen > frames).any():
            return "chosen sequences make no sense"
        return None if np.isfinite(logprobs).all() else "a log-probability is not finite"


class PairsWriter(RowsWriter):
    """Writes the pairs of a shard."""

    def __init__(self, index: ShardIndex, codec: Codec, made: Mapping[str, Any], replace: bool = False) -> None:
        """`made` is all that decides the pairs besides codec and shard. See RowsWriter."""
        super().__init__(index, about_pairs(index, codec, made), ShardPairs, replace)

    def add(self, row: int, pair: Pair, speaker: str) -> None:
        """The pair of sample `row`. Raises BadSample where the chosen sequence is empty or the reference not finite."""
        chosen, rejected = self._checked(pair.chosen_GF), self._checked(pair.rejected_GF)
        if not chosen:
            raise BadSample("its best candidate has no frames")
        if not pair.logprobs_22.isfinite().all():
            raise BadSample("the Talker gives a candidate no probability")
        head = {"row": row, "speaker": speaker, "chosen": pair.chosen_GF.shape[1], "recorded": int(pair.recorded)}
        head |= {"logprobs": pair.logprobs_22.flatten().tolist(), "errors": list(pair.errors)}
        self._append(head, chosen + rejected)

    def _more_columns(self, heads: Mapping[int, Mapping[str, Any]]) -> dict[str, np.ndarray]:
        columns = {}
        for name, dtype in MORE_COLUMNS.items():
            width = {"logprobs": 4, "errors": 2}.get(name, 1)
            column = np.zeros((self._index.num_samples, width), dtype)
            for row, head in heads.items():
                column[row] = head[name]
            columns[name] = column.reshape(-1)
        return columns


def about_pairs(index: ShardIndex, codec: Codec, made: Mapping[str, Any]) -> dict[str, Any]:
    """What pairs of this shard say of themselves, but for speakers and what is left out."""
    about = about_codes(index, codec, 0.0) | {"format": FORMAT, "made": json.dumps(made, sort_keys=True)}
    return {name: value for name, value in about.items() if name != "max_seconds"}


def has_pairs(index: ShardIndex, codec: Codec, made: Mapping[str, Any]) -> bool:
    """Whether a shard has these pairs already. Raises DataError where it has others, naming what differs."""
    path = ShardPairs.location(index.tar)
    if not Path(path).exists():
        return False
    before = json.loads(ShardPairs.open(index.tar, index, codec.identity).about["made"])
    for name, value in made.items():
        if before.get(name) != value:
            raise DataError(
                f"{path}: made with {name}={before.get(name)}, asked for is {name}={value}; replace=true makes it anew"
            )
    return True


def counts(found: Sequence[ShardPairs]) -> dict[str, int | float]:
    """Of several shards: pairs, recorded ones among them, samples left out as alike and for other reasons, mean word
    error rates of chosen and rejected."""
    pairs = [pairs.pair(row) for pairs in found for row in np.flatnonzero(pairs.frames(slice(None))).tolist()]
    here = [pair for pair in pairs if pair is not None]
    other = sum(len(pairs.other) for pairs in found)
    means = [sum(pair.errors[place] for pair in here) / max(1, len(here)) for place in (0, 1)]
    return {
        "pairs": len(here),
        "recorded": sum(pair.recorded for pair in here),
        "alike": sum(len(pairs.about["left_out"]) for pairs in found) - other,
        "other": other,
        "chosen_wer": means[0],
        "rejected_wer": means[1],
    }
