"""Which samples the demo's corpus has: their texts, and what their media will hold. Nothing is drawn or spoken yet.

    Settings --> tasks and languages in their shares, shuffled --Studio, number by number--> Planned of each split

A pure function of the settings (and, for `text`, of the Python version). Cost: 0.2 ms a sample.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from data.chat import transcription
from data.demo_docs import documents
from data.demo_small import KNOWN_TASKS, VOICES
from data.demo_spoken import read_aloud
from data.demo_studio import Medium, Studio, heldout
from data.demo_tasks import TASKS
from data.demo_utterances import Utterance, plan_utterances
from data.demo_words import LANGUAGES
from data.errors import DataError
from data.sample import SampleRecord

SPLITS = ("train", "voices", "sentences", "scenes")
COUNTED = ("transcription", "animals_aloud")  # tasks of counted animals


@dataclass(frozen=True)
class Settings:
    """What a corpus is made from; the same settings make the same corpus."""

    samples: int = 20_000  # of train
    heldout: int = 20  # samples of each language in each held-out set
    languages: tuple[str, ...] = tuple(LANGUAGES)
    seed: int = 0
    vocab_size: int = 4096
    tasks: tuple[str, ...] = tuple(TASKS)  # those with spoken answers only where they are asked for

    def check(self) -> None:
        """Raise DataError unless a corpus can be made so."""
        for option, given, known in (("--languages", self.languages, LANGUAGES), ("--tasks", self.tasks, KNOWN_TASKS)):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise DataError(f"{option} {','.join(given)}: unknown; known are {', '.join(known)}")
            if len(set(given)) < len(given):
                raise DataError(f"{option} {','.join(given)}: names one twice")
        languages, tasks = len(self.languages), sum(map(self.least, self.tasks))
        if self.samples < max(languages, tasks):
            why = f"one for each of {languages} languages" if languages >= tasks else "one for each task"
            counted = [task for task in self.tasks if task in COUNTED]
            if counted and len(self.tasks) > 1:
                takes = f"{' and '.join(counted)} take{'s' * (len(counted) == 1)}"
                why = f"{takes} one for each of {languages} languages, each other task one"
            raise DataError(f"--samples {self.samples}: must be at least {max(languages, tasks)}: {why}")
        if self.heldout < 1:
            raise DataError(f"--heldout {self.heldout}: must be at least 1")
        if "text" in self.tasks and "en" not in self.languages:
            raise DataError("--tasks text is in English: add en to --languages, or leave text out")
        if "translation" in self.tasks and len(self.languages) < 2:
            raise DataError("--tasks translation: needs two languages at least")

    def least(self, task: str) -> int:
        """Samples that a task needs."""
        return len(self.languages) if task in COUNTED else 1


@dataclass(frozen=True)
class Planned:
    """A sample whose media are not made yet."""

    record: SampleRecord
    media: dict[str, Medium]


def plan(settings: Settings) -> dict[str, list[Planned]]:
    """The samples of every split that has any, in order. Raises DataError for settings that cannot be."""
    settings.check()
    counts = _counts(settings)
    counted = {task: _counted(settings, task, counts[task]) for task in COUNTED if task in counts}
    texts = _texts(settings) if "text" in counts else {}
    made = list(_made_up(settings, counts, texts.get("train", [])))
    train = [*made, *(planned for found in counted.values() for planned in found["train"])]
    if made or len(counted) > 1:
        random.Random(f"{settings.seed} train").shuffle(train)
    splits = {"train": train}
    for split in SPLITS[1:]:
        spoken = {task: found.get(split, []) for task, found in counted.items()}
        chosen = _held_out(settings, split, spoken, texts.get(split, []))
        if chosen:
            splits[split] = chosen
    return splits


def _counts(settings: Settings) -> dict[str, int]:
    """Training samples of each task: shares rounded, what it needs at least, together as many as asked."""
    total = sum(KNOWN_TASKS[task].share for task in settings.tasks)
    counts, left, share_left = {}, settings.samples, total
    for place, task in enumerate(settings.tasks):
        waiting = sum(map(settings.least, settings.tasks[place + 1 :]))
        count = round(left * KNOWN_TASKS[task].share / share_left)
        counts[task] = min(max(count, settings.least(task)), left - waiting)
        left, share_left = left - counts[task], share_left - KNOWN_TASKS[task].share
    return counts


def _counted(settings: Settings, task: str, clips: int) -> dict[str, list[Planned]]:
    """The samples of a task of counted animals, by split: transcribed, or read aloud by named speakers."""
    utterances = plan_utterances(clips, settings.heldout, settings.languages, settings.seed)
    found: dict[str, list[Planned]] = {}
    for utterance in utterances:
        made = _transcribed(utterance) if task == "transcription" else _aloud(utterance, settings)
        found.setdefault(utterance.split, []).append(made)
    return found


def _transcribed(utterance: Utterance) -> Planned:
    messages = transcription("flac", utterance.instruction, utterance.speech.text)
    record = SampleRecord(
        utterance.key,
        messages,
        language=utterance.language,
        source="transcription",
        speaker=utterance.speech.speaker,
    )
    return Planned(record, {"flac": Medium(utterance.speech, 0)})


def _aloud(utterance: Utterance, settings: Settings) -> Planned:
    split, language, number = utterance.key.split("-")
    studio = Studio(settings.seed, f"{split} aloud", int(number), language, settings.languages)
    messages = read_aloud(studio, utterance.speech.text, VOICES)
    key = f"{split}-animals_aloud-{language}-{number}"
    record = SampleRecord(key, messages, language=language, source="animals_aloud", speaker=studio.speaker)
    return Planned(record, studio.media)


def _texts(settings: Settings) -> dict[str, list[str]]:
    """Documents of train and of sentences, shuffled."""
    found: dict[str, list[str]] = {"train": [], "sentences": []}
    for name, text in documents():
        found["sentences" if heldout(name.partition(",")[0]) else "train"].append(text)
    for split, texts in found.items():
        random.Random(f"{settings.seed} {split} text").shuffle(texts)
    return found


def _made_up(settings: Settings, counts: dict[str, int], texts: list[str]) -> Iterator[Planned]:
    """Training samples but for counted animals, tasks shuffled, languages in turn."""
    order = [task for task, count in counts.items() if task not in COUNTED for _ in range(count)]
    random.Random(f"{settings.seed} tasks").shuffle(order)
    languages, waiting = itertools.cycle(settings.languages), itertools.cycle(texts)
    for number, task in enumerate(order):
        if task == "text":
            yield _text("train", number, next(waiting))
        else:
            yield _make(settings, "train", number, task, next(languages))


def _held_out(settings: Settings, split: str, counted: dict[str, list[Planned]], texts: list[str]) -> list[Planned]:
    """A held-out set: in each language as many samples as asked, the tasks that are in it in turn."""
    tasks = [task for task in settings.tasks if split in KNOWN_TASKS[task].heldout]
    spoken = {
        (task, code): iter([planned for planned in found if planned.record.language == code])
        for task, found in counted.items()
        for code in settings.languages
    }
    found, waiting = [], itertools.cycle(texts)
    for number in range(settings.heldout * len(settings.languages) if tasks else 0):
        turn, place = divmod(number, len(settings.languages))
        language = settings.languages[place]
        own = [task for task in tasks if task != "text" or (language == "en" and texts)]
        if not own:
            continue
        task = own[(turn + place) % len(own)]
        if task in COUNTED:
            found.append(next(spoken[task, language]))
        elif task == "text":
            found.append(_text(split, number, next(waiting)))
        else:
            found.append(_make(settings, split, number, task, language))
    return found


def _make(settings: Settings, split: str, number: int, task: str, language: str) -> Planned:
    studio = Studio(settings.seed, split, number, language, settings.languages)
    make = KNOWN_TASKS[task].make
    assert make is not None
    made = make(studio)
    turns = "role" in made[0]
    record = SampleRecord(
        f"{split}-{task}-{language}-{number:06d}",
        messages=made if turns else (),
        segments=() if turns else made,
        language=language,
        source=task,
        speaker=studio.speaker,
    )
    return Planned(record, studio.media)


def _text(split: str, number: int, text: str) -> Planned:
    segments = [{"type": "text", "text": text}]
    return Planned(SampleRecord(f"{split}-text-en-{number:06d}", segments=segments, language="en", source="text"), {})
