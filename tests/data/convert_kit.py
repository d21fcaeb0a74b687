"""Small sources of every kind for the tests of the converters, and what came of them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from data.convert import main
from data.sample import SampleRecord, parse_sample
from data.shard_index import ShardIndex
from tests.data.audio_bytes import encode, tone


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def converts(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a conversion that goes well prints."""
    status, printed, error = run(capsys, *arguments)
    assert status == 0, error
    return printed


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    status, _, error = run(capsys, *arguments)
    assert status == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def counts(printed: str, split: str = "train") -> tuple[int, int, int]:
    """(samples, shards, left out) of a split in the table."""
    line = next(line for line in printed.splitlines() if line.split()[:1] == [split])
    cells = line.split()
    return int(cells[1]), int(cells[2]), int(cells[8])


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None and info.name not in found
                found[info.name] = file.read()
    return found


def keys(folder: Path) -> set[str]:
    return {name.partition(".")[0] for name in members(folder)}


def samples(folder: Path) -> dict[str, SampleRecord]:
    """The usable samples of a split, with their media, as the indexes give them."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        index = ShardIndex.open(path)
        for row in range(index.num_samples):
            content = index.read(row, speech=True)
            record = parse_sample(index.key(row), content.pop("json"))
            record.media.update(content)  # type: ignore[attr-defined]
            assert record.key not in found
            found[record.key] = record
    return found


def said(record: SampleRecord) -> str:
    """The text of the assistant's last turn."""
    content = record.messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_lines(path: Path, *lines: Any) -> Path:
    """JSONL of objects; strings and bytes are lines as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def clip(seconds: float = 0.3, hz: float = 440.0, kind: str = "wav", rate: int = 16_000) -> bytes:
    return encode(tone(rate, seconds, hz), rate, kind)


def picture(colour: tuple[int, int, int] = (200, 30, 40), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(file, kind)
    return file.getvalue()


def film(seconds: float = 1.0, sound: bool = False) -> bytes:
    """An mp4 of changing grey, perhaps with a tone."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=8)
        video.width, video.height = 64, 48
        heard = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for i in range(round(8 * seconds)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * i % 256, np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        if heard is not None:
            wave = av.AudioFrame.from_ndarray(tone(16_000, seconds)[None], format="fltp", layout="mono")
            wave.sample_rate = 16_000
            container.mux(heard.encode(wave))
            container.mux(heard.encode(None))
        container.mux(video.encode(None))
    return file.getvalue()


def media_folder(folder: Path) -> Path:
    """a.wav, b.flac, red.png, blue.jpg, film.mp4, loud.mp4, and zero.wav, broken.wav, broken.jpg."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "a.wav": clip(),
        "b.flac": clip(0.5, 300, "flac"),
        "red.png": picture(),
        "blue.jpg": picture((10, 20, 200), "JPEG"),
        "film.mp4": film(),
        "loud.mp4": film(sound=True),
        "zero.wav": b"",
        "broken.wav": b"RIFF no sound",
        "broken.jpg": picture((1, 2, 3), "JPEG")[:100],
    }
    for name, payload in files.items():
        (folder / name).write_bytes(payload)
    return folder
