"""Preference pairs for a Talker from its own speech, beside the shards: what phases with speech=preference read.

    python -m launch.preferences run=RUN recogniser=RUN2 [shards=PATTERN] [candidates=4] [chosen=best|recording]
                                 [temperature=T] [seed=0] [max_seconds=20] [batch=16] [checkpoint=latest]
                                 [instruction=TEXT] [replace=false] [KEY=VALUE ...]     settings of the run's recipe

    for each answer with speech: RUN's Talker says it `candidates` times --RUN2 writes down each--> word error rates
      best, worst, RUN's log-probabilities of both --> NAME.tar.pairs (data/pair_store.py, train/pairs.py)

`shards` are the recipe's where none are given. Sampling is the released model's unless `temperature` is given. By
default the best candidate is chosen, so that both sequences are the Talker's own and differ in how well they are
understood; chosen=recording takes the recording's codes unless a candidate is better, for a Talker that seldom gets
it right. Answers whose two sequences score alike are left out and counted. RUN2 must not have learnt from the Talker.

Shards that have these pairs are left alone; one that was interrupted goes on at its next answer. Pairs made otherwise
are refused unless replace=true. `batch` answers are spoken together; it is part of what decides the draws.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.codec import open_codec
from data.corpus import Corpus
from data.document import Maker
from data.errors import BadSample, DataError
from data.pair_store import PairsWriter, ShardPairs, counts, has_pairs
from launch.arguments import guarded, number, parse, whole
from launch.run_engine import Opened, omni_of, open_run
from launch.tts import open_recogniser as open_recogniser
from models.omni_config import OmniConfig
from models.sampling import Sampling
from models.say import SaySettings
from train.engines.local import LocalEngine
from train.errors import RecipeError
from train.feed import codec_of, model_layout
from train.pairs import PairMaker, Sampled, weights_identity
from train.speech_set import SpeechSet

KNOWN = {
    "run": None,
    "recogniser": None,
    "shards": "",
    "candidates": "4",
    "chosen": "best",
    "temperature": "",
    "seed": "0",
    "max_seconds": "20",
    "batch": "16",
    "checkpoint": "latest",
    "instruction": "",
    "replace": "false",
}


def preferences(argv: Sequence[str]) -> None:
    """Run the command. Raises this project's errors."""
    given, settings = parse(argv, KNOWN)
    check(given)
    opened = open_run(Path(given["run"]), settings)
    speech, sampled = speech_of(opened, given), sampled_of(opened, given)
    recogniser = open_recogniser(given, settings)
    engine, _ = opened.engine(given["checkpoint"])
    omni, layout = omni_of(engine), model_layout(opened.model, opened.tokenizer)
    assert isinstance(recogniser.engine, LocalEngine)
    names = ("candidates", "chosen", "temperature", "seed", "max_seconds", "batch")
    made = {name: given[name] for name in names} | {
        "talker": weights_identity(omni),
        "recogniser": weights_identity(recogniser.engine.objective.model),
        "requests": hashlib.sha256(json.dumps(recogniser.requests, sort_keys=True).encode()).hexdigest()[:16],
    }
    maker = Maker(opened.tokenizer, layout, speech.limits)
    pairs = PairMaker(speech, omni, recogniser, maker, layout, sampled, opened.device)
    try:
        write_pairs(pairs, made, int(given["batch"]), given["replace"] == "true")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise
    corpus = speech.corpus
    found = [ShardPairs.open(tar, corpus.index(shard)) for shard, tar in enumerate(corpus.paths)]
    tell(found, len(speech.samples))


def check(given: Mapping[str, str]) -> None:
    """Raise RecipeError for an argument that cannot be, before anything is opened."""
    whole(given, "candidates", 1 if given["chosen"] == "recording" else 2, 1024)
    whole(given, "batch", 1, 1 << 16)
    for key, options in (("chosen", ("best", "recording")), ("replace", ("true", "false"))):
        if given[key] not in options:
            raise RecipeError(f"{key}={given[key]}: it is {' or '.join(options)}")


def speech_of(opened: Opened, given: Mapping[str, str]) -> SpeechSet:
    """The answers to be spoken. Raises RecipeError or DataError for a run or shards that cannot be used."""
    recipe, model, where = opened.recipe, opened.model, f"{opened.folder}/recipe.yaml"
    if not isinstance(model, OmniConfig) or model.talker is None:
        raise RecipeError(f"{where} has no model.talker: this run cannot speak")
    if not recipe.data.codec:
        raise RecipeError(f"{where} has no data.codec: give data.codec=FOLDER")
    codec_of(recipe.data.codec, model)
    patterns = given["shards"].strip("[]").split(",") if given["shards"] else recipe.data.shards
    if remote := next((pattern for pattern in patterns if "://" in pattern), None):
        raise DataError(f"{remote}: pairs are written beside local shards; copy it here, or run this where it lies")
    corpus = Corpus.open(patterns, opened.tokenizer.fingerprint, recipe.data.store)
    layout = model_layout(model, opened.tokenizer)
    speech = SpeechSet(corpus, open_codec(recipe.data.codec), opened.tokenizer, layout, recipe.data.limits)
    if not speech.samples:
        raise DataError(f"{corpus.paths[0]}: no answer of these shards has speech (docs/data.md says how it would)")
    return speech


def sampled_of(opened: Opened, given: Mapping[str, str]) -> Sampled:
    """How candidates are drawn. Raises RecipeError."""
    seconds = number(given, "max_seconds", 0.08, 600)
    frames = max(1, int(seconds * open_codec(opened.recipe.data.codec).frame_rate))
    say = SaySettings(frames)
    if given["temperature"]:
        same = Sampling(number(given, "temperature", 1e-3, 100), top_k=50)  # at 0 all candidates would be the same
        say = SaySettings(frames, same, same)
    seed = whole(given, "seed", 0, 2**63 - 1)
    return Sampled(say, int(given["candidates"]), seed, given["chosen"] == "recording")


def write_pairs(maker: PairMaker, made: Mapping[str, str], batch: int, replace: bool) -> None:
    """Write what is missing beside the shards. Raises DataError before any work where a shard has other pairs."""
    speech = maker.speech
    corpus, codec = speech.corpus, speech.codec
    shards = range(len(corpus.paths))
    waiting = [shard for shard in shards if replace or not has_pairs(corpus.index(shard), codec, made)]
    total = sum(len(corpus.index(shard).speech_rows()) for shard in waiting)
    with tqdm(total=total, unit=" answers", desc="pairs", disable=not sys.stderr.isatty()) as bar:
        for shard in waiting:
            index, first = corpus.index(shard), int(corpus.offsets[shard])
            rows = index.speech_rows()
            with PairsWriter(index, codec, made, replace) as writer:
                for start in range(0, len(rows), batch):
                    group: np.ndarray = rows[start : start + batch]
                    bar.update(len(group))
                    if group[-1] < writer.next_row:
                        continue
                    key = f"{index.about['header_digest']}/{start}"
                    done = writer.next_row
                    for sample, found in maker.pairs((group + first).tolist(), key):
                        if sample - first >= done:
                            _write(writer, sample - first, found)
                writer.finish()


def _write(writer: PairsWriter, row: int, found: tuple | BadSample) -> None:
    try:
        if isinstance(found, BadSample):
            raise found
        writer.add(row, *found)
    except BadSample as error:
        writer.leave_out(row, error.reason)


def tell(found: Sequence[ShardPairs], spoken: int) -> None:
    """Print what the pairs are."""
    count = counts(found)
    print(f"{count['pairs']:,} pairs of {spoken:,} spoken answers in {len(found):,} shards", end="")
    print(f"; {count['recorded']:,} chosen from recordings" if count["recorded"] else "")
    print(f"word error rate of chosen {count['chosen_wer']:.1%}, of rejected {count['rejected_wer']:.1%}")
    print(f"left out: {count['alike']:,} whose candidates score alike, {count['other']:,} for other reasons")
    for line in [line for pairs in found for line in pairs.other][:3]:
        print(f"  {line}")


def main(argv: Sequence[str]) -> int:
    """The command; its exit status."""
    return guarded(preferences, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
