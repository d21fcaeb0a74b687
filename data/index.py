"""Make the indexes of shards: one pass over each tar that counts tokens and measures media.

    NAME.tar --headers--> samples --JSON: text tokens; audio: decoded length; images, videos: sizes, times; crc32-->
      NAME.tar.index

    python -m data.index SHARDS... tokenizer=FOLDER [workers=N]     # skips shards whose index is still good

A sample that cannot be used (no .json, undecodable or empty audio, ...) is left out of the index, and the index
says why; a tar that cannot be trusted (truncated, damaged, links, paths that leave it) is refused as a whole. The
speech of an answer has its place and crc32 in the index and is not decoded: that is for data.codes.
Cost: the decoding of all audio, sound and images once, one process for each shard in work; of a video one frame.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32
from tqdm import tqdm

from data.audio import decode
from data.chat import gaps, wrap
from data.costs import AUDIO, FILM, IMAGE, KINDS, VIDEO
from data.document import MediaLimits
from data.errors import BadSample, DataError
from data.interrupts import deaf_workers, uninterrupted
from data.sample import MAX_JSON_BYTES, Medium, SampleRecord, media_of, parse_sample, speech_of
from data.shard_index import ShardIndex, header_digest, headers, save_index
from data.tar import BLOCK, TarMember, group_samples, read_members, read_range
from data.terminal import ended, say
from data.tokenizer import Tokenizer, load_tokenizer
from data.video import measure_video
from data.vision import measure_image

_SETTING = re.compile(r"[a-z_]+=(?!.*\.tar$)")

__all__ = ["ShardIndex", "Size", "build_index", "build_indexes", "main", "measure"]


@dataclass
class _Columns:
    """Columns of an index while it grows; names and meanings as in data.shard_index.COLUMNS."""

    key_offsets: list[int] = field(default_factory=lambda: [0])
    key_bytes: bytearray = field(default_factory=bytearray)
    member_offsets: list[int] = field(default_factory=lambda: [0])
    member_start: list[int] = field(default_factory=list)
    member_size: list[int] = field(default_factory=list)
    member_crc: list[int] = field(default_factory=list)
    member_extension: list[int] = field(default_factory=list)
    media_offsets: list[int] = field(default_factory=lambda: [0])
    media_kind: list[int] = field(default_factory=list)
    media_samples: list[int] = field(default_factory=list)
    media_height: list[int] = field(default_factory=list)
    media_width: list[int] = field(default_factory=list)
    media_frames: list[int] = field(default_factory=list)
    media_seconds: list[float] = field(default_factory=list)
    media_text: list[int] = field(default_factory=list)
    text_tokens: list[int] = field(default_factory=list)
    document: list[int] = field(default_factory=list)
    language: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    codes: dict[str, dict[str, int]] = field(default_factory=lambda: {"extensions": {}, "languages": {}, "sources": {}})

    def code(self, table: str, name: str) -> int:
        """Number of `name` in a table of names, which grows as names come up. Raises BadSample where it is full."""
        codes = self.codes[table]
        if name not in codes and len(codes) > np.iinfo(np.uint16).max:
            raise BadSample(f"its shard has more than {len(codes):,} different {table}")
        return codes.setdefault(name, len(codes))


class Size(NamedTuple):
    """What the index will say of one medium; the fields that a kind does not have are 0."""

    kind: int
    samples: int = 0
    height: int = 0
    width: int = 0
    frames: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Sample:
    """What the index will say of one sample."""

    record: SampleRecord
    gaps: list[int]  # text tokens before, between and after the media
    wraps: int  # tokens around placeholders
    sizes: list[Size]
    members: list[tuple[TarMember, int]]  # with their crc32


def build_index(tar: Path, tokenizer: Tokenizer, limits: MediaLimits | None = None) -> ShardIndex:
    """Read `tar` once and write its index.

    Raises DataError for a tar that cannot be trusted or holds no usable sample; samples that cannot be used are
    named in `about["left_out"]`.
    """
    limits = limits or MediaLimits()
    groups = group_samples(tar, read_members(tar))
    columns, left_out = _Columns(), []
    with open(tar, "rb") as file:
        for key, members in groups:
            try:
                _append(columns, key, _measure(file.fileno(), key, members, tokenizer, limits))
            except BadSample as error:
                left_out.append(f"{tar.name}:{key}: {error.reason}")
        if not columns.text_tokens:
            first = f"; the first: {left_out[0]}" if left_out else ""
            raise DataError(f"{tar}: holds no usable sample{first}")
        save_index(tar, _about(tar, file.fileno(), columns, tokenizer, left_out), vars(columns))
    return ShardIndex.open(tar)


def _measure(fd: int, key: str, members: dict[str, TarMember], tokenizer: Tokenizer, limits: MediaLimits) -> _Sample:
    if "json" not in members:
        raise BadSample(f"has no .json member (found: {', '.join(f'.{name}' for name in sorted(members))})")
    if members["json"].size > MAX_JSON_BYTES:
        raise BadSample(f"its .json has {members['json'].size} bytes, the limit is {MAX_JSON_BYTES}")
    payload = read_range(fd, members["json"].start, members["json"].size)
    record = parse_sample(key, payload)
    media, speech = media_of(record), speech_of(record)
    used = [(members["json"], crc32(payload))]
    sizes: dict[Medium, Size] = {}
    named = [medium.extension for medium in media] + ([speech.extension] if speech else [])
    for extension in dict.fromkeys(named):
        member = members.get(extension)
        if member is None:
            raise BadSample(f"its .json names .{extension}, which is not there")
        if member.size > limits.max_bytes:
            raise BadSample(f".{extension} has {member.size} bytes, the limit is {limits.max_bytes}")
        content = read_range(fd, member.start, member.size)
        used.append((member, crc32(content)))
        for medium in set(media):
            if medium.extension == extension:
                sizes[medium] = measure(medium, content, limits)
    runs, wraps = gaps(record, tokenizer), sum(map(wrap, media))
    return _Sample(record, runs, wraps, [sizes[medium] for medium in media], used)


def measure(medium: Medium, payload: bytes, limits: MediaLimits) -> Size:
    """What an index says of a medium; decodes all of audio, sound and images, and the first frame of a video.

    Raises BadSample where it cannot be used.
    """
    with uninterrupted():
        if medium.kind == "audio":
            return Size(AUDIO, len(decode(payload, limits.audio)))
        if medium.kind == "image":
            height, width = measure_image(payload, limits.image, check=True)
            return Size(IMAGE, height=height, width=width)
        film = measure_video(payload, limits.video, sound=medium.sound)
    if medium.sound and not film.sound_samples:
        raise BadSample(f'.{medium.extension} has no sound, though its part says "sound": true')
    kind, samples = (FILM, film.sound_samples) if medium.sound else (VIDEO, 0)
    return Size(kind, samples, film.height, film.width, film.frames, film.seconds)


def _append(columns: _Columns, key: str, sample: _Sample) -> None:
    language, source = columns.code("languages", sample.record.language), columns.code("sources", sample.record.source)
    extensions = [columns.code("extensions", member.extension) for member, _ in sample.members]
    columns.key_bytes += key.encode()
    columns.key_offsets.append(len(columns.key_bytes))
    for (member, crc), extension in zip(sample.members, extensions, strict=True):
        columns.member_start.append(member.start)
        columns.member_size.append(member.size)
        columns.member_crc.append(crc)
        columns.member_extension.append(extension)
    columns.member_offsets.append(len(columns.member_start))
    for size, text in zip(sample.sizes, sample.gaps, strict=False):
        for name, value in size._asdict().items():
            getattr(columns, f"media_{name}").append(value)
        columns.media_text.append(text)
    columns.media_offsets.append(len(columns.media_kind))
    columns.text_tokens.append(sum(sample.gaps) + sample.wraps)
    columns.document.append(bool(sample.record.segments))
    columns.language.append(language)
    columns.source.append(source)


def _about(tar: Path, fd: int, columns: _Columns, tokenizer: Tokenizer, left_out: list[str]) -> dict:
    offsets = np.asarray(columns.media_offsets)
    kinds = np.asarray(columns.media_kind, np.int64)
    owners = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    samples = np.bincount(owners, np.asarray(columns.media_samples), len(offsets) - 1)
    counts = [np.bincount(owners[kinds == kind], minlength=1).max() for kind in range(len(KINDS))]
    starts = headers(np.asarray(columns.member_start, np.int64))
    groups = Counter(zip(columns.source, columns.language, strict=True))
    return {
        "tar_size": tar.stat().st_size,
        "header_digest": header_digest(starts, [os.pread(fd, BLOCK, start - BLOCK) for start in starts]),
        "tokenizer": tokenizer.fingerprint,
        **{table: list(names) for table, names in columns.codes.items()},
        "left_out": left_out,
        "groups": [[source, language, count] for (source, language), count in groups.items()],
        "max_text_tokens": max(columns.text_tokens),
        "max_samples": int(samples.max()),
        "max_media": [int(count) for count in counts],
    }


def is_current(tar: Path, tokenizer: Tokenizer) -> bool:
    """Whether `tar` has an index that is its own and was made with this tokenizer."""
    try:
        index = ShardIndex.open(tar)
        index.verify()
    except DataError:
        return False
    return index.about["tokenizer"] == tokenizer.fingerprint


def build_indexes(
    tars: Sequence[Path], tokenizer: Tokenizer, workers: int = 1, limits: MediaLimits | None = None, quiet: bool = False
) -> list[str]:
    """Index every tar that has no current index, several at a time; returns a line for each sample left out.

    Raises DataError for the first tar that cannot be indexed, after the others in work are finished.
    """
    waiting = [tar for tar in tars if not is_current(tar, tokenizer)]
    with tqdm(total=len(tars), initial=len(tars) - len(waiting), unit="shard", desc="index", disable=quiet) as bar:
        if workers <= 1 or len(waiting) <= 1:
            for tar in waiting:
                build_index(tar, tokenizer, limits)
                bar.update()
        else:
            _build_in_parallel(waiting, tokenizer, workers, limits, bar)
    return [line for tar in tars for line in ShardIndex.open(tar).about["left_out"]]


def _build_in_parallel(
    tars: Sequence[Path], tokenizer: Tokenizer, workers: int, limits: MediaLimits | None, bar: tqdm
) -> None:
    with ProcessPoolExecutor(min(workers, len(tars)), deaf_workers("data.index")) as pool:
        jobs = [pool.submit(_build_quietly, tar, tokenizer, limits) for tar in tars]
        try:
            for job in as_completed(jobs):
                job.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _build_quietly(tar: Path, tokenizer: Tokenizer, limits: MediaLimits | None) -> None:
    build_index(tar, tokenizer, limits)  # the index itself need not travel back


USAGE = "usage: python -m data.index SHARDS... tokenizer=FOLDER [workers=N]"


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        say(USAGE)
        return 0
    gone_on = "interrupted; the same command goes on with the shards that have no index yet"
    return ended(lambda: _index(arguments), gone_on, (BrokenProcessPool,))


def _index(arguments: Sequence[str]) -> None:
    settings = dict(argument.split("=", 1) for argument in arguments if _SETTING.match(argument))
    given = [argument for argument in arguments if not _SETTING.match(argument)]
    # a quoted pattern is expanded here: a shell's own expansion of many shards can be too long for a command line
    tars = [Path(path) for argument in given for path in sorted(glob.glob(argument)) or [argument]]
    unknown, workers = sorted(set(settings) - {"tokenizer", "workers"}), settings.get("workers", "1")
    option = next((argument for argument in given if argument.startswith("-")), None)
    if option:
        raise DataError(f"unknown option {option}; {USAGE}")
    if not tars or "tokenizer" not in settings or unknown:
        raise DataError(USAGE)
    if not workers.isdigit() or workers == "0":
        raise DataError(f"workers={workers}: must be a whole number above 0")
    if remote := next((argument for argument in given if "://" in argument), None):
        raise DataError(f"{remote}: indexes are made of local shards; copy it here, or index it where it was written")
    if folder := next((tar for tar in tars if tar.is_dir()), None):
        raise DataError(f"{folder}: is a folder; name its shards: '{folder}/*.tar'")
    left_out = build_indexes(tars, load_tokenizer(settings["tokenizer"]), int(workers))
    for line in left_out[:20]:
        print(f"left out: {line}", file=sys.stderr)
    say(f"{len(tars)} shards indexed, {len(left_out)} samples left out")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
