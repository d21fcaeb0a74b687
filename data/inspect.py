"""Look at a corpus: what it holds, a few samples of each kind, how a step of training is packed.

    SHARDS --indexes--> survey --> tables (terminal), --json FILE, --page FILE.html
           --plan, reader--> --pack STEP: a table (terminal), a picture (--picture FILE.png, or on the page)

    python -m data.inspect 'SHARDS/*.tar' [image.max_pixels=N] [video.fps=N] [--json FILE] [--page FILE.html]
    python -m data.inspect 'SHARDS/*.tar' tokenizer=FOLDER --pack 0 --sequence-length 8192 --sequences-per-step 4

Tokens are those of the released model's layout, with images and videos brought to the recipe's default sizes unless
settings say otherwise (data.image.* and data.video.*, "data." may be left out). Counting opens no media; only samples
on the page and in packs are read. Cost: about 1 us a sample, and what is read.

This is a command, not a library: it alone in data/ knows the model, whose position ids the picture shows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from data.corpus import Corpus
from data.costs import Sizing
from data.document import MediaLimits
from data.errors import DataError
from data.files import write_atomically
from data.page import PageLimits, Picture, page
from data.picture import documents_of, draw_packs
from data.plan import Plan, PlanSettings
from data.reader import Reader
from data.report import Table, as_json, as_text, bars_as_text, printable, summary, tables
from data.survey import Survey, survey
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
from train.layout import ModelLayout

MAX_DRAWN = 16  # sequences of a step that are read and drawn
_SETTING = re.compile(r"(?:data\.)?([a-z_.]+)=(.*)", re.DOTALL)


def print_survey(found: Survey) -> None:
    """The summary, the tables and the histograms, on the terminal."""
    names = summary(found)
    width = max(len(name) for name, _ in names)
    for name, value in names:
        print(f"{name:<{width}}  {value}")
    for table in tables(found):
        print(f"\n{as_text(table)}")
    for name, lengths in found.lengths_by(1).items():
        print(f"\nsamples by length in tokens, {printable(name)}:\n{bars_as_text(lengths)}")


def read_packs(
    corpus: Corpus, tokenizer: Tokenizer, limits: MediaLimits, options: argparse.Namespace
) -> tuple[list[Batch], Mapping[int, str]]:
    """The first packed sequences of a step, and the kinds of the tokens that stand for media."""
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
    layout = replace(released, tokens=tokens)
    settings = PlanSettings(
        options.sequence_length, options.sequences_per_step, window=options.window, too_long=options.too_long
    )
    sizing = Sizing(layout, limits.image, limits.sampling)
    plan = Plan(corpus, settings, seed=options.seed, sizing=sizing)
    reader = Reader(
        corpus, tokenizer, seed=options.seed, layout=layout, limits=limits, sequence_length=options.sequence_length
    )
    batches = [reader.batch(pack) for pack in plan.step(options.pack)[:MAX_DRAWN]]
    for source, count in plan.dropped.items():
        print(f"\ndropped, over {options.sequence_length:,} tokens: {count:,} of {printable(source)}")
    return batches, {tokens.audio: "audio", tokens.image: "image", tokens.video: "video"}


def pack_tables(batches: Sequence[Batch], pads: Mapping[int, str]) -> list[Table]:
    """For each packed sequence, its documents."""
    header = ["", "document", "first token", "tokens", "with loss", "text", "audio", "image", "video", "last position"]
    found = []
    for number, batch in enumerate(batches, 1):
        rows = [
            [str(row.number), row.key, f"{row.start:,}", f"{row.tokens:,}", f"{row.learned:,}"]
            + [f"{count:,}" for count in row.kinds.values()]
            + [f"{row.position:,.10g}"]
            for row in documents_of(batch, pads)
        ]
        rows += [["-", f"left out: {line}", *[""] * 8] for line in batch.skipped]
        found.append(Table(f"sequence {number}", header, rows, words=(1,)))
    return found


def look(options: argparse.Namespace, shards: Sequence[str], settings: Mapping[str, str]) -> None:
    """Do what the command line asks. Raises DataError."""
    image, video = ImageLimits(), Sampling()
    image, video = (
        replace(image, **_values(image, "image", settings)),
        replace(video, **_values(video, "video", settings)),
    )
    limits = MediaLimits(image=image, sampling=video)
    for path in (options.json, options.page, options.picture):
        if path is not None and not path.parent.is_dir():
            raise DataError(f"{path}: there is no folder {path.parent}")
    if options.pack is not None and "tokenizer" not in settings:
        raise DataError("--pack reads text: name the tokenizer's folder with tokenizer=FOLDER")
    tokenizer = load_tokenizer(settings["tokenizer"]) if "tokenizer" in settings else None
    corpus = Corpus.open(shards, tokenizer.fingerprint if tokenizer else None)
    sizing = Sizing(ModelLayout(), limits.image, limits.sampling)
    picks = options.samples if options.page else 0
    found = survey(corpus, sizing, picks=picks, seed=options.seed, quiet=not sys.stderr.isatty())
    print_survey(found)
    pictures = []
    if options.pack is not None and tokenizer is not None:
        pictures.append(_draw(corpus, tokenizer, limits, options))
    if options.json:
        text = json.dumps(as_json(found), indent=1, ensure_ascii=False)
        write_atomically(options.json, (text + "\n").encode("utf-8", "replace"))
        print(f"\nwrote {options.json}")
    if options.page:
        title = f"{found.total.samples:,} samples in {found.shards:,} shards"
        media = PageLimits(int(options.max_medium_mb * 1e6), int(options.max_page_mb * 1e6))
        write_atomically(options.page, page(title, corpus, found, pictures, media))
        print(f"\nwrote {options.page}")


def _draw(corpus: Corpus, tokenizer: Tokenizer, limits: MediaLimits, options: argparse.Namespace) -> Picture:
    """Print the packs of a step and draw them."""
    batches, pads = read_packs(corpus, tokenizer, limits, options)
    shown = f"the first {len(batches)} of " * (len(batches) < options.sequences_per_step)
    title = f"step {options.pack}: {shown}{options.sequences_per_step} sequences of {options.sequence_length:,} tokens"
    found = pack_tables(batches, pads)
    print(f"\n{title}, seed {options.seed}")
    for table in found:
        print(f"\n{as_text(table)}")
    png = draw_packs(batches, pads, options.sequence_length, title)
    path = options.picture or (None if options.page else Path(f"pack-{options.pack}.png"))
    if path:
        write_atomically(path, png)
        print(f"\nwrote {path}")
    return Picture(title, png, found)


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
        if not 0 < values[field] < float("inf"):
            raise DataError(f"data.{name}={text}: must be above 0")
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
    parser = argparse.ArgumentParser("python -m data.inspect", description="Look at a corpus.")
    add = parser.add_argument
    add(
        "arguments",
        nargs="+",
        metavar="SHARDS",
        help="paths or patterns, and settings: tokenizer=FOLDER image.*= video.*=",
    )
    add("--json", type=Path, metavar="FILE", help="write the counts as JSON")
    add("--page", type=Path, metavar="FILE", help="write a page of HTML with samples of each kind")
    add("--samples", type=int, default=3, help="on the page, of each source and kind (default %(default)s)")
    add("--max-medium-mb", type=float, default=4, help="a larger medium is not put on the page (default %(default)s)")
    add("--max-page-mb", type=float, default=64, help="of all media on the page (default %(default)s)")
    add("--seed", type=int, default=0, help="chooses samples, and is the plan's (default %(default)s)")
    add("--pack", type=int, metavar="STEP", help="draw the packed sequences of a step; needs tokenizer=FOLDER")
    add("--picture", type=Path, metavar="FILE", help="where to draw them (default pack-STEP.png; on the page if any)")
    add("--sequence-length", type=int, default=8192, help="tokens (default %(default)s)")
    add("--sequences-per-step", type=int, default=8, help="(default %(default)s)")
    add("--window", type=int, default=65536, help="samples packed together (default %(default)s)")
    add("--too-long", choices=("error", "drop", "split"), default="drop", help="as data.too_long (default %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 after one line on what is wrong."""
    options = _parser().parse_intermixed_args(arguments)  # settings may stand behind options
    try:
        for name in ("samples", "max_medium_mb", "max_page_mb", "sequence_length", "sequences_per_step", "window"):
            if not getattr(options, name) > 0:
                raise DataError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be above 0")
        if options.pack is not None and options.pack < 0:
            raise DataError(f"--pack {options.pack}: must be a step, 0 or above")
        look(options, *_split(options.arguments))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
