"""Speech that lies on disk in a common form, turned into shards.

    python -m data.convert wavs FOLDER_OR_TAR OUT --names zero,one,two --eval-speaker nicolas --holdout 0.1
    python -m data.convert manifest FILE.jsonl OUT
    python -m data.convert hf FOLDER OUT

`wavs` takes files named {label}_{speaker}_{n}.wav and writes OUT/train, OUT/heldout (a random share of the
takes of the training speakers) and OUT/speaker (speakers kept out altogether). `manifest` takes one JSON
object a line: "audio" (a path, from the manifest's folder) and "text", or "messages" whose audio parts hold
paths; "language", "speaker" and "key" are optional. `hf` takes what `datasets` wrote with save_to_disk. The
last two write OUT/train, or a folder for each split of the dataset. OUT/tokenizer is a copy of --tokenizer,
or trained on the training texts. Audio keeps its bytes. What cannot be used is counted and printed. Cost: one
decode of every clip, for the index.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from data.convert_hf import hf_dataset
from data.errors import DataError
from data.shards import write_shards
from data.sources import Source, labelled_clips, manifest
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

MAX_SHOWN = 10


def write_splits(splits: Mapping[str, Source], out: Path, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Write each split to OUT/split, and print what was written and what was left out."""
    for name, source in splits.items():
        report = write_shards(
            source.records(), out / name, tokenizer, options.samples_per_shard, workers=options.workers
        )
        left_out = source.left_out + report.left_out
        print(f"{out / name}: {report.num_samples} samples in {len(report.paths)} shards, {len(left_out)} left out")
        for line in left_out[:MAX_SHOWN]:
            print(f"  left out: {line}")
        if len(left_out) > MAX_SHOWN:
            print(f"  and {len(left_out) - MAX_SHOWN} more")


def tokenizer_for(splits: Mapping[str, Source], folder: Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer in `folder`, or else one trained on the texts of the training split."""
    if folder is not None:
        return load_tokenizer(folder)
    train = splits.get("train") or next(iter(splits.values()))
    return train_tokenizer(train.texts(), vocab_size)


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
    if options.kind == "wavs":
        return labelled_clips(
            options.source,
            parse_names(options.names),
            heldout_speakers=[name for name in options.eval_speaker.split(",") if name],
            holdout=options.holdout,
            instruction=options.instruction,
            language=options.language,
            seed=options.seed,
        )
    if options.kind == "manifest":
        return manifest(options.source, options.instruction, options.language)
    return hf_dataset(
        options.source,
        options.instruction,
        audio_column=options.audio_column,
        text_column=options.text_column,
        language=options.language,
    )


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line as a namespace; argparse itself exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser("python -m data.convert", description="Turn speech on disk into shards.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    wavs = kinds.add_parser("wavs", help="a folder or tar of {label}_{speaker}_{n}.wav")
    wavs.add_argument("--names", default="", help="texts of the labels: zero,one,... or yes=oui,no=non")
    wavs.add_argument("--eval-speaker", default="", help="comma-separated; kept out of training, into OUT/speaker")
    wavs.add_argument("--holdout", type=float, default=0.0, help="share of takes that goes to OUT/heldout")
    wavs.add_argument("--seed", type=int, default=0, help="chooses the held-out takes")
    hf = kinds.add_parser("hf", help="a folder written by datasets' save_to_disk")
    hf.add_argument("--audio-column", default="audio")
    hf.add_argument("--text-column", default="text")
    for kind in (wavs, kinds.add_parser("manifest", help="a JSONL file, one sample a line"), hf):
        kind.add_argument("source", type=Path)
        kind.add_argument("out", type=Path)
        kind.add_argument("--instruction", default="Transcribe.", help="what the user asks beside the audio")
        kind.add_argument("--language", default="", help="language code of samples that name none")
        kind.add_argument("--tokenizer", type=Path, help="folder with a tokenizer.json; else one is trained")
        kind.add_argument("--vocab-size", type=int, default=512, help="of the trained tokenizer")
        kind.add_argument("--samples-per-shard", type=int, default=1000)
        kind.add_argument("--workers", type=int, default=1, help="processes that decode for the index")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 after one line on what is wrong."""
    options = parse_options(arguments)
    try:
        splits = read_source(options)
        if not any(next(source.texts(), None) for source in splits.values()):
            first = next((line for source in splits.values() for line in source.left_out), "it is empty")
            raise DataError(f"{options.source}: nothing to convert; {first}")
        tokenizer = tokenizer_for(splits, options.tokenizer, options.vocab_size)
        write_splits(splits, options.out, tokenizer, options)
        tokenizer.save(options.out / "tokenizer")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
