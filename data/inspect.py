"""Look at a corpus: what it holds, a few samples of each kind, how a step of training is packed.

    SHARDS, or the recipe of a run --> View: corpus, plan, reader
    View --indexes--> survey --> tables (terminal), --json FILE, --page FILE.html
         --plan, reader--> --pack STEP: a table (terminal), a picture (--picture FILE.png, or on the page)

    python -m data.inspect 'SHARDS/*.tar' [image.max_pixels=N] [video.fps=N] [--json FILE] [--page FILE.html]
    python -m data.inspect 'SHARDS/*.tar' tokenizer=FOLDER --pack 0 --sequence-length 8192 --sequences-per-step 4
    python -m data.inspect recipe=NAME [KEY=VALUE ...] --pack 0     what training reads in its first step
    python -m data.inspect run=FOLDER --pack 5000                   the same of a run's own recipe

Of SHARDS, tokens are those of the released model's layout, with images and videos brought to the recipe's default sizes
unless settings say otherwise (data.image.* and data.video.*, "data." may be left out); of a recipe all is the recipe's.
Counting opens no media; only samples on the page and in packs are read. Cost: about 1 us a sample, once more for the
plan's look at the corpus and for each sample before the step, and what is read.

This is a command, not a library: it alone in data/ knows the model, whose position ids the picture shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.config import check_sizes
from data.corpus import Corpus
from data.costs import Sizing
from data.document import MediaLimits
from data.errors import DataError
from data.files import check_writable, write_atomically
from data.interrupts import uninterrupted
from data.page import PageLimits, Picture, page
from data.picture import documents_of, draw_packs
from data.plan import Pack, Plan, PlanSettings
from data.reader import Reader
from data.report import Table, as_json, as_text, bars_as_text, printable, summary, tables
from data.survey import Survey, survey
from data.terminal import ended, say
from data.tokenizer import (
    AUDIO_END,
    AUDIO_PAD,
    AUDIO_START,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Tokenizer,
    load_tokenizer,
)
from data.types import Batch
from data.video import Sampling
from data.vision import ImageLimits
from models.config import ConfigError
from train.errors import RecipeError
from train.feed import open_feed
from train.layout import ModelLayout
from train.opening import model_config
from train.recipe import load_recipe, load_saved, spans

MAX_DRAWN = 16  # sequences of a step that are read and drawn
_SETTING = re.compile(r"(?:data\.)?([a-z_.]+)=(.*)", re.DOTALL)
_PLAN: Mapping[str, tuple[Any, str]] = {  # options about packs: their defaults, and what they are in a recipe
    "seed": (0, "seed"),
    "sequence_length": (8192, "data.sequence_length"),
    "sequences_per_step": (8, "data.sequences_per_step"),
    "window": (65536, "data.window"),
    "too_long": ("drop", "data.too_long"),
}


@dataclass(frozen=True)
class Step:
    """A step of training: whose it is, and who reads it."""

    title: str
    plan: Plan
    step: int  # of the plan
    reader: Reader
    pads: Mapping[int, str]  # kinds of the tokens that stand for media


@dataclass(frozen=True)
class View:
    """What is looked at."""

    corpus: Corpus
    sizing: Sizing
    seed: int
    step: Step | None


def view_shards(options: argparse.Namespace) -> View:
    """Shards by their names, as the released model would see them. Raises DataError."""
    shards, settings = _split(options.arguments)
    image, video = ImageLimits(), Sampling()
    image, video = (
        replace(image, **_values(image, "image", settings)),
        replace(video, **_values(video, "video", settings)),
    )
    check_sizes(image, video)
    limits = MediaLimits(image=image, sampling=video)
    if options.pack is not None and "tokenizer" not in settings:
        raise DataError("--pack reads text: name the tokenizer's folder with tokenizer=FOLDER")
    tokenizer = load_tokenizer(settings["tokenizer"]) if "tokenizer" in settings else None
    corpus = Corpus.open(shards, tokenizer.fingerprint if tokenizer else None)
    sizing = Sizing(ModelLayout(), limits.image, limits.sampling)
    given = {name: getattr(options, name) for name in _PLAN}
    packing = {name: default if given[name] is None else given[name] for name, (default, _) in _PLAN.items()}
    seed, step = packing.pop("seed"), None
    if options.pack is not None and tokenizer is not None:
        layout, plan = _layout_of(tokenizer), Plan(corpus, PlanSettings(**packing), seed=seed, sizing=sizing)
        length = plan.settings.sequence_length
        reader = Reader(corpus, tokenizer, seed=seed, layout=layout, limits=limits, sequence_length=length)
        step = Step(f"step {options.pack}", plan, options.pack, reader, _pads_of(layout))
    return View(corpus, sizing, seed, step)


def view_recipe(options: argparse.Namespace) -> View:
    """What the training of a recipe, or of a run's, reads. Raises DataError, RecipeError, ConfigError."""
    for name, (_, setting) in _PLAN.items():
        if getattr(options, name) is not None:
            raise DataError(f"--{name.replace('_', '-')}: a recipe says it itself; change it by {setting}=VALUE")
    words = options.arguments
    if any(word.startswith("recipe=") for word in words):
        recipe = load_recipe(words)
    else:
        runs = [word for word in words if word.startswith("run=")]
        path = Path(runs[-1].removeprefix("run=")) / "recipe.yaml"
        recipe = load_saved(path, [word for word in words if word not in runs])
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    feed = open_feed(recipe, tokenizer, model_config(recipe, tokenizer))
    reader, step = next(iter(feed.courses.values())).reader, None
    if options.pack is not None:
        phases = spans(recipe)
        span = next((span for span in phases if span.start <= options.pack < span.stop), None)
        if span is None:
            raise DataError(f"--pack {options.pack}: the recipe's steps are 0 to {phases[-1].stop - 1}")
        course = feed.courses[span.name]
        reader, layout = course.reader, course.reader.layout
        assert isinstance(layout, ModelLayout)
        title = f"step {options.pack}, phase {span.name}"
        step = Step(title, course.plan, options.pack - course.origin, reader, _pads_of(layout))
    return View(reader.corpus, reader.sizing, recipe.seed, step)


def _layout_of(tokenizer: Tokenizer) -> ModelLayout:
    """The released model's layout with the ids of a tokenizer. Raises DataError where it lacks one."""
    names = {
        "audio": AUDIO_PAD,
        "image": IMAGE_PAD,
        "video": VIDEO_PAD,
        "audio_start": AUDIO_START,
        "audio_end": AUDIO_END,
        "vision_start": VISION_START,
        "vision_end": VISION_END,
    }
    released = ModelLayout()
    tokens = replace(released.tokens, **{field: tokenizer.id(name) for field, name in names.items()})
    return replace(released, tokens=tokens)


def _pads_of(layout: ModelLayout) -> Mapping[int, str]:
    return {layout.tokens.audio: "audio", layout.tokens.image: "image", layout.tokens.video: "video"}


def print_survey(found: Survey) -> None:
    """The summary, the tables and the histograms, on the terminal."""
    names = summary(found)
    width = max(len(name) for name, _ in names)
    for name, value in names:
        say(f"{name:<{width}}  {value}")
    for table in tables(found):
        say(f"\n{as_text(table)}")
    for name, lengths in found.lengths_by(1).items():
        say(f"\nsamples by length in tokens, {printable(name)}:\n{bars_as_text(lengths)}")


def read_step(step: Step) -> tuple[list[Pack], list[Batch]]:
    """The first packed sequences of a step, with bars: all windows before it are packed on the way."""
    stops = sorted({*range(0, step.step, max(1, step.step // 1000)), step.step})
    with tqdm(total=step.step, unit=" steps", desc="plan", disable=None, leave=False) as bar:
        for stop in stops:
            step.plan.cursor(stop)
            bar.update(stop - bar.n)
        packs = step.plan.step(step.step)[:MAX_DRAWN]
    batches = []
    for pack in tqdm(packs, unit=" sequences", desc="read", disable=None, leave=False):
        with uninterrupted():
            batches.append(step.reader.batch(pack))
    return packs, batches


def pack_tables(packs: Sequence[Pack], batches: Sequence[Batch], pads: Mapping[int, str]) -> list[Table]:
    """For each packed sequence, what it costs and its documents."""
    header = ["", "document", "first token", "tokens", "with loss", "text", "audio", "image", "video", "last position"]
    found = []
    for number, pack, batch in zip(itertools.count(1), packs, batches, strict=False):
        rows = [
            [str(row.number), row.key, f"{row.start:,}", f"{row.tokens:,}", f"{row.learned:,}"]
            + [f"{count:,}" for count in row.kinds.values()]
            + [f"{row.position:,.10g}"]
            for row in documents_of(batch, pads)
        ]
        rows += [["-", f"left out: {line}", *[""] * 8] for line in batch.skipped]
        title = (
            f"sequence {number}: {len(batch.token_ids_T):,} tokens; work in decoder tokens: {pack.work:,.0f} decoder, "
            f"{pack.audio_work:,.0f} audio encoder, {pack.vision_work:,.0f} vision encoder"
        )
        found.append(Table(title, header, rows, words=(1,)))
    return found


def look(options: argparse.Namespace) -> None:
    """Do what the command line asks. Raises DataError, RecipeError, ConfigError."""
    for name in ("samples", "max_medium_mb", "max_page_mb", "sequence_length", "sequences_per_step", "window"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise DataError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if options.pack is not None and options.pack < 0:
        raise DataError(f"--pack {options.pack}: must be a step, 0 or above")
    of_recipe = any(word.startswith(("recipe=", "run=")) for word in options.arguments)
    picture = _check_outputs(options)
    view = view_recipe(options) if of_recipe else view_shards(options)
    picks = options.samples if options.page else 0
    found = survey(view.corpus, view.sizing, picks=picks, seed=view.seed, quiet=not sys.stderr.isatty())
    print_survey(found)
    pictures = [_draw(view.step, picture)] if view.step else []
    if options.json:
        text = json.dumps(as_json(found), indent=1, ensure_ascii=False)
        _write(options.json, (text + "\n").encode("utf-8", "replace"))
    if options.page:
        title = f"{found.total.samples:,} samples in {found.shards:,} shards"
        media = PageLimits(int(options.max_medium_mb * 1e6), int(options.max_page_mb * 1e6))
        _write(options.page, page(title, view.corpus, found, pictures, media))


def _check_outputs(options: argparse.Namespace) -> Path | None:
    """Where the picture goes. Raises DataError for a file that cannot be written, or that had better not be."""
    picture = options.picture
    if options.pack is None and picture:
        raise DataError(f"--picture {picture}: is of a step; name it with --pack STEP")
    if options.pack is not None and not picture and not options.page:
        picture = Path(f"pack-{options.pack}.png")
    named: dict[Path, str] = {}
    for option, path in (("--json", options.json), ("--page", options.page), ("--picture", picture)):
        if path is None:
            continue
        if path.suffix in (".tar", ".index"):
            raise DataError(f"{option} {path}: would replace a shard; name another file")
        check_writable(path)
        if path.resolve() in named:
            raise DataError(f"{option} {path}: is the file of {named[path.resolve()]} too; name another")
        named[path.resolve()] = option
    return picture


def _draw(step: Step, path: Path | None) -> Picture:
    """Print the packs of a step and draw them."""
    packs, batches = read_step(step)
    settings = step.plan.settings
    for source, count in step.plan.dropped.items():
        say(f"\ndropped, over {settings.sequence_length:,} tokens: {count:,} of {printable(source)}")
    for source, count in step.plan.left_out.items():
        say(f"\nleft out by the mixture: {count:,} of {printable(source)}")
    shown = f"the first {len(batches)} of " * (len(batches) < settings.sequences_per_step)
    title = f"{step.title}: {shown}{settings.sequences_per_step} sequences of {settings.sequence_length:,} tokens"
    found = pack_tables(packs, batches, step.pads)
    say(f"\n{printable(title)}, seed {step.plan.seed}")
    for table in found:
        say(f"\n{as_text(table)}")
    png = draw_packs(batches, step.pads, settings.sequence_length, title)
    if path:
        _write(path, png)
    return Picture(title, png, found)


def _write(path: Path, payload: bytes) -> None:
    write_atomically(path, payload)
    say(f"\nwrote {printable(str(path))}")


def _values(default: ImageLimits | Sampling, group: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """Settings of one group as numbers: {"image.max_pixels": "802816"} -> {"max_pixels": 802816}."""
    known = {item.name: type(getattr(default, item.name)) for item in fields(default)}
    values: dict[str, Any] = {}
    for name, text in settings.items():
        if not name.startswith(f"{group}."):
            continue
        field = name.removeprefix(f"{group}.")
        if field not in known:
            raise DataError(f"data.{name}: no such setting; known are {', '.join(known)}")
        try:
            values[field] = known[field](text)
        except ValueError:
            raise DataError(f"data.{name}={text}: must be a number") from None
    return values


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Shards and settings. Raises DataError for a setting of no known name."""
    shards, settings = [], {}
    for argument in arguments:
        match = _SETTING.fullmatch(argument)
        if match is None or argument.endswith(".tar"):
            shards.append(argument)
        elif match[1] == "tokenizer" or match[1].startswith(("image.", "video.")):
            settings[match[1]] = match[2]
        else:
            raise DataError(f"{argument}: no such setting; known are tokenizer=, image.* and video.*")
    if not shards:
        raise DataError("name at least one shard")
    return shards, settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m data.inspect", description="Look at a corpus, or at a recipe's data.")
    add = parser.add_argument
    add(
        "arguments",
        nargs="+",
        metavar="SHARDS",
        help="paths or patterns, and settings: tokenizer=FOLDER image.*= video.*=; or recipe=NAME or run=FOLDER, and "
        "settings of the recipe",
    )
    add("--json", type=Path, metavar="FILE", help="write the counts as JSON")
    add("--page", type=Path, metavar="FILE", help="write a page of HTML with samples of each kind")
    add("--samples", type=int, default=3, help="on the page, of each source and kind (default %(default)s)")
    add("--max-medium-mb", type=float, default=4, help="a larger medium is not put on the page (default %(default)s)")
    add("--max-page-mb", type=float, default=64, help="of all media on the page (default %(default)s)")
    add("--pack", type=int, metavar="STEP", help="draw the packed sequences of a step; needs tokenizer=FOLDER")
    add("--picture", type=Path, metavar="FILE", help="where to draw them (default pack-STEP.png; on the page if any)")
    default = {name: f"(default {value})" for name, (value, _) in _PLAN.items()}
    own = parser.add_argument_group("plan", "of SHARDS; a recipe has its own").add_argument
    own("--seed", type=int, help=f"also chooses samples for the page {default['seed']}")
    own("--sequence-length", type=int, help=f"tokens {default['sequence_length']}")
    own("--sequences-per-step", type=int, help=default["sequences_per_step"])
    own("--window", type=int, help=f"samples packed together {default['window']}")
    own("--too-long", choices=("error", "drop", "split"), help=f"as data.too_long {default['too_long']}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 2 after one line on what is wrong, or 130 after Ctrl-C."""
    options = _parser().parse_intermixed_args(arguments)  # settings may stand behind options
    return ended(partial(look, options), "interrupted: what is written is whole", (RecipeError, ConfigError))


if __name__ == "__main__":
    sys.exit(main())
