"""Fit a speech codec to the sound in shards: minutes of one core, no download.

    shards --draw utterances, 24 kHz, one level--> log-mel --data/quantizer.py--> codebooks
      codes and waves --data/vocoder.py--> vocoder
      every 20th utterance is held out --> a table of distortions
      --> OUT/codec.json, OUT/codec.safetensors

    python -m data.fit_codec OUT shards=PATTERN[,PATTERN...] [codebooks=16] [codebook_size=512] [blocks=40000]
                             [vocoder_steps=900] [seed=0] [max_seconds=1800] [answers=0]

Every member of a sample that is sound alone is drawn from, whatever part names it: a .flac is, an .mp4 is taken for a
film and is not. Of a sample with a spoken answer only the answer is drawn, and with answers=1 nothing else at all. Of a
member longer than 30 s the first 30 s are used. The same shards, settings and seed give the same bytes on the same
machine. Cost with the defaults: 180 s of one core, 0.16 s for each step of the vocoder, and 1 GB.

Letters: S samples, F frames of log-mel, M mel bands, N blocks, X values of a block, G codebooks, T blocks, B batch.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.audio import EXTENSIONS as AUDIO
from data.audio import decode
from data.corpus import Corpus
from data.errors import BadSample, DataError
from data.hashing import hashed, permutation
from data.interrupts import uninterrupted
from data.kmeans_codec import SAMPLES_PER_FRAME, CodecSettings, levelled, save_codec
from data.quantizer import BLOCK_FRAMES, BLOCK_VALUES, Quantizer, fit_quantizer, perplexities
from data.sample import SPEECH
from data.video import EXTENSIONS as VIDEO
from data.vocoder import SAMPLE_RATE, Vocoder, log_mel, make_vocoder, train_vocoder

USAGE = "usage: python -m data.fit_codec OUT shards=PATTERN[,PATTERN...]"
BLOCKS_PER_CODE = 4  # at least, else a codebook learns its blocks by heart
HELD_OUT_EVERY, HELD_OUT_SECONDS = 20, 60
MEMBER_SECONDS = 30
_BATCH, _SPAN = 8, 13  # crops of a vocoder step, blocks of a crop
_EXACT = 0.3  # share of crops with exact log-mel; the others have that of codes, as in use
_DECIBELS = 20.0 / math.log(10.0)
_SOUND = frozenset(AUDIO) - frozenset(VIDEO)
_COMMA = re.compile(r",(?![^{]*\})")  # not those within braces


@dataclass(frozen=True)
class FitSettings:
    """What the command line sets."""

    codebooks: int = CodecSettings.codebooks
    codebook_size: int = CodecSettings.codebook_size
    blocks: int = 40_000  # that codebooks are fitted to, at most
    vocoder_steps: int = 900
    seed: int = 0
    max_seconds: int = 1800  # of sound that is drawn
    answers: int = 0  # 1: of spoken answers alone

    def check(self) -> CodecSettings:
        """The sizes of the codec. Raises DataError for a setting out of bounds."""
        for name in ("vocoder_steps", "max_seconds"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)}: must be above 0")
        sizes = CodecSettings(self.codebooks, self.codebook_size)
        sizes.check("")
        if self.blocks < self.least_blocks:
            raise DataError(f"blocks={self.blocks}: codebook_size={self.codebook_size} needs {self.least_blocks}")
        return sizes

    @property
    def least_blocks(self) -> int:
        """Blocks that this many codes need to be fitted to."""
        return BLOCKS_PER_CODE * self.codebook_size


@dataclass
class Drawn:
    """Utterances of a corpus, in the order in which they were drawn: float32 [S] at 24 kHz, levelled, whole blocks."""

    used: list[Tensor]
    held_out: list[Tensor]
    left_out: list[str]  # one line for each member that cannot be used
    shortened: int = 0  # members longer than MEMBER_SECONDS

    @property
    def seconds(self) -> float:
        """Of sound to fit to."""
        return sum(map(len, self.used)) / SAMPLE_RATE


class Row(NamedTuple):
    """How far held-out sound is from what some codebooks keep of it: root mean square over log-mel, in dB."""

    levels: int
    codes: float  # the log-mel that the codes stand for
    sound: float  # the log-mel of the decoded sound


def fit(folder: Path, patterns: Sequence[str], settings: FitSettings, quiet: bool = False) -> list[str]:
    """Draw, fit, train and write to the new `folder`; returns lines that say how good it is.

    Raises DataError; then, as after an interrupt, nothing is left behind.
    """
    sizes = settings.check()
    if folder.exists():
        raise DataError(f"{folder}: exists; delete it or choose another folder")
    corpus = Corpus.open(patterns)
    threads, started = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(1)  # sums are then added up in one order, however many cores there are
    try:
        drawn = draw(corpus, settings, quiet)
        mels = [log_mel(wave_S) for wave_S in drawn.used]
        quantizer = _fit_quantizer(blocks_of(mels, settings), sizes, settings.seed, quiet)
        codes_GT = torch.cat([quantizer.encode(mel_FM) for mel_FM in mels], dim=1)
        vocoder = make_vocoder(sizes.width, sizes.layers, settings.seed)
        batches = crops(torch.cat(drawn.used), torch.cat(mels), codes_GT, quantizer, settings.seed)
        _train(vocoder, batches, settings.vocoder_steps, quiet)
        core_seconds = time.process_time() - started
        lines = _report(drawn, codes_GT, quantizer, vocoder)
        about = {"corpus": corpus.fingerprint, "utterances": len(drawn.used), "seconds": drawn.seconds}
        save_codec(folder, sizes, quantizer, vocoder, asdict(settings) | about)
    finally:
        torch.set_num_threads(threads)
    return [*lines, f"{folder}: fitted to {drawn.seconds:,.0f} s of sound in {core_seconds:.0f} s of one core"]


def draw(corpus: Corpus, settings: FitSettings, quiet: bool = False) -> Drawn:
    """Utterances of samples in random order, until there are `max_seconds`.

    Raises DataError where the corpus has no usable sound, or too little to fit this many codes.
    """
    drawn, seconds, held_seconds = Drawn([], [], []), 0.0, 0.0
    with tqdm(total=settings.max_seconds, unit=" s", desc="drawing", disable=quiet) as bar:
        for number, wave_S in enumerate(_heard(corpus, settings, drawn)):
            length = len(wave_S) / SAMPLE_RATE
            if number % HELD_OUT_EVERY == 0 and held_seconds < HELD_OUT_SECONDS:
                drawn.held_out.append(wave_S)
                held_seconds += length
            else:
                drawn.used.append(wave_S)
            bar.update(min(round(length, 2), settings.max_seconds - bar.n))
            seconds += length
            if seconds >= settings.max_seconds:
                break
    if not seconds:
        first = f"; the first left out: {drawn.left_out[0]}" if drawn.left_out else ""
        raise DataError(f"the shards have no usable sound, of which a codec could be fitted{first}")
    if drawn.seconds < (least := settings.least_blocks / 2 * SAMPLES_PER_FRAME / SAMPLE_RATE + 1):
        raise DataError(
            f"{drawn.seconds:.0f} s of sound to fit to, but codebook_size={settings.codebook_size} needs {least:.0f} s:"
            " give more shards, a larger max_seconds or a smaller codebook_size"
        )
    return drawn


def _heard(corpus: Corpus, settings: FitSettings, drawn: Drawn) -> Iterator[Tensor]:
    """The sound of all samples in random order, levelled. What cannot be used is noted in `drawn`."""
    for sample in permutation(corpus.num_samples, settings.seed).tolist():
        shard, row = corpus.locate(sample)
        index = corpus.index(shard)
        kinds = [extension.rpartition(".")[2] in _SOUND for extension in index.about["extensions"]]
        first, last = index.columns["member_offsets"][row : row + 2]
        if not np.isin(index.columns["member_extension"][first:last], np.flatnonzero(kinds)).any():
            continue
        try:
            members = index.read(row, speech=True)
        except BadSample as error:
            drawn.left_out.append(f"{corpus.name(sample)}: {error.reason}")
            continue
        sound = [extension for extension in members if extension.rpartition(".")[2] in _SOUND]
        spoken = [extension for extension in sound if extension.startswith(SPEECH)]
        for extension in (
            spoken if settings.answers else spoken or sound
        ):  # of a sample with a spoken answer only that: the codec is to say such things
            try:
                with uninterrupted():
                    wave_S = decode(members[extension], rate=SAMPLE_RATE)
                if not wave_S.any():
                    raise BadSample("silent throughout")
            except BadSample as error:
                drawn.left_out.append(f"{corpus.name(sample)}: .{extension}: {error.reason}")
                continue
            drawn.shortened += len(wave_S) > MEMBER_SECONDS * SAMPLE_RATE
            yield levelled(torch.from_numpy(wave_S[: MEMBER_SECONDS * SAMPLE_RATE]))


def blocks_of(mels: Sequence[Tensor], settings: FitSettings) -> Tensor:
    """Blocks [N, X] of utterances, each also from half a block on, `settings.blocks` of them at random."""
    half = BLOCK_FRAMES // 2
    blocks_NX = torch.cat([shifted.reshape(-1, BLOCK_VALUES) for mel in mels for shifted in (mel, mel[half:-half])])
    chosen_N = permutation(len(blocks_NX), settings.seed)[: settings.blocks]
    return blocks_NX[torch.from_numpy(np.sort(chosen_N))]


def crops(
    wave_S: Tensor, mel_FM: Tensor, codes_GT: Tensor, quantizer: Quantizer, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (log-mel [B, F, M], wave [B, F * HOP]) for the vocoder, without end.

    Most log-mels are those of codes, of all codebooks, a half or a quarter of them: decoding may use any number.
    """
    codebooks, blocks = codes_GT.shape
    span, levels = min(_SPAN, blocks), sorted({-(-codebooks // 4), -(-codebooks // 2), codebooks})
    for step in itertools.count():
        starts, exact, depths = (hashed(seed, step, what, np.arange(_BATCH)) for what in range(3))
        waves, mels = [], []
        for start, kind, depth in zip((starts % np.uint64(blocks - span + 1)).tolist(), exact, depths, strict=True):
            stop, depth = start + span, levels[int(depth) % len(levels)]
            waves.append(wave_S[start * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME])
            if int(kind) < _EXACT * 2**64:
                mels.append(mel_FM[start * BLOCK_FRAMES : stop * BLOCK_FRAMES])
            else:
                mels.append(quantizer.decode(codes_GT[:depth, start:stop]))
        yield torch.stack(mels), torch.stack(waves)


def _fit_quantizer(blocks_NX: Tensor, sizes: CodecSettings, seed: int, quiet: bool) -> Quantizer:
    with tqdm(total=sizes.codebooks, unit=" codebooks", desc="codebooks", disable=quiet) as bar:
        return fit_quantizer(blocks_NX, sizes.codebooks, sizes.codebook_size, sizes.dimensions, seed, bar.update)


def _train(vocoder: Vocoder, batches: Iterator[tuple[Tensor, Tensor]], steps: int, quiet: bool) -> None:
    with tqdm(train_vocoder(vocoder, batches, steps), total=steps, desc="vocoder", disable=quiet) as bar:
        average = None
        for loss in bar:
            average = loss if average is None else 0.95 * average + 0.05 * loss
            bar.set_postfix_str(f"loss {average:.3f}", refresh=False)


@torch.no_grad()
def _report(drawn: Drawn, codes_GT: Tensor, quantizer: Quantizer, vocoder: Vocoder) -> list[str]:
    """The lines of a table: what is lost of held-out utterances, how codes are used, how fast it is."""
    codebooks, size = quantizer.codebooks_GKD.shape[:2]
    seconds = sum(map(len, drawn.held_out)) / SAMPLE_RATE
    started = time.process_time()
    mels = [log_mel(wave_S) for wave_S in drawn.held_out]
    codes = [quantizer.encode(mel_FM) for mel_FM in mels]
    encoding = (time.process_time() - started) / seconds
    levels = sorted({level for level in (1, 2, 4, 8, 16) if level < codebooks} | {codebooks})
    decoder = copy.deepcopy(vocoder).double()  # as KMeansCodec runs it
    rows, decoding = [], 0.0
    for level in levels:
        started = time.process_time()
        coded = [quantizer.decode(codes_GT[:level]) for codes_GT in codes]
        waves = [decoder(mel_FM[None].double())[0].clamp(-1.0, 1.0).float() for mel_FM in coded]
        decoding = (time.process_time() - started) / seconds
        rows.append(Row(level, _distance(coded, mels), _distance([log_mel(wave) for wave in waves], mels)))
    return [
        f"held out: {len(drawn.held_out)} utterances, {seconds:.0f} s; distance of log-mel frames in dB",
        "codebooks   of the codes   of the sound",
        *[f"{row.levels:9d}{row.codes:15.2f}{row.sound:15.2f}" for row in rows],
        f"codes in use of {size} (perplexity), codebook by codebook: "
        + " ".join(f"{value:.0f}" for value in perplexities(codes_GT, size)),
        f"real-time factor: encoding {encoding:.4f}, decoding {decoding:.4f}",
        f"{len(drawn.left_out)} members left out, {drawn.shortened} used only for their first {MEMBER_SECONDS} s",
        *[f"left out: {line}" for line in drawn.left_out[:10]],
    ]


def _distance(made: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    return _DECIBELS * float((torch.cat(list(made)) - torch.cat(list(true))).square().mean().sqrt())


def parse(arguments: Sequence[str]) -> tuple[Path, list[str], FitSettings]:
    """Folder, patterns of shards and settings of a command line. Raises DataError."""
    known = {field.name: field for field in fields(FitSettings)}
    folders, patterns, values = [], [], {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            folders.append(argument)
        elif name == "shards":
            patterns += [pattern for pattern in _COMMA.split(value) if pattern]
        elif name not in known:
            raise DataError(f"{name}: no such setting; there are shards, {', '.join(known)}")
        elif not re.fullmatch(r"[0-9]{1,12}", value):
            raise DataError(f"{argument}: must be a whole number")
        else:
            values[name] = int(value)
    if len(folders) != 1 or not patterns:
        raise DataError(f"{USAGE} {' '.join(f'[{name}={field.default}]' for name, field in known.items())}")
    return Path(folders[0]), patterns, FitSettings(**values)


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status: 0, 2 after one line on what is wrong, 130 when interrupted."""
    try:
        lines = fit(*parse(arguments))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
