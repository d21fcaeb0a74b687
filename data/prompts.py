"""Samples as questions: everything before the last answer, and that answer as the reference; and documents whole.

    shards -> PromptSet -> groups of sample ids by length -> Reader.prompts -> Batch of prompts
                        -> Prompt: reference, grading, minutes, from the JSON member and the index alone

Cost: one decode per sample and evaluation; references are read from the JSON members alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.audio import SAMPLE_RATE
from data.chat import answer_text
from data.costs import KINDS, VIDEO
from data.grading import Grading
from data.reader import Reader
from data.sample import parse_sample
from data.types import Batch


@dataclass(frozen=True)
class Prompt:
    """What is known of a question besides its tokens."""

    key: str
    language: str
    reference: str  # text of the last assistant turn; "" where there is none
    source: str = ""
    grading: Grading = Grading()
    minutes: float = 0.0  # of sound and films together
    media: str = ""  # kinds of media, such as "audio" or "image+film"; "" for text alone
    num_bytes: int = 0  # of a document's text with loss, in UTF-8
    answered: bool = True  # whether the last turn is the assistant's, be it empty: of silence nothing is said

    @property
    def references(self) -> tuple[str, ...]:
        """Every accepted answer."""
        return self.grading.answers or ((self.reference,) if self.answered else ())


class PromptSet:
    """The conversations of an evaluation set."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._corpus = reader.corpus
        forms = [self._corpus.index(shard).columns["document"] for shard in range(len(self._corpus.paths))]
        forms_N = np.concatenate(forms)
        self.samples = np.flatnonzero(forms_N == 0)  # int64: ids of conversations
        self.documents = np.flatnonzero(forms_N != 0)  # of what asks nothing
        self.all = np.arange(len(forms_N))

    def prompt(self, sample: int) -> Prompt:
        """What is known of a sample. Raises BadSample where it is damaged."""
        shard, row = self._corpus.locate(sample)
        record = parse_sample(self.name(sample), self._corpus.index(shard).read_json(row))
        costs = self._corpus.costs(sample)
        seconds = float(costs.samples_M.sum()) / SAMPLE_RATE + float(costs.seconds_M[costs.kind_M == VIDEO].sum())
        kinds = "+".join(KINDS[kind] for kind in sorted(set(costs.kind_M.tolist())))
        answered = bool(record.messages) and record.messages[-1]["role"] == "assistant"
        learned = (part for part in record.segments if part["type"] == "text" and part.get("loss", True))
        return Prompt(
            record.key,
            record.language or "unknown",
            answer_text(record) if answered else "",
            record.source,
            record.grading or Grading(),
            seconds / 60,
            kinds,
            sum(len(part["text"].encode()) for part in learned),
            answered,
        )

    def name(self, sample: int) -> str:
        """ "shard.tar:key" of a sample."""
        return self._corpus.name(sample)

    def groups(self, samples: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Samples put together by length, shortest first, at most `max_tokens` prompt tokens in a group."""
        costs = {sample: self.reader.prompt_tokens(sample) for sample in samples}
        groups: list[list[int]] = []
        room = 0
        for sample in sorted(samples, key=lambda sample: (costs[sample], sample)):
            if not groups or costs[sample] > room:
                groups.append([])
                room = max_tokens
            groups[-1].append(sample)
            room -= costs[sample]
        return groups

    def load(self, samples: Sequence[int], *, whole: bool = False) -> tuple[Batch, list[int]]:
        """The prompts of a group, or documents `whole` as training reads them, and which samples could be read."""
        return self.reader.prompts(samples, whole=whole)
