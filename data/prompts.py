"""Samples as questions: everything before the last answer, and that answer as the reference; and documents whole.

    shards -> PromptSet -> groups of sample ids by length -> Reader.prompts -> Batch of prompts

Cost: one decode per sample and evaluation; references are read from the JSON members alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.chat import answer_text
from data.reader import Reader, open_sample
from data.types import Batch


@dataclass(frozen=True)
class Prompt:
    """What is known of a question besides its tokens."""

    key: str
    language: str
    reference: str  # text of the last assistant turn
    source: str = ""


class PromptSet:
    """The conversations of an evaluation set."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._corpus = reader.corpus
        forms = [self._corpus.index(shard).columns["document"] for shard in range(len(self._corpus.paths))]
        forms_N = np.concatenate(forms)
        self.samples = np.flatnonzero(forms_N == 0)  # int64: ids of conversations
        self.documents = np.flatnonzero(forms_N != 0)  # of what asks nothing

    def prompt(self, sample: int) -> Prompt:
        """What is known of a sample. Raises BadSample where it is damaged or ends without an answer."""
        record, _ = open_sample(self._corpus, sample, self.reader.limits.max_bytes)
        return Prompt(record.key, record.language or "unknown", answer_text(record), record.source)

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

    def load(self, samples: Sequence[int]) -> tuple[Batch, list[int]]:
        """The prompts of a group and which of its samples could be read."""
        return self.reader.prompts(samples)

    def whole(self, samples: Sequence[int]) -> Batch:
        """A group of documents, as training reads them."""
        return self.reader.prompts(samples, whole=True)[0]
