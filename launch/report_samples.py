"""The newest evaluations as tables, and what the model said: text answers, sounds to play, pictures of spectrograms.

    RUN/eval/SET-stepN.json, SUITE-stepN/report.json --newest of each--> tables of every list of rows in them
                                                     --examples-------> the worst and some random answers
    RUN/eval/SUITE-stepN/*-{speech,codec,recording}.wav, *.png -------> players and pictures, within the page's limits

Evaluations are read by their shape, not by their suite: rows are lists of small dictionaries, examples have a
reference and an answer. Media over the limits are named, not embedded. Cost: an edit distance an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import jiwer

from data.hashing import permutation
from data.page import media_type
from data.report import human_bytes
from launch.report_html import figure, percent, table, text, uri
from launch.report_metrics import number_of
from launch.report_read import Run, Stage, dictionary, read_json
from train.word_errors import normalise

MEDIA_BYTES = 4 << 20  # of the page; base64 makes a third more of it
MEDIUM_BYTES = 2 << 20  # of one file
NUM_SHOWN = 6  # answers of each kind
MAX_SCORED = 3000  # answers of a set that are compared
MAX_ROWS, MAX_TABLES, MAX_LETTERS = 60, 12, 600
_NAME = re.compile(r"(.+)-step(\d{8,15})(\.json)?")
_SOUND = re.compile(r"(.+)-([a-z]+)\.wav")
_RATES = ("wer", "cer", "accuracy", "code_accuracy", "nearest", "share", "rate")
_SUBJECTS = {"rows": "language", "sources": "source"}  # what the groups of usual tables are


@dataclass(frozen=True)
class Evaluation:
    """What one suite found on one set at one step."""

    name: str
    step: int
    body: dict[str, Any]
    folder: Path | None  # of sounds and pictures

    @property
    def examples(self) -> list[dict[str, Any]]:
        """Answers of any kind."""
        found = self.body.get("examples")
        return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name}, step {self.step:,}"


@dataclass
class Budget:
    """Bytes of media that may still be embedded."""

    left: int = MEDIA_BYTES
    num_embedded: int = 0
    num_left_out: int = 0

    def takes(self, size: int) -> bool:
        """Whether so many bytes may be embedded; they count then."""
        if size > min(self.left, MEDIUM_BYTES):
            self.num_left_out += 1
            return False
        self.left -= size
        self.num_embedded += 1
        return True


def newest(stage: Stage, notes: list[str]) -> list[Evaluation]:
    """The last evaluation of each set of a stage."""
    last: dict[tuple[str, bool], tuple[int, Path]] = {}
    folder = stage.folder / "eval"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        if match and (path.is_dir() or match[3]):
            last[match[1], path.is_dir()] = (int(match[2]), path)  # names sort by step
    found = []
    for (name, is_folder), (step, path) in last.items():
        if not is_folder:
            found.append(Evaluation(name, step, dictionary(read_json(path, notes)), None))
        elif (path / "report.json").is_file():
            body = dictionary(read_json(path / "report.json", notes))
            sets = body.get("sets")
            for each in sets if isinstance(sets, list) else [body]:
                each = dictionary(each)
                found.append(Evaluation(f"{name}: {each['set']}" if "set" in each else name, step, each, path))
    return [each for each in found if each.body]


def tables(evaluations: Sequence[Evaluation], prefix: str = "") -> str:
    """Every table in the evaluations."""
    out = ""
    for each in evaluations:
        found = [_rows(name, rows) for name, rows in _tables(each.body)][:MAX_TABLES]
        skipped = each.body.get("skipped")
        left = skipped if isinstance(skipped, list) else []
        said = f"<p class=note>{len(left):,} samples could not be used, first: {text(left[0])}</p>" if left else ""
        if found:
            out += f"<h3>{text(prefix + each.title)}</h3><div class=side-by-side>{''.join(found)}</div>{said}"
    return out


def _tables(body: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Title and rows of whatever in an evaluation has the shape of a table."""
    columns = {
        name: value
        for name, value in body.items()
        if isinstance(value, list) and value and all(number_of(v) is not None for v in value)
    }
    for name, value in body.items():
        if (
            isinstance(value, list)
            and value
            and all(isinstance(row, dict) for row in value)
            and name not in ("examples", "skipped")
        ):
            yield name, value
        elif isinstance(value, dict) and value and all(isinstance(inner, list) for inner in value.values()):
            rows = [{"of": kind, **row} for kind, inner in value.items() for row in inner if isinstance(row, dict)]
            if rows:
                yield name, rows
        elif isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()):
            yield name, [{"of": kind, **inner} for kind, inner in value.items()]
        elif (
            name != "wer"
            and isinstance(value, dict)
            and value
            and all(number_of(v) is not None for v in value.values())
        ):
            yield name, [{"of": kind, name: inner} for kind, inner in value.items()]  # rows say the same of "wer"
    if columns:
        longest = max(map(len, columns.values()))
        alike = {name: value for name, value in columns.items() if len(value) == longest}
        yield (
            "codebooks" if "code_nll" in alike else "values",
            [{"of": place, **{name: value[place] for name, value in alike.items()}} for place in range(longest)],
        )


def _rows(name: str, rows: list[dict[str, Any]]) -> str:
    keys = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if any(not isinstance(row.get(key), dict | list) for row in rows)
    ]
    words = sum(1 for key in keys if any(isinstance(row.get(key), str) for row in rows))
    keys.sort(key=lambda key: not any(isinstance(row.get(key), str) for row in rows))  # words first; stable
    rates = {
        key
        for key in keys
        if any(rate == key or key.endswith("_" + rate) for rate in _RATES) or name in _RATES and key == name
    }
    shown = [[(percent if key in rates else figure)(row.get(key)) for key in keys] for row in rows[:MAX_ROWS]]
    title = f"by {_SUBJECTS[name]}" if name in _SUBJECTS else name.replace("_", " ")
    title += f" (the first {MAX_ROWS} of {len(rows):,})" if len(rows) > MAX_ROWS else ""
    heads = {"of": "", "group": _SUBJECTS.get(name, "group"), "wer": "WER", "cer": "CER"}
    header = [heads.get(key, key.removeprefix("num_").replace("_", " ")) for key in keys]
    return table(header, shown, words=max(1, words), name=title)


def answers(evaluations: Sequence[Evaluation], prefix: str = "") -> str:
    """Of each set the worst answers and some random ones, with their references."""
    out = ""
    for each in evaluations:
        examples = [example for example in each.examples if _is_answer(example)]
        if not examples or each.folder is not None:
            continue
        scored = [(_errors(example), place) for place, example in enumerate(examples[:MAX_SCORED])]
        worst = [place for errors, place in sorted(scored, key=lambda pair: (-pair[0], pair[1])) if errors > 0][
            :NUM_SHOWN
        ]
        rest = [place for place in permutation(len(examples), 0).tolist() if place not in worst][:NUM_SHOWN]
        right = sum(errors == 0 for errors, _ in scored) / len(scored)
        note = f"<p class=note>{len(examples):,} answers, {right:.0%} right word by word.</p>"
        out += f"<h3>{text(prefix + each.title)}</h3>{note}"
        found = []
        for title, places in (("worst", worst), ("random", rest)):
            if places:
                rows = [_answer(examples[place]) for place in places]
                found.append(table(["sample", "reference", "answer"], rows, words=3, name=title))
        out += f"<div class=side-by-side>{''.join(found)}</div>"
    return out


def _is_answer(example: dict[str, Any]) -> bool:
    return all(isinstance(example.get(key), str) for key in ("reference", "answer"))


def _errors(example: dict[str, str]) -> float:
    """Word errors over words of the reference, as the evaluation counts them."""
    reference, answer = (normalise(example[key][: 10 * MAX_LETTERS]) for key in ("reference", "answer"))
    if not reference:
        return float(bool(answer))
    return float(jiwer.wer(reference, answer))


def _answer(example: dict[str, str]) -> list[str]:
    """Key, reference and answer; words that the other has not are marked."""
    reference, answer = example["reference"], example["answer"]
    left, right = reference[:MAX_LETTERS].split(), answer[:MAX_LETTERS].split()
    spaced = len(left) > 1 or len(right) > 1 or reference.isascii()
    left, right = (left, right) if spaced else (list(reference[:MAX_LETTERS]), list(answer[:MAX_LETTERS]))
    parts: tuple[list[str], list[str]] = ([], [])
    for kind, a, b, c, d in SequenceMatcher(
        None, [w.lower() for w in left], [w.lower() for w in right], autojunk=False
    ).get_opcodes():
        for out, words in zip(parts, (left[a:b], right[c:d]), strict=True):
            if words:
                said = text((" " if spaced else "").join(words))
                out.append(said if kind == "equal" else f"<mark>{said}</mark>")
    joined = [(" " if spaced else "").join(part) for part in parts]
    cut = [" ..." * (len(example[key]) > MAX_LETTERS) for key in ("reference", "answer")]
    name = text(str(example.get("key", "")).rpartition(":")[2])
    return [f"<code>{name}</code>", joined[0] + cut[0], (joined[1] + cut[1]) or "<i>nothing</i>"]


def sounds(evaluations: Sequence[Evaluation], budget: Budget, prefix: str = "") -> str:
    """Players and spectrograms of the utterances that suites have kept."""
    out, folders = "", {each.folder: each for each in evaluations if each.folder is not None}
    for folder, first in folders.items():
        known = {_stem(each, ex): ex for each in evaluations if each.folder == folder for ex in each.examples}
        cards, kinds = [], {}
        for path in sorted(folder.glob("*.wav")):
            if match := _SOUND.fullmatch(path.name):
                kinds.setdefault(match[1], []).append((match[2], path))
        for stem, files in kinds.items():
            cards.append(_card(folder, stem, files, known.get(stem.rpartition("-")[0], {}), budget))
        if cards:
            title = f"{prefix}{first.name.partition(':')[0]}, step {first.step:,}"
            out += f"<h3>{text(title)}</h3><div class=cards>{''.join(cards)}</div>"
    return out


def _stem(evaluation: Evaluation, example: dict[str, Any]) -> str:
    """How launch.tts_report begins the names of an example's files."""
    key = str(example.get("key", "")).partition(":")[2]
    return re.sub(r"[^\w.-]+", "_", f"{evaluation.body.get('set', '')}-{key}", flags=re.ASCII)[:96]


def _card(folder: Path, stem: str, files: list[tuple[str, Path]], example: dict[str, Any], budget: Budget) -> str:
    heard = dictionary(example.get("heard"))
    order = ("speech", "codec", "recording")
    files.sort(key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order))
    rows = []
    for kind, path in files:
        said = f"<span class=heard>heard: {text(heard[kind]) or '<i>nothing</i>'}</span>" if kind in heard else ""
        player = _embedded(path, "audio", kind, budget)
        rows.append(f"<div class=sound><span class=kind-of>{text(kind)}</span>{player}{said}</div>")
    picture = folder / f"{stem}.png"
    shown = _embedded(picture, "image", f"spectrograms of {stem}", budget) if picture.is_file() else ""
    about = [str(example[key]) for key in ("speaker", "language") if example.get(key)]
    said = f"<p class=said>{text(example['text'])}</p>" if isinstance(example.get("text"), str) else ""
    return f"<article>{said}<p class=note>{text(', '.join([*about, stem]))}</p>{''.join(rows)}{shown}</article>"


def _embedded(path: Path, kind: str, label: str, budget: Budget) -> str:
    """A player or a picture; a name where it is over the limits or of a format that browsers do not play."""
    try:
        size = path.stat().st_size
        if not budget.takes(size):
            return f"<span class=note>{text(path.name)}, {human_bytes(size)}: not in the page</span>"
        payload = path.read_bytes()
    except OSError as error:
        return f"<span class=note>{text(path.name)}: {text(error.strerror)}</span>"
    mime, problem = media_type(payload, kind)
    if problem:
        return f"<span class=note>{text(path.name)}: {text(problem)}</span>"
    if kind == "audio":
        return f'<audio controls preload=metadata aria-label="{text(label)}" src="{uri(mime, payload)}"></audio>'
    return f'<img alt="{text(label)}" src="{uri(mime, payload)}">'


def of_all(runs: Sequence[Run], notes: list[str], budget: Budget) -> tuple[str, str, str]:
    """HTML of the last tables, of sounds, and of text answers of all runs."""
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for run in runs:
        for stage in run.stages:
            found = newest(stage, notes)
            names = [run.name] * (len(runs) > 1) + [stage.name] * (len(run.stages) > 1)
            prefix = "".join(f"{name}: " for name in names)
            parts[0].append(tables(found, prefix))
            parts[1].append(sounds(found, budget, prefix))
            parts[2].append(answers(found, prefix))
    return "".join(parts[0]), "".join(parts[1]), "".join(parts[2])
