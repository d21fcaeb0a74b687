"""Evaluation sets asked by their suites: the same code inside training and in `python -m launch.evaluate`.

    eval shards -> prompts, in the order of a hash -> those that the suite can grade, packed into batches by length
                -> each rank asks its share of the batches: generate, choose or read (train/suites/__init__.py)
                -> numbers summed over ranks -> Answered -> Report: counts and metrics of each language, source, ...

The batches do not depend on the ranks that they are dealt to, so neither does the result. Of documents beside questions
the cross-entropy is taken too, nats a token.
Cost: one decode of each sample's media; one forward of the prompts of a batch, then one step of all of them a token.

Letters: N samples, K numbers of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from data.errors import BadSample, DataError
from data.hashing import permutation
from data.prompts import Prompt, PromptSet
from data.tokenizer import Tokenizer
from data.types import Batch
from train import ranks
from train.config import EvalConfig
from train.engines import Shard
from train.evaluation_report import Report, make_report
from train.suites import CHOOSE, GENERATE, READ, Answered, Suite
from train.suites.registry import metrics_of, suite_of

ANSWER_END = "<|im_end|>"
TRIED = 16  # samples of a set that are looked at before training
LINE = 512  # bytes of a reason on its way between ranks

Found = Mapping[int, list[float]]  # what the model found, by sample


class Asked(Protocol):
    """A model as an evaluation sees it: any train.engines.Engine, or launch/folder_engine.py."""

    @property
    def shard(self) -> Shard:
        """Which of the batches this rank takes."""
        ...

    def generate(self, batch: Batch, max_new_tokens: int, stop_id: int) -> list[list[int]]:
        """Greedy continuation of every document of a batch of prompts. Collective."""
        ...

    def losses(self, batch: Batch) -> list[float]:
        """Cross-entropy of each document's targets, summed, nats. Collective."""
        ...

    def likelihoods(self, batch: Batch, choices: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Log-probability of each document's choices as its continuation, summed over tokens, nats. Collective."""
        ...


@dataclass(frozen=True)
class Evaluator:
    """Asks the recipe's sets."""

    config: EvalConfig
    sets: dict[str, PromptSet]
    tokenizer: Tokenizer

    def check(self) -> None:
        """Raise DataError for a set that has nothing to ask, as far as a few samples show it."""
        for name, prompts in self.sets.items():
            suite = suite_of(self.config, name)
            asked, refused = _askable(suite, prompts, self._chosen(suite, name, prompts)[:TRIED])
            if not asked:
                raise DataError(nothing_to_ask(name, suite, [*refused.values()]))

    def metrics(self, name: str) -> dict[str, bool]:
        """Metrics that a set has, and whether higher is better."""
        known = metrics_of(self.config, name)
        if suite_of(self.config, name).ASKS == GENERATE and not len(self.sets[name].documents):
            known.pop("loss")
        return known

    def reports(self, engine: Asked, step: int) -> Iterator[Report]:
        """One report a set. Collective."""
        for name, prompts in self.sets.items():
            yield self._report(engine, name, prompts, step)

    def _chosen(self, suite: Suite, name: str, prompts: PromptSet) -> list[int]:
        pool = {GENERATE: prompts.samples, CHOOSE: prompts.all, READ: prompts.documents}[suite.ASKS]
        if not len(pool):
            kind = "documents" if suite.ASKS == READ else "conversations"
            raise DataError(f"eval set {name}: its shards have no {kind}, which suite={suite.NAME} asks about")
        return pool[some_of(len(pool), self.config.max_samples)].tolist()

    def _report(self, engine: Asked, name: str, prompts: PromptSet, step: int) -> Report:
        suite = suite_of(self.config, name)
        chosen = self._chosen(suite, name, prompts)
        asked, refused = _askable(suite, prompts, chosen)
        ask = {GENERATE: self._generated, CHOOSE: self._likelihoods, READ: self._read}[suite.ASKS]
        answers, unread = ask(engine, prompts, asked)
        skipped = [line for _, line in sorted({**refused, **unread}.items())]
        loss, targets = self._loss(engine, prompts) if suite.ASKS == GENERATE else (None, 0)
        return make_report(name, suite, step, answers, skipped, loss, targets)

    def _generated(self, engine: Asked, prompts: PromptSet, asked: Mapping[int, Prompt]) -> Result:
        most, stop = self.config.max_new_tokens, self.tokenizer.id(ANSWER_END)

        def ask(batch: Batch, read: Sequence[int]) -> list[list[float]]:
            return [[token + 1.0 for token in ids] for ids in engine.generate(batch, most, stop)]

        found, unread = self._collect(engine, prompts, [*asked], most, ask)
        texts = {
            sample: self.tokenizer.decode([int(value) - 1 for value in values if value]).strip()
            for sample, values in found.items()
        }
        return [Answered(asked[sample], text) for sample, text in texts.items()], unread

    def _likelihoods(self, engine: Asked, prompts: PromptSet, asked: Mapping[int, Prompt]) -> Result:
        ids = {s: [self.tokenizer.encode(choice) for choice in prompt.grading.choices] for s, prompt in asked.items()}

        def ask(batch: Batch, read: Sequence[int]) -> list[list[float]]:
            return engine.likelihoods(batch, [ids[sample] for sample in read])

        found, unread = self._collect(engine, prompts, [*asked], max(map(len, ids.values()), default=1), ask)
        answers = []
        for sample, values in found.items():
            choices = asked[sample].grading.choices
            logprobs = tuple(values[: len(choices)])
            answers.append(Answered(asked[sample], choices[logprobs.index(max(logprobs))], logprobs))
        return answers, unread

    def _read(self, engine: Asked, prompts: PromptSet, asked: Mapping[int, Prompt]) -> Result:
        found, unread = self._losses(engine, prompts, [*asked])
        return [Answered(asked[s], nats=nats, targets=int(targets)) for s, (nats, targets) in found.items()], unread

    def _losses(self, engine: Asked, prompts: PromptSet, samples: Sequence[int]) -> tuple[Found, dict[int, str]]:
        def ask(batch: Batch, read: Sequence[int]) -> list[list[float]]:
            labels = batch.labels_T.split(list(batch.doc_lengths)) if batch.doc_lengths else ()
            targets = [int((labels_S >= 0).sum()) for labels_S in labels]
            return [[nats, count] for nats, count in zip(engine.losses(batch), targets, strict=True)]

        return self._collect(engine, prompts, samples, 2, ask, whole=True)

    def _loss(self, engine: Asked, prompts: PromptSet) -> tuple[float | None, int]:
        """Cross-entropy of a set's documents in nats a token, and over how many tokens."""
        if not len(prompts.documents):
            return None, 0
        chosen = prompts.documents[some_of(len(prompts.documents), self.config.max_samples)].tolist()
        found, _ = self._losses(engine, prompts, chosen)
        nats, targets = (sum(values[k] for values in found.values()) for k in (0, 1))
        return nats / max(1.0, targets), int(targets)

    def _collect(
        self,
        engine: Asked,
        prompts: PromptSet,
        samples: Sequence[int],
        width: int,
        ask: Callable[[Batch, Sequence[int]], list[list[float]]],
        whole: bool = False,
    ) -> tuple[Found, dict[int, str]]:
        """At most `width` numbers of each sample that could be read, and why others could not. Collective.

        Summed over ranks: each fills in its own rows.
        """
        places = {sample: place for place, sample in enumerate(samples)}
        rows_NK = torch.zeros(len(samples), width + 1, dtype=torch.float64)  # the last: how often it was read
        unread: dict[int, str] = {}
        for group in dealt(prompts.groups(samples, self.config.batch_tokens), engine.shard):
            batch, read = prompts.load(group, whole=whole)
            found = ask(batch, read)
            if not engine.shard.leads:
                continue
            lost = [sample for sample in group if sample not in set(read)]
            unread |= dict(zip(lost, batch.skipped, strict=True))
            for sample, values in zip(read, found, strict=True):
                rows_NK[places[sample], : len(values)] = torch.tensor(values, dtype=torch.float64)
                rows_NK[places[sample], width] = 1
        rows = ranks.total(rows_NK).tolist()
        found = {sample: rows[place][:width] for sample, place in places.items() if rows[place][width]}
        return found, _gathered(unread)


Result = tuple[list[Answered], dict[int, str]]


def nothing_to_ask(name: str, suite: Suite, reasons: Sequence[str]) -> str:
    """A line on a set of which no sample can be used."""
    first = f"; the first: {reasons[0]}" if reasons else ""
    return f"eval set {name}: none of its samples can be asked by suite={suite.NAME}{first}"


def dealt(groups: Sequence[list[int]], shard: Shard) -> Iterator[list[int]]:
    """A rank's groups, as many for each rank, empty ones at the end: engines count on all ranks taking part."""
    for turn in range(math.ceil(len(groups) / shard.count)):
        at = turn * shard.count + shard.index
        yield groups[at] if at < len(groups) else []


def some_of(count: int, most: int) -> list[int]:
    """At most `most` of range(count): always the same random ones; a stride could meet one language only."""
    if not most or most >= count:
        return list(range(count))
    return sorted(permutation(count, 0)[:most].tolist())


def _askable(suite: Suite, prompts: PromptSet, samples: Sequence[int]) -> tuple[dict[int, Prompt], dict[int, str]]:
    """What is known of the samples that the suite can grade, and why it cannot grade the others."""
    asked, refused = {}, {}
    for sample in samples:
        try:
            prompt = prompts.prompt(sample)
            reason = suite.refusal(prompt)
        except BadSample as error:
            reason = error.reason
        if reason:
            refused[sample] = f"{prompts.name(sample)}: {reason}"
        else:
            asked[sample] = prompt
    return asked, refused


def _gathered(lines: Mapping[int, str]) -> dict[int, str]:
    """The lines of all ranks, by sample. Collective."""
    rows = torch.zeros(len(lines), LINE + 2, dtype=torch.int64)
    for row, (sample, line) in zip(rows, lines.items(), strict=True):
        payload = line.encode()[:LINE]
        row[0], row[1] = sample, len(payload)
        row[2 : 2 + len(payload)] = torch.tensor(list(payload))
    found = [row for part in ranks.gather(rows) for row in part.tolist()]
    return {row[0]: bytes(row[2 : 2 + row[1]]).decode(errors="ignore") for row in found}
