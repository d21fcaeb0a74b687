"""What the demo's model has learnt, as a table: from the evaluations of its runs, all on held-out data.

outputs/demo/sft/eval/{voices,sentences,scenes}-step*.json, outputs/demo/sft/eval/tts-step*/ --> text
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.prompts import Prompt
from train.word_errors import Row, grouped_rows

UNDERSTANDING, ANSWERS, SPEECH, CODEC = 0.10, 0.90, 0.20, 0.10  # the bars: error, accuracy, error, error
SOUNDS = {"speech": "Talker", "codec": "codec", "recording": "recording"}
SAID = {
    "picture_aloud": "answers about unseen pictures",
    "words_aloud": "words",
    "animals_aloud": "sentences never heard",
}
PAIRS = {
    "picture_told": "picture + text, told in sentences",
    "picture_text": "picture + text",
    "picture_voice": "picture + speech",
    "picture_aloud": "picture + speech, answer also spoken",
    "sound_text": "sound + text",
    "sound_voice": "sound + speech",
    "film_text": "film + text",
    "film_voice": "film + speech",
}


def report(thinker: Path, talker: Path) -> str:
    """The tables, and the paths of five wav files. Raises DataError where an evaluation is missing."""
    sets = {name: _pairs(_newest(thinker / "eval", f"{name}-step*.json")) for name in ("voices", "sentences", "scenes")}
    folder = _newest(talker / "eval", "tts-step*")
    spoken = json.loads((folder / "report.json").read_text(encoding="utf-8"))["sets"]
    return "\n".join([*_understanding(sets), *_answers(sets["scenes"]), *_speech(spoken), *_files(folder)])


def _understanding(sets: dict[str, list[tuple[Prompt, str]]]) -> list[str]:
    lines = ["understanding: word error rate of transcription"]
    columns = {
        f"unheard {name}": _by(lambda prompt: prompt.language, _of(sets[name], "transcription"))
        for name in ("voices", "sentences")
    }
    lines.append(f"  {'language':<12}" + "".join(f"{name:>20}" for name in columns))
    for language in [*next(iter(columns.values()))]:
        lines.append(f"  {language:<12}" + "".join(f"{rows[language].wer:>20.1%}" for rows in columns.values()))
    worst = max(row.wer for rows in columns.values() for row in rows.values())
    return [*lines, _bar("worst", worst, UNDERSTANDING, worst < UNDERSTANDING, "below")]


def _answers(pairs: list[tuple[Prompt, str]]) -> list[str]:
    lines = ["answers: share that is right word by word, unseen pictures, sounds and films"]
    rows = _by(lambda prompt: prompt.source, pairs)
    for source, title in PAIRS.items():
        if source in rows:
            lines.append(f"  {title:<38}{rows[source].accuracy:>8.1%}{rows[source].num_samples:>7} questions")
    worst = min(rows[source].accuracy for source in PAIRS if source in rows)
    return [*lines, _bar("worst", worst, ANSWERS, worst > ANSWERS, "above")]


def _speech(spoken: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["speech: word error rate as the Thinker hears it, which has not heard the Talker"]
    lines.append(f"  {'what is said':<30}{'language':<10}" + "".join(f"{title:>11}" for title in SOUNDS.values()))
    examples = [example for found in spoken for example in found["examples"]]
    worst = dict.fromkeys(SOUNDS, 0.0)
    for source, title in SAID.items():
        chosen = [example for example in examples if f"-{source}-" in example["key"]]
        rows = {kind: _heard(chosen, kind) for kind in SOUNDS}
        for language in rows["speech"]:
            rates = {kind: rows[kind][language].wer for kind in SOUNDS}
            lines.append(f"  {title:<30}{language:<10}" + "".join(f"{rate:>11.1%}" for rate in rates.values()))
            worst = {kind: max(worst[kind], rate) for kind, rate in rates.items()}
    lines.append(_bar("worst", worst["speech"], SPEECH, worst["speech"] < SPEECH, "below"))
    return [*lines, _bar("the codec's worst", worst["codec"], CODEC, worst["codec"] < CODEC, "below")]


def _heard(examples: Sequence[dict[str, Any]], kind: str) -> dict[str, Row]:
    pairs = [(Prompt(e["key"], e["language"], e["text"]), e["heard"][kind]) for e in examples]
    return _by(lambda prompt: prompt.language, pairs)


def _files(folder: Path) -> list[str]:
    """Five utterances of the Talker, of as many languages as there are."""
    by_language: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*-speech.wav")):
        by_language.setdefault(path.name.split("-")[3], []).append(path)
    turns = [path for group in _in_turn(list(by_language.values())) for path in group]
    return ["the Talker's voice:", *(f"  {path}" for path in turns[:5])]


def _in_turn(groups: list[list[Path]]) -> list[list[Path]]:
    most = max(map(len, groups), default=0)
    return [[group[turn] for group in groups if turn < len(group)] for turn in range(most)]


def _bar(name: str, value: float, bar: float, met: bool, side: str) -> str:
    return f"  {name} {value:.1%}; the bar is {side} {bar:.0%}: {'met' if met else 'missed'}"


def _newest(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(f"{folder}: has no {pattern}; run the demo again")
    return found[-1]


def _pairs(path: Path) -> list[tuple[Prompt, str]]:
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    return [(Prompt(e["key"], e["language"], e["reference"], e["source"]), e["answer"]) for e in examples]


def _of(pairs: list[tuple[Prompt, str]], source: str) -> list[tuple[Prompt, str]]:
    return [pair for pair in pairs if pair[0].source == source]


def _by(group: Callable[[Prompt], str], pairs: Sequence[tuple[Prompt, str]]) -> dict[str, Row]:
    return {row.group: row for row in grouped_rows(pairs, group)}
