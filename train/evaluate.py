"""Word error rate of greedy answers, the same code inside training and in `python -m launch.evaluate`.

    eval shards -> prompts (everything before the assistant's answer), packed into batches
                -> each rank answers its share of the batches -> token ids, summed over ranks -> text
                -> jiwer -> Report: word error rate and share of right answers of each language, of each source, of all

Documents ask nothing: of them the cross-entropy is taken, nats a token.
Text is compared in lower case without punctuation; Chinese and Japanese characters count as words of their own, so that
their rate is the character error rate, as is usual.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jiwer
import torch

from data.errors import BadSample
from data.hashing import permutation
from data.prompts import Prompt, PromptSet
from data.tokenizer import Tokenizer
from train import ranks
from train.config import EvalConfig
from train.engines import Engine, Shard

ANSWER_END = "<|im_end|>"


@dataclass(frozen=True)
class Row:
    """Word errors and right answers of one language, of one source, or of all."""

    group: str
    num_samples: int
    num_right: int  # answers that are the reference, compared as words are
    num_words: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def wer(self) -> float:
        """Errors per reference word."""
        return (self.substitutions + self.deletions + self.insertions) / max(1, self.num_words)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_right / max(1, self.num_samples)


@dataclass(frozen=True)
class Report:
    """The result on one set."""

    set_name: str
    step: int
    rows: tuple[Row, ...]  # languages, then "all"
    sources: tuple[Row, ...]
    examples: tuple[dict[str, str], ...]  # key, language, source, reference, answer
    skipped: tuple[str, ...]  # samples that could not be read, or have no answer to compare with
    loss: float | None = None  # of the documents in the set, nats a token; None where there are none
    num_targets: int = 0  # tokens that it is the mean of

    @property
    def wer(self) -> float:
        """Over all languages."""
        return self.rows[-1].wer

    @property
    def num_words(self) -> int:
        """Reference words over all languages."""
        return self.rows[-1].num_words

    @property
    def metrics(self) -> dict[str, float]:
        """What metrics.jsonl and a choice by metric (`SET.METRIC`) know of it."""
        found = {"wer": self.wer, "words": self.num_words, "accuracy": self.rows[-1].accuracy}
        return found if self.loss is None else found | {"loss": self.loss, "targets": self.num_targets}

    def table(self) -> str:
        """For people."""
        lines = [f"{self.set_name} at step {self.step}: word error rate, answers that are right word by word"]
        tables = {"language": self.rows, "source": self.sources if len(self.sources) > 1 else ()}
        for title, rows in tables.items():
            if rows:
                lines.append(
                    f"  {title:<22}{'WER':>8}{'right':>8}{'samples':>9}{'words':>8}{'sub':>6}{'del':>6}{'ins':>6}"
                )
            lines += [
                f"  {row.group:<22}{row.wer:>8.1%}{row.accuracy:>8.1%}{row.num_samples:>9}{row.num_words:>8}"
                f"{row.substitutions:>6}{row.deletions:>6}{row.insertions:>6}"
                for row in rows
            ]
        if self.skipped:
            lines.append(f"  {len(self.skipped)} samples could not be used, first: {self.skipped[0]}")
        if self.loss is not None:
            lines.append(f"  documents: {self.loss:.4f} nats a token, over {self.num_targets:,} tokens")
        return "\n".join(lines)

    def write(self, folder: Path, step: int) -> Path:
        """As JSON with every answer; published whole."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.set_name}-step{step:08d}.json"
        body: dict[str, Any] = {"set": self.set_name, "step": step, "wer": self.wer}
        body |= {"loss": self.loss, "targets": self.num_targets}
        for name, rows in (("rows", self.rows), ("sources", self.sources)):
            body[name] = [{**asdict(row), "wer": row.wer, "accuracy": row.accuracy} for row in rows]
        body |= {"skipped": list(self.skipped), "examples": list(self.examples)}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(body, ensure_ascii=False, indent=1) + "\n")
        os.replace(temporary, path)
        return path


@dataclass(frozen=True)
class Evaluator:
    """Runs the `asr` suite over the recipe's sets."""

    config: EvalConfig
    sets: dict[str, PromptSet]
    tokenizer: Tokenizer

    def reports(self, engine: Engine, step: int) -> Iterator[Report]:
        """One report a set. Collective."""
        for name, prompts in self.sets.items():
            yield self._report(engine, name, prompts, step)

    def _report(self, engine: Engine, name: str, prompts: PromptSet, step: int) -> Report:
        chosen = prompts.samples[some_of(len(prompts.samples), self.config.max_samples)].tolist()
        groups = prompts.groups(chosen, self.config.batch_tokens)
        # summed over ranks: each fills its own rows with token ids, plus one
        mine = torch.zeros(len(chosen), self.config.max_new_tokens, dtype=torch.float64)
        skipped: list[str] = []
        read = torch.zeros(len(chosen), dtype=torch.float64)
        for group in dealt(groups, engine.shard):
            batch, rows = prompts.load(group)
            outputs = engine.generate(batch, self.config.max_new_tokens, self.tokenizer.id(ANSWER_END))
            if not engine.shard.leads:
                continue
            skipped += batch.skipped
            for row, ids in zip(rows, outputs, strict=True):
                place = chosen.index(row)
                read[place] = 1
                mine[place, : len(ids)] = torch.tensor(ids, dtype=torch.float64) + 1
        answers, read = ranks.total(mine).long() - 1, ranks.total(read)
        pairs = []
        for sample, ids, ok in zip(chosen, answers.tolist(), read.tolist(), strict=True):
            try:
                if ok:
                    text = self.tokenizer.decode([i for i in ids if i >= 0]).strip()
                    pairs.append((prompts.prompt(sample), text))
            except BadSample as error:
                skipped.append(f"{prompts.reader.corpus.name(sample)}: {error.reason}")
        rows, sources = error_rows(pairs), grouped_rows(pairs, lambda prompt: prompt.source or "unknown")
        loss, targets = self._loss(engine, prompts)
        return Report(name, step, rows, sources, _examples(pairs), tuple(skipped), loss, targets)

    def _loss(self, engine: Engine, prompts: PromptSet) -> tuple[float | None, int]:
        """Cross-entropy of a set's documents in nats a token, and over how many tokens."""
        if not len(prompts.documents):
            return None, 0
        chosen = prompts.documents[some_of(len(prompts.documents), self.config.max_samples)].tolist()
        groups = prompts.groups(chosen, self.config.batch_tokens)
        sums = torch.zeros(2, dtype=torch.float64)
        for group in dealt(groups, engine.shard):
            found = engine.eval_step(prompts.whole(group))
            if engine.shard.leads:
                sums += torch.tensor([found["loss_sum"], found["targets"]], dtype=torch.float64)
        loss, targets = ranks.total(sums).tolist()
        return loss / max(1.0, targets), int(targets)


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


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces, CJK characters apart."""
    out = []
    for char in unicodedata.normalize("NFKC", text).lower():
        if unicodedata.category(char)[0] in "PS":
            out.append(" " if char != "'" else "")
        elif unicodedata.east_asian_width(char) in "WF":
            out.append(f" {char} ")
        else:
            out.append(char)
    return " ".join("".join(out).split())


def error_rows(pairs: Sequence[tuple[Prompt, str]]) -> tuple[Row, ...]:
    """Errors of answers: a row for each language, then one for all."""
    return (*grouped_rows(pairs, lambda prompt: prompt.language), _row("all", pairs))


def grouped_rows(pairs: Sequence[tuple[Prompt, str]], group: Callable[[Prompt], str]) -> tuple[Row, ...]:
    """Errors of answers: a row for each group of questions, in the order of their names."""
    groups: dict[str, list[tuple[Prompt, str]]] = {}
    for pair in pairs:
        groups.setdefault(group(pair[0]), []).append(pair)
    return tuple(_row(name, groups[name]) for name in sorted(groups))


def _row(group: str, pairs: Sequence[tuple[Prompt, str]]) -> Row:
    substitutions = deletions = insertions = words = right = 0
    for prompt, answer in pairs:
        reference, hypothesis = normalise(prompt.reference), normalise(answer)
        right += reference == hypothesis
        if not reference:  # nothing was said: every word of the answer is inserted
            insertions += len(hypothesis.split())
            continue
        result = jiwer.process_words(reference, hypothesis)
        words += len(reference.split())
        substitutions += result.substitutions
        deletions += result.deletions
        insertions += result.insertions
    return Row(group, len(pairs), right, words, substitutions, deletions, insertions)


def _examples(pairs: Sequence[tuple[Prompt, str]]) -> tuple[dict[str, str], ...]:
    return tuple(
        {"key": p.key, "language": p.language, "source": p.source, "reference": p.reference, "answer": answer}
        for p, answer in pairs
    )
