"""Multiple choice in text: MMLU by the likelihood of the letters or by a letter that is generated, GPQA.

    dev questions of a subject, answered + the question --> document, choices " A" " B" " C" " D" --> likelihood
    question + lettered choices --> a letter --> qa

The document has the form of Hendrycks et al., "Measuring massive multitask language understanding", 2021, and of their
evaluation: a heading with the subject, five answered questions, the question, "Answer:".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from data.benchmark import (
    Question,
    Sources,
    TableRows,
    Wanted,
    by_letter,
    listed,
    multiple_choice,
    read_csv,
    tables,
    together,
)
from data.errors import BadSample
from data.grading import Grading, letter
from data.sources import Span

_COLUMNS = ("question", "A", "B", "C", "D", "answer")


def mmlu(wanted: Wanted, chat: bool = False) -> Sources:
    """SPLIT/SUBJECT_SPLIT.csv, perhaps in data/, or all/SPLIT-*.parquet; dev gives the answered questions."""
    found: Sources = {}
    for split in wanted.splits or ("test",):
        rows = _mmlu_rows(wanted, split)
        if not rows:
            continue
        if chat:
            found |= listed(split, wanted.folder, rows, _by_letter, wanted)
            continue
        shots: dict[str, list[Mapping[str, Any]]] = {}
        for row in _mmlu_rows(wanted, "dev") if wanted.shots else ():
            shots.setdefault(row["subject"], []).append(row)
        heads = {subject: _head(subject, shots.get(subject, []), wanted) for subject in {r["subject"] for r in rows}}
        found |= listed(split, wanted.folder, [{**row, "head": heads[row["subject"]]} for row in rows], _shown, wanted)
    return found


mmlu_chat = partial(mmlu, chat=True)


def _mmlu_rows(wanted: Wanted, split: str) -> list[dict[str, Any]]:
    """Rows of "subject", "question", "choices", "answer" (a place from 0) of all subjects."""
    rows = []
    for path in sorted((wanted.home("data") / split).glob(f"*_{split}.csv")):
        subject = path.stem.removesuffix(f"_{split}")
        for row in read_csv(path, names=_COLUMNS):
            choices = [row[name] for name in "ABCD"]
            rows.append({"subject": subject, "question": row["question"], "choices": choices, "answer": row["answer"]})
    if rows:
        return rows
    columns = ("question", "subject", "choices", "answer")
    files = sorted((wanted.folder / "all").glob(f"{split}-*.parquet"))
    for source in tables(wanted, files, split, columns, _by_letter).values():
        assert isinstance(source, TableRows)
        for _, table in source.tables:
            for span in table.spans(table.num_rows):
                rows += [{**row, "answer": letter(row["answer"])} for row in table.rows(Span(*span), columns)]
    return rows


def _head(subject: str, shots: Sequence[Mapping[str, Any]], wanted: Wanted) -> str:
    """What stands before a question of a subject."""
    about = subject.replace("_", " ")
    if len(shots) < wanted.shots:
        return ""  # told of each row
    heading = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return heading + "".join(f"{_body(shot)} {shot['answer']}\n\n" for shot in shots[: wanted.shots])


def _body(row: Mapping[str, Any]) -> str:
    shown = [f"{letter(place)}. {choice}" for place, choice in enumerate(row["choices"])]
    return "\n".join([row["question"], *shown, "Answer:"])


def _shown(row: Mapping[str, Any], wanted: Wanted) -> Question:
    """A document that ends where a letter is to follow."""
    if not row["head"]:
        raise BadSample(f"fewer than {wanted.shots} answered questions in dev: {row['subject']}; give --shots 0")
    choices = tuple(f" {letter(place)}" for place in range(len(row["choices"])))
    grading = Grading((), choices, by_letter(row["answer"], row["choices"]), group=row["subject"])
    return Question([row["head"] + _body(row)], "", row["subject"], grading, "en", document=True)


def _by_letter(row: Mapping[str, Any], wanted: Wanted) -> Question:
    correct = by_letter(row["answer"], row["choices"])
    about = {"name": row["subject"], "group": row["subject"], "language": "en"}
    return multiple_choice([row["question"]], row["choices"], correct, wanted, **about)


def gpqa(wanted: Wanted) -> Sources:
    """[dataset/]gpqa_SPLIT.csv of diamond, main or extended."""
    home = wanted.home("dataset")
    return together(
        listed(split, path, read_csv(path), _gpqa, wanted)
        for split in wanted.splits or ("diamond",)
        if (path := home / f"gpqa_{split}.csv").is_file()
    )


def _gpqa(row: Mapping[str, Any], wanted: Wanted) -> Question:
    """The order of the choices is that of their hashes, so that it says nothing and is always the same."""
    right = row["Correct Answer"].strip()
    choices = [right, *(row[f"Incorrect Answer {number}"].strip() for number in (1, 2, 3))]
    choices.sort(key=lambda text: hashlib.sha256(f"{row['Question']}\n{text}".encode()).digest())
    about = {"name": row.get("Record ID", ""), "group": row.get("High-level domain", ""), "language": "en"}
    return multiple_choice([row["Question"].strip()], choices, choices.index(right), wanted, **about)
