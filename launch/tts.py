"""The suites `tts` and `regression` of launch/evaluate.py: from runs and settings to tables, files and exit status.

RUN: Talker, codec, held-out sets; RUN2: recogniser --train/speech_eval.py--> reports --launch/tts_report.py--> files
regression: the same of RUN and of RUN0, and the difference
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.codec import open_codec
from data.corpus import Corpus
from data.errors import DataError
from launch.arguments import number, parse, whole
from launch.run_engine import Opened, omni_of, open_run
from launch.tts_report import Files, as_json, check_folder, comparison, publish, table, write_json
from models.omni_config import OmniConfig
from models.sampling import Sampling
from models.say import SaySettings, speaker_id
from train.config import shards_of
from train.errors import CheckpointError, RecipeError
from train.feed import codec_of, model_layout
from train.recogniser import Recogniser, plain_request, usual_requests
from train.speech_eval import Asked, SpeechEvaluator, SpeechReport
from train.speech_set import SpeechSet, keys_of
from train.synthesis import OmniSpeaking

KNOWN = {
    "run": None,
    "suite": None,
    "recogniser": None,
    "checkpoint": "latest",
    "shards": "",
    "levels": "",
    "max_samples": "",
    "speaker": "",
    "system": "",
    "rewrite": "",
    "temperature": "",
    "seed": "0",
    "max_seconds": "20",
    "instruction": "",
    "out": "",
}
MAX_REWRITES = 64 << 20  # bytes of such a file


@dataclass(frozen=True)
class Order:
    """What the command line asks for, checked."""

    asked: Asked
    sampling: Sampling | None  # None: the released model's
    max_seconds: float
    seed: int
    levels: int | None
    shards: dict[str, list[str]]  # by name of the set; empty: the recipe's


def tts(argv: Sequence[str]) -> None:
    """Evaluate the speech of one run."""
    given, rest = parse(argv, KNOWN)
    order, opened = _order(given), open_run(Path(given["run"]), rest)
    recogniser = open_recogniser(given, rest)
    out = Path(given["out"]) if given["out"] else None
    if out is not None:
        check_folder(out)
    run = _Speech(opened, order, given["checkpoint"])
    folder = out or opened.folder / "eval" / f"tts-step{run.step:08d}"
    with publish(folder) as partial:
        _reports(run, recogniser, partial)
    recogniser.engine.close()
    print(f"  written to {folder}/report.json; sound and spectrograms:")
    for path in sorted(folder.glob("*-speech.wav")):
        print(f"    {path}")


def regression(argv: Sequence[str]) -> None:
    """Evaluate the speech of a run and of the one it came from; SystemExit(1) where it is worse."""
    given, rest = parse(argv, KNOWN | {"baseline": None, "tolerance": "0.05"})
    order, tolerance = _order(given), number(given, "tolerance", 0, 10)
    opened, before = open_run(Path(given["run"]), rest), open_run(Path(given["baseline"]), rest)
    before = replace(before, recipe=replace(before.recipe, eval=opened.recipe.eval))  # the same samples
    recogniser = open_recogniser(given, rest)
    out = Path(given["out"]) if given["out"] else None
    if out is not None:
        check_folder(out)
    run = _Speech(opened, order, given["checkpoint"])
    baseline = _Speech(before, order, "latest")
    folder = out or opened.folder / "eval" / f"regression-step{run.step:08d}"
    with publish(folder) as partial:
        found = {}
        for name, each in (("baseline", baseline), ("run", run)):
            print(f"{name}: {each.opened.folder}")
            (partial / name).mkdir()
            found[name] = _reports(each, recogniser, partial / name)
        text, rises = comparison(found["baseline"], found["run"])
        write_json(partial / "regression.json", {"tolerance": tolerance, "rises": rises})
    recogniser.engine.close()
    print(text)
    print(f"  written to {folder}")
    worse = {name: rise for name, rise in rises.items() if rise > tolerance}
    if worse:
        worst = max(worse, key=lambda name: worse[name])
        print(
            f"regression: on {worst} the word error rate of the speech rose by {worse[worst]:.1%}, "
            f"more than tolerance={tolerance:g}",
            file=sys.stderr,
        )
        raise SystemExit(1)
    print(f"no regression: no word error rate of the speech rose by more than tolerance={tolerance:g}")


class _Speech:
    """A run whose speech is evaluated: all that can be wrong is found before the model is loaded."""

    def __init__(self, opened: Opened, order: Order, checkpoint: str) -> None:
        recipe, model, where = opened.recipe, opened.model, f"{opened.folder}/recipe.yaml"
        if not isinstance(model, OmniConfig) or model.talker is None:
            raise RecipeError(f"{where} has no model.talker: this run cannot speak")
        if not recipe.data.codec:
            raise RecipeError(f"{where} has no data.codec: give data.codec=FOLDER")
        if order.asked.speaker:
            speaker_id(model.talker, order.asked.speaker)
        self.opened, self.order, self.model = opened, order, model
        sets = order.shards or {name: shards_of(entry) for name, entry in recipe.eval.sets.items()}
        if not sets:
            raise RecipeError(f"{where} has no eval.sets: give shards=PATTERN")
        codec_of(recipe.data.codec, model)
        self.codec = open_codec(recipe.data.codec, order.levels)
        found = {name: self._set(patterns) for name, patterns in sets.items()}
        self.speech = {name: each for name, each in found.items() if each.samples}
        if not self.speech:
            raise DataError(f"no answer in {', '.join(sets)} has speech: give other shards=PATTERN (docs/data.md)")
        if order.asked.rewrites is not None:
            names = [each.corpus.name(sample) for each in self.speech.values() for sample in each.samples]
            for key in sorted(order.asked.rewrites.keys() - {key for name in names for key in keys_of(name)}):
                raise DataError(f"rewrite: no sample with speech has the key {key!r}")
        self.engine, self.step = opened.engine(checkpoint)

    def _set(self, patterns: Sequence[str]) -> SpeechSet:
        data, tokenizer = self.opened.recipe.data, self.opened.tokenizer
        corpus = Corpus.open(patterns, tokenizer.fingerprint, data.store)
        return SpeechSet(corpus, self.codec, tokenizer, model_layout(self.model, tokenizer), data.limits)

    def evaluators(self, recogniser: Recogniser) -> Iterator[tuple[str, SpeechEvaluator]]:
        """One a set. The draws of each begin anew."""
        order, tokenizer = self.order, self.opened.tokenizer
        frames = max(1, int(order.max_seconds * self.codec.frame_rate))
        same = order.sampling
        settings = SaySettings(frames) if same is None else SaySettings(frames, same, same)
        most = order.asked.max_samples or self.opened.recipe.eval.max_samples
        asked = replace(order.asked, max_samples=most)
        for name, speech in self.speech.items():
            speaking = OmniSpeaking(omni_of(self.engine), settings, order.seed, self.opened.device)
            yield name, SpeechEvaluator(speech, speaking, self.codec, recogniser, tokenizer, self.model, asked)


def _reports(run: _Speech, recogniser: Recogniser, folder: Path) -> list[SpeechReport]:
    """Evaluate, print, and leave report.json and sound in `folder`."""
    reports = []
    for name, evaluator in run.evaluators(recogniser):
        if not (chosen := evaluator.chosen()):
            continue  # nothing of this set is rewritten
        files = Files(folder, name, chosen, run.codec.sample_rate)
        reports.append(evaluator.report(name, run.step, files.keep))
        print(table(reports[-1]))
    run.engine.close()
    levels = getattr(run.codec, "levels", run.codec.num_codebooks)
    body = {"run": str(run.opened.folder), "step": run.step, "codec": run.codec.identity, "levels": levels}
    body |= {"requests": dict(recogniser.requests), "sets": [as_json(report) for report in reports]}
    write_json(folder / "report.json", body)
    return reports


def open_recogniser(given: dict[str, str], rest: Sequence[str]) -> Recogniser:
    """The Thinker of another run, and how it is asked."""
    folder = Path(given["recogniser"])
    try:
        opened = open_run(folder, [word for word in rest if word.startswith("engine.")])
        if given["instruction"]:
            requests = plain_request(given["instruction"])
        else:
            recipe = opened.recipe
            patterns = map(shards_of, recipe.eval.sets.values())
            corpora = [Corpus.open(shards, opened.tokenizer.fingerprint, recipe.data.store) for shards in patterns]
            requests = usual_requests(corpora)
        engine, _ = opened.engine()
    except (RecipeError, DataError, CheckpointError) as error:
        raise type(error)(f"recogniser={folder}: {error}") from None
    layout, settings = model_layout(opened.model, opened.tokenizer), opened.recipe.eval
    return Recogniser(engine, opened.tokenizer, layout, requests, settings.max_new_tokens, settings.batch_tokens)


def _order(given: dict[str, str]) -> Order:
    if any("\ud800" <= letter <= "\udfff" for letter in given["system"] + given["instruction"]):
        raise RecipeError("system= and instruction= must be UTF-8")
    rewrites = _rewrites(Path(given["rewrite"])) if given["rewrite"] else None
    samples = whole(given, "max_samples", 1, 1 << 31) if given["max_samples"] else 0
    sampling = Sampling(number(given, "temperature", 0, 100), top_k=50) if given["temperature"] else None
    return Order(
        Asked(given["speaker"], given["system"], rewrites, samples),
        sampling,
        number(given, "max_seconds", 0.08, 600),
        whole(given, "seed", 0, 2**63 - 1),
        whole(given, "levels", 1, 1 << 16) if given["levels"] else None,
        {"shards": given["shards"].strip("[]").split(",")} if given["shards"] else {},
    )


def _rewrites(path: Path) -> dict[str, str]:
    """Texts by key, from lines of JSON. Raises DataError, naming the line."""
    try:
        if path.stat().st_size > MAX_REWRITES:
            raise DataError(f"rewrite={path}: more than {MAX_REWRITES >> 20} MB")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"rewrite={path}: cannot be read: {error}") from None
    found: dict[str, str] = {}
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            key, text = entry["key"], entry["text"]
            usable = isinstance(key, str) and isinstance(text, str) and text.strip()
            text.encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            usable = False
        if not usable:
            raise DataError(f'rewrite={path}: line {at} must be {{"key": "...", "text": "what to say"}}')
        if key in found:
            raise DataError(f"rewrite={path}: line {at}: the key {key!r} is there already")
        found[key] = text
    if not found:
        raise DataError(f"rewrite={path}: holds no texts")
    return found
