"""The samples of bench/data.py, and how each contestant stores them: made in one pass, so that all read the same bytes.

    records --write_shards--> FOLDER/tar/*.tar + *.index      ours, webdataset; with `energon prepare` energon
            --MDSWriter-----> FOLDER/mds/                     mosaicml-streaming
    both    --hard links----> FOLDER/far                      a million samples that take no room

Three of four samples are a picture of 640 x 480 as a JPEG of about 77 KB with a question and an answer, the fourth is
three seconds of sound as FLAC of about the same size. 128 pictures and 32 clips, each under many keys: every sample has
its own bytes on disk, so reading is honest, and making them takes seconds. Cost: 1.2 GB of disk for 8,000 samples.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from data.sample import SampleRecord
from data.shards import write_shards
from data.tokenizer import Tokenizer, train_tokenizer

PICTURES, CLIPS, SHARDS = 128, 32, 8
WORDS = "a the of red green blue small large round square dog cat bird house river stone walks sleeps sings over under"


@dataclass(frozen=True)
class Stored:
    """Where the samples lie. `links` repeats the shards until there are `far` samples."""

    tars: list[Path]
    mds: Path | None  # None without mosaicml-streaming
    samples: int
    far: int
    far_tars: list[Path]
    far_mds: Path | None


def store(folder: Path, samples: int, far: int) -> tuple[Stored, Tokenizer]:
    """Write `samples` samples for every contestant that is installed, linked up to at least `far` of them."""
    texts = [answer(number) for number in range(200)]
    tokenizer = train_tokenizer(texts, 400)
    media = picture_bytes(), sound_bytes()
    per_shard = -(-samples // SHARDS)
    tars = write_shards(records(samples, *media), folder / "tar", tokenizer, per_shard).paths
    rounds = -(-far // samples)
    far_tars = []
    for number in range(rounds):
        part = folder / "far" / f"{number:04d}"
        part.mkdir(parents=True)
        far_tars += [part / path.name for path in tars]
        for path in (*tars, *(path.with_name(path.name + ".index") for path in tars)):
            os.link(path, part / path.name)
    mds = far_mds = None
    if streaming := importable("streaming"):
        mds, far_mds = folder / "mds", folder / "far-mds"
        write_mds(streaming, records(samples, *media), mds)
        link_mds(mds, far_mds, rounds)
    return Stored(tars, mds, samples, rounds * samples, far_tars, far_mds), tokenizer


def records(count: int, pictures: list[bytes], sounds: list[bytes]) -> Iterator[SampleRecord]:
    """Samples in order: three pictures, then a sound."""
    for number in range(count):
        if number % 4 < 3:
            part, media = {"type": "image", "image": "jpg"}, {"jpg": pictures[number % len(pictures)]}
        else:
            part, media = {"type": "audio", "audio": "flac"}, {"flac": sounds[number // 4 % len(sounds)]}
        question = {"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}
        reply = {"role": "assistant", "content": answer(number)}
        yield SampleRecord(f"{number:08d}", [question, reply], media, language="en", source="bench")


def answer(number: int) -> str:
    """12 to 60 words."""
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS.split(), rng.integers(12, 61)))


def picture_bytes() -> list[bytes]:
    """Smooth colours with grain, 640 x 480."""
    rng, out = np.random.default_rng(0), []
    for _ in range(PICTURES):
        pixels_HWC = rng.normal(128, 8, (480, 640, 1)).repeat(3, axis=2)
        for cells, strength in ((6, 90), (24, 50), (96, 25)):
            coarse_HWC = rng.normal(0, strength, (cells * 3 // 4 + 1, cells, 3)).astype(np.float32)
            for colour in range(3):
                smooth = Image.fromarray(coarse_HWC[..., colour]).resize((640, 480), Image.Resampling.BICUBIC)
                pixels_HWC[..., colour] += np.asarray(smooth)
        file = io.BytesIO()
        Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=80)
        out.append(file.getvalue())
    return out


def sound_bytes() -> list[bytes]:
    """Three seconds of chords with breath, 16 kHz."""
    rng, out = np.random.default_rng(1), []
    seconds_S = np.arange(3 * 16_000) / 16_000
    for _ in range(CLIPS):
        wave_S = rng.normal(0, 0.01, len(seconds_S))
        for hertz in rng.uniform(80, 3_000, 6):
            wave_S += 0.1 * np.sin(2 * np.pi * hertz * seconds_S) * np.sin(rng.uniform(1, 9) * seconds_S)
        file = io.BytesIO()
        soundfile.write(file, wave_S.astype(np.float32), 16_000, format="FLAC")
        out.append(file.getvalue())
    return out


def importable(name: str) -> Any | None:
    """The module, or None where it is not installed or does not load."""
    if name == "streaming":
        stub_torchvision()
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken install raises nearly anything
        if not isinstance(error, ModuleNotFoundError) or error.name != name.split(".")[0]:
            print(f"{name} does not load: {error}")
        return None


def stub_torchvision() -> None:
    """mosaicml-streaming imports torchvision, whose release build does not load beside a CPU-only torch.

    Three names of it that are never used here stand in. transformers looks for it, too, and must have looked before.
    """
    try:
        importlib.import_module("transformers.feature_extraction_utils")
    except ImportError:
        return
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules.setdefault(name, types.ModuleType(name))
    setattr(sys.modules["torchvision.datasets"], "VisionDataset", object)  # noqa: B010 - a stub has no such attribute
    setattr(sys.modules["torchvision.transforms.functional"], "to_tensor", None)  # noqa: B010


def write_mds(streaming: Any, samples: Iterator[SampleRecord], folder: Path) -> None:
    """Shards of MDS, of the size that its own examples use, without compression or hashes."""
    columns = {"key": "str", "json": "bytes", "extension": "str", "media": "bytes"}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=1 << 26) as writer:
        for record in samples:
            ((extension, media),) = record.media.items()
            writer.write({"key": record.key, "json": record.to_json(), "extension": extension, "media": media})


def link_mds(source: Path, target: Path, rounds: int) -> None:
    """The shards of `source`, `rounds` times over, under one index."""
    target.mkdir()
    index = json.loads((source / "index.json").read_text())
    shards = []
    for number in range(rounds):
        for shard in index["shards"]:
            name = f"{number:04d}.{shard['raw_data']['basename']}"
            os.link(source / shard["raw_data"]["basename"], target / name)
            shards.append(shard | {"raw_data": shard["raw_data"] | {"basename": name}})
    (target / "index.json").write_text(json.dumps(index | {"shards": shards}))


def warm(folder: Path) -> None:
    """Read every file once, so that all find their bytes in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file, open(os.devnull, "wb") as nowhere:
                shutil.copyfileobj(file, nowhere, 1 << 22)
