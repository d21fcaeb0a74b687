"""Word error rate of greedy answers, the same code inside training and in `python -m launch.evaluate`.

    eval shards -> prompts (everything before the assistant's answer), packed into batches
                -> each rank answers its share of the batches -> token ids, summed over ranks -> text
                -> jiwer -> Report: one row a language, one for all

Text is compared in lower case without punctuation; Chinese and Japanese characters count as words of their own, so that
their rate is the character error rate, as is usual.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jiwer
import torch

from data.errors import BadSample
from data.hashing import permutation
from data.prompts import Prompt, PromptSet
from data.tokenizer import Tokenizer
from train import ranks
from train.engines import Engine
from train.recipe import EvalConfig

ANSWER_END = "<|im_end|>"


@dataclass(frozen=True)
class Row:
    """Word errors of one language, or of all."""

    language: str
    num_samples: int
    num_words: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def wer(self) -> float:
        """Errors per reference word."""
        return (self.substitutions + self.deletions + self.insertions) / max(1, self.num_words)


@dataclass(frozen=True)
class Report:
    """The result on one set."""

    set_name: str
    step: int
    rows: tuple[Row, ...]  # languages, then "all"
    examples: tuple[dict[str, str], ...]  # key, language, reference, answer
    skipped: tuple[str, ...]  # samples that could not be read, or have no answer to compare with
    num_documents: int = 0  # of the set, which ask nothing

    @property
    def wer(self) -> float:
        """Over all languages."""
        return self.rows[-1].wer

    @property
    def num_words(self) -> int:
        """Reference words over all languages."""
        return self.rows[-1].num_words

    def table(self) -> str:
        """For people."""
        lines = [f"{self.set_name} at step {self.step}: word error rate"]
        lines.append(f"  {'language':<10}{'WER':>8}{'words':>8}{'sub':>6}{'del':>6}{'ins':>6}{'samples':>9}")
        for row in self.rows:
            lines.append(
                f"  {row.language:<10}{row.wer:>8.1%}{row.num_words:>8}{row.substitutions:>6}{row.deletions:>6}"
                f"{row.insertions:>6}{row.num_samples:>9}"
            )
        if self.skipped:
            lines.append(f"  {len(self.skipped)} samples could not be used, first: {self.skipped[0]}")
        if self.num_documents:
            lines.append(f"  {self.num_documents} samples are documents, which ask nothing")
        return "\n".join(lines)

    def write(self, folder: Path, step: int) -> Path:
        """As JSON with every answer; published whole."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.set_name}-step{step:08d}.json"
        rows = [{**row.__dict__, "wer": row.wer} for row in self.rows]
        body = {"set": self.set_name, "step": step, "wer": self.wer, "rows": rows}
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
        for turn in range(math.ceil(len(groups) / engine.shard.count)):
            at = turn * engine.shard.count + engine.shard.index
            batch, rows = prompts.load(groups[at] if at < len(groups) else [])
            skipped += batch.skipped
            outputs = engine.generate(batch, self.config.max_new_tokens, self.tokenizer.id(ANSWER_END))
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
        return Report(name, step, error_rows(pairs), _examples(pairs), tuple(skipped), prompts.num_documents)


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
    """Word errors of answers: a row for each language, then one for all."""
    languages = sorted({prompt.language for prompt, _ in pairs})
    rows = [_row(name, [pair for pair in pairs if pair[0].language == name]) for name in languages]
    return (*rows, _row("all", pairs))


def _row(language: str, pairs: Sequence[tuple[Prompt, str]]) -> Row:
    substitutions = deletions = insertions = words = 0
    for prompt, answer in pairs:
        reference, hypothesis = normalise(prompt.reference), normalise(answer)
        if not reference:  # nothing was said: every word of the answer is inserted
            insertions += len(hypothesis.split())
            continue
        result = jiwer.process_words(reference, hypothesis)
        words += len(reference.split())
        substitutions += result.substitutions
        deletions += result.deletions
        insertions += result.insertions
    return Row(language, len(pairs), words, substitutions, deletions, insertions)


def _examples(pairs: Sequence[tuple[Prompt, str]]) -> tuple[dict[str, str], ...]:
    return tuple(
        {"key": p.key, "language": p.language, "reference": p.reference, "answer": answer} for p, answer in pairs
    )
