"""Data that lies on disk in a common form, turned into shards.

    python -m data.convert manifest FILE.jsonl OUT           our own: {"audio" | "image" | "video": path, "text": ...}
    python -m data.convert llava    FILE.json OUT            {"conversations": [...], "image": path}
    python -m data.convert swift    FILE.jsonl OUT           {"messages": [...], "images": [path, ...]}
    python -m data.convert openai   FILE.jsonl OUT           {"messages": [{"role", "content": text or parts}]}
    python -m data.convert sharegpt FILE.json OUT            {"conversations": [{"from", "value"}, ...]}
    python -m data.convert alpaca   FILE.json OUT            {"instruction": ..., "input": ..., "output": ...}
    python -m data.convert hf       FOLDER_OR_PARQUET OUT    datasets' save_to_disk; Parquet
    python -m data.convert kaldi    FOLDER OUT               text, wav.scp, segments
    python -m data.convert lhotse   CUTS_OR_FOLDER OUT
    python -m data.convert nemo     FILE.jsonl OUT           {"audio_filepath": path, "text": ...}
    python -m data.convert text     FILE_OR_FOLDER OUT       .txt, .jsonl
    python -m data.convert wavs     FOLDER_OR_TAR OUT        {label}_{speaker}_{n}.wav

With --speak a recording is the spoken answer to "Say it.", for the Talker, and not what is heard and transcribed.

    source --data.sources*, data.convert_hf--> rows --data.convert_run, convert_jobs--> OUT/{split}/shard-000000.tar
      --data.convert_journal--> OUT/convert.jsonl, and OUT/tokenizer: a copy of --tokenizer, or trained on the texts

Media keep their bytes, but for stretches cut out of recordings. Rows that cannot be used are left out, counted by
reason and listed in OUT/convert.jsonl. The result does not depend on --workers. After any stop, the same command goes
on where it stopped. Cost: one decode of every medium, for the index; memory is a sample for each worker.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data.convert_hf import hf_dataset, home_of
from data.convert_run import convert
from data.errors import DataError
from data.sources import SAY, Common, MediaFolder, Source
from data.sources_chat import Chat, Manifest
from data.sources_files import labelled_clips, texts
from data.sources_lhotse import lhotse
from data.sources_lines import LineSource
from data.sources_speech import Nemo, kaldi
from data.terminal import ended, say
from data.tokenizer import load_tokenizer

KINDS = {
    "manifest": "JSONL, a sample a line, with paths of media files",
    "llava": "JSON or JSONL of conversations in the style of LLaVA and ShareGPT",
    "swift": "JSONL in the style of ms-swift",
    "openai": "JSONL of messages as OpenAI's and Qwen's APIs take them, media in parts of the content",
    "sharegpt": "JSON or JSONL of conversations in the style of ShareGPT",
    "alpaca": "JSON or JSONL of instruction, input and output",
    "hf": "a folder written by datasets' save_to_disk; Parquet: a file, a folder or a pattern",
    "kaldi": "a Kaldi folder with text and wav.scp",
    "lhotse": "Lhotse's cuts, or a folder with recordings and supervisions",
    "nemo": "a NeMo manifest",
    "text": "plain text: .txt or .jsonl, a file or a folder",
    "wavs": "a folder or tar of {label}_{speaker}_{n}.wav",
}
_TRANSCRIBED = ("manifest", "kaldi", "lhotse", "nemo", "wavs")  # recordings with transcripts
_COLUMNS = ("audio", "image", "video", "text", "messages")
_NOT_IN_PLAN = ("out", "workers", "dry_run", "tokenizer")  # options that do not shape the result, or are told otherwise


def parse_names(names: str) -> dict[str, str]:
    """Texts by label, from "zero,one,two" (labels are the places) or "yes=oui,no=non"."""
    entries = [name.strip() for name in names.split(",") if name.strip()]
    if all("=" in entry for entry in entries):
        pairs = (entry.partition("=") for entry in entries)
        return {label.strip(): text.strip() for label, _, text in pairs}
    if any("=" in entry for entry in entries):
        raise DataError(f"--names {names}: give either texts alone or label=text throughout")
    return {str(place): text for place, text in enumerate(entries)}


def read_source(options: argparse.Namespace) -> Mapping[str, Source]:
    """The splits that the command line asks for."""
    path = Path(options.source)
    media = options.media or home_of(options.source)
    if not media.is_dir() and not (options.kind == "hf" and (options.hub or not options.media)):
        raise DataError(f"{media}: no such folder" if options.media else f"{path}: no such file or folder")
    stem = (path if path.exists() or options.kind == "hf" and options.hub else media).name.partition(".")[0]
    speak = options.kind in _TRANSCRIBED and options.speak
    if speak and options.instruction is not None and not options.instruction.strip():
        raise DataError("--instruction is empty: with --speak the user has to ask something")
    common = Common(
        MediaFolder(media, options.allow_outside),
        source=options.source_name or stem,
        language=options.language,
        instruction=options.instruction,
        sound=options.sound,
        speaker=options.speaker if options.kind in _TRANSCRIBED else "",
        speak=speak,
    )
    if options.kind == "wavs":
        heldout = [name for name in options.eval_speaker.split(",") if name]
        split = {"heldout_speakers": heldout, "holdout": options.holdout, "seed": options.seed}
        return labelled_clips(path, parse_names(options.names), common, **split)
    if options.kind == "hf":
        return hf_dataset(
            options.source, common, {name: getattr(options, f"{name}_column") for name in _COLUMNS}, options.hub
        )
    if options.kind == "text":
        return texts(path, common, options.lines)
    if options.kind == "kaldi":
        return kaldi(path, common)
    if options.kind == "lhotse":
        return lhotse(path, common)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    parsers = {
        "manifest": Manifest(common),
        "llava": Chat(common),
        "swift": Chat(common, in_front=True),
        "openai": Chat(common, in_front=True),
        "sharegpt": Chat(common, in_front=True),
        "alpaca": Chat(common, in_front=True),
        "nemo": Nemo(common),
    }
    return {"train": LineSource("train", [path], [stem], parsers[options.kind], keyed=options.kind == "manifest")}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line as a namespace; argparse itself exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser("python -m data.convert", description="Turn data on disk into shards.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, text in KINDS.items():
        kind = kinds.add_parser(name, help=text, description=text)
        _add_own(kind, name)
        _add_common(kind)
    return parser.parse_args(arguments)


def _add_own(kind: argparse.ArgumentParser, name: str) -> None:
    if name == "wavs":
        kind.add_argument("--names", default="", help="texts of the labels: zero,one,... or yes=oui,no=non")
        kind.add_argument("--eval-speaker", default="", help="comma-separated; kept out of training, into OUT/speaker")
        kind.add_argument("--holdout", type=float, default=0.0, help="share of takes that goes to OUT/heldout")
        kind.add_argument("--seed", type=int, default=0, help="chooses the held-out takes")
    elif name == "hf":
        kind.add_argument(
            "--hub", action="store_true", help="the source is a name on the hub, its Parquet is read there"
        )
        for column in _COLUMNS:
            kind.add_argument(f"--{column}-column", default="", help="where its type and usual names do not tell")
    elif name == "text":
        kind.add_argument("--lines", action="store_true", help="a line of .txt is a document, not a file")
    if name in _TRANSCRIBED:
        kind.add_argument("--speak", action="store_true", help="text to speech: recordings are spoken answers")
        kind.add_argument("--speaker", default="", help="speaker of samples that name none")


def _add_common(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("source", help="what to convert")
    kind.add_argument("out", type=Path, help="folder to write, or to go on with")
    kind.add_argument("--media", type=Path, help="folder of the media; else that of the source")
    kind.add_argument("--allow-outside", action="store_true", help="media may lie outside that folder")
    kind.add_argument("--source", dest="source_name", default="", help="name of the source; else the file's")
    kind.add_argument("--language", default="", help="language code of samples that name none")
    kind.add_argument(
        "--instruction", help=f"what the user asks beside media; with --speak: {SAY} {{text}} is the transcript"
    )
    kind.add_argument("--sound", action="store_true", help="films are heard as well as seen")
    kind.add_argument("--tokenizer", type=Path, help="folder with a tokenizer.json; else one is trained")
    kind.add_argument("--vocab-size", type=int, default=512, help="of the trained tokenizer")
    kind.add_argument("--samples-per-shard", type=_positive, default=1000, help="rows of a job, samples of a shard")
    kind.add_argument("--shard-mb", type=_positive, default=1024, help="a shard ends with the sample that reaches it")
    kind.add_argument("--workers", type=_positive, default=1, help="processes")
    kind.add_argument("--dry-run", action="store_true", help="read and check everything, write nothing")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, 1 or more")
    return int(text)


def _plan(options: argparse.Namespace, fingerprint: str) -> dict[str, Any]:
    """The options that shape the result, as they are kept in the journal."""
    chosen = {name: value for name, value in vars(options).items() if name not in _NOT_IN_PLAN}
    here = not (options.kind == "hf" and options.hub)
    chosen["source"] = str(Path(options.source).resolve()) if here else options.source
    chosen["media"] = str(options.media.resolve()) if options.media else ""
    return chosen | {"tokenizer": fingerprint}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 after one line on what is wrong, or 130 after Ctrl-C."""
    options = parse_options(arguments)
    return ended(partial(_convert_and_tell, options), "\nstopped: the same command goes on where it stopped")


def _convert_and_tell(options: argparse.Namespace) -> None:
    if options.out.exists() and not options.out.is_dir():
        raise DataError(f"{options.out}: is a file; name a folder to write to")
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    summary = convert(
        read_source(options),
        options.out,
        _plan(options, tokenizer.fingerprint if tokenizer else "trained"),
        tokenizer=tokenizer,
        vocab_size=options.vocab_size,
        samples_per_shard=options.samples_per_shard,
        max_bytes=options.shard_mb * 1_000_000,
        workers=options.workers,
        dry=options.dry_run,
    )
    say("\n".join(summary.lines()))
    if not summary.total.samples:
        raise DataError(f"{options.source}: nothing to convert; {summary.first_left_out()}")


if __name__ == "__main__":
    sys.exit(main())
