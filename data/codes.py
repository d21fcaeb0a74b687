"""Speech of answers to codec codes, beside the shards that hold it.

    for each sample with speech: .json + recording --decode at the codec's rate--> waveform --check, Codec.encode-->
      NAME.tar.codes.partial --whole shard--> NAME.tar.codes (data/code_store.py)

    python -m data.codes codec=FOLDER shards=PATTERN[,PATTERN] [max_seconds=60] [workers=1] [device=cpu] [replace=true]

The shards stay as they are. Utterances are encoded one by one, since a codec's codes may depend on what is beside an
utterance. What cannot be used is left out, named and counted. A shard whose codes are there already is skipped; one
that was interrupted goes on at its next utterance. Codes of another codec or limit are refused unless replaced.
Each process encodes on one thread, so that codes do not depend on the number of cores; `workers` takes more of them.
Cost: that of the codec; decoding takes about 1 ms a second of speech. Memory: one utterance, and a shard's codes.

Letters: S samples at the codec's rate, G codebooks, T frames.
"""

from __future__ import annotations

import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.audio import Limits, decode
from data.code_store import CodesWriter, ShardCodes, about_codes, codes_location, difference
from data.codec import Codec, open_codec
from data.corpus import Corpus
from data.errors import BadSample, DataError
from data.interrupts import uninterrupted
from data.report import MAX_ROWS, Table, as_text, hours, printable
from data.sample import parse_sample, speech_of
from data.shard_index import ShardIndex

SILENCE = 1e-4  # of full scale: a recording that nowhere reaches it is none
LAST_SECONDS = 5.0  # that a worker gets for the utterance in work when it has to end
USAGE = (
    "usage: python -m data.codes codec=FOLDER shards=PATTERN[,PATTERN] [max_seconds=60] [workers=1] [device=cpu] "
    "[replace=true]"
)
KNOWN = {"codec": "", "shards": "", "max_seconds": "60", "workers": "1", "device": "cpu", "replace": "false"}


@dataclass
class Summary:
    """What the codes of a corpus are, over all its shards."""

    shards: int = 0
    silent: int = 0  # samples without speech
    speakers: dict[str, tuple[int, float]] = field(default_factory=dict)  # utterances and seconds of each
    left_out: Counter[str] = field(default_factory=Counter)  # reasons, their numbers as N
    examples: dict[str, str] = field(default_factory=dict)  # a whole line for each reason
    not_indexed: int = 0  # samples that the indexes leave out

    @property
    def utterances(self) -> int:
        """That have codes."""
        return sum(count for count, _ in self.speakers.values())

    @property
    def seconds(self) -> float:
        """Of all of them."""
        return sum(seconds for _, seconds in self.speakers.values())


def encode_shards(
    corpus: Corpus,
    codec: Codec,
    *,
    max_seconds: float = 60.0,
    replace: bool = False,
    workers: int = 1,
    reopen: Callable[[], Codec] | None = None,
    quiet: bool = True,
) -> Summary:
    """Write what is missing beside the shards of `corpus`, several at a time.

    `reopen` gives each further process its codec, the same as `codec`; without it one process does all. Raises
    DataError before any work where no sample has speech, and where a shard has codes of another codec or `max_seconds`
    and `replace` is false.
    """
    spoken = [len(corpus.index(shard).speech_rows()) for shard in range(len(corpus.paths))]
    if not sum(spoken):
        raise DataError(f"{corpus.paths[0]}: no answer of these shards has speech (docs/data.md says how it would)")
    shards = range(len(corpus.paths))
    waiting = [shard for shard in shards if not is_current(corpus.index(shard), codec, max_seconds, replace)]
    done = sum(spoken) - sum(spoken[shard] for shard in waiting)
    with tqdm(total=sum(spoken), initial=done, unit=" utterances", desc="codes", disable=quiet) as bar:
        if workers <= 1 or len(waiting) <= 1 or reopen is None:
            for shard in waiting:
                encode_shard(corpus.index(shard), codec, max_seconds, replace, bar.update)
        else:
            tars = [corpus.paths[shard] for shard in waiting]
            _encode_in_parallel(tars, reopen, max_seconds, replace, workers, bar)
    return summarize(corpus)


def is_current(index: ShardIndex, codec: Codec, max_seconds: float, replace: bool) -> bool:
    """Whether a shard has these codes already. Raises DataError where it has others, unless they are replaced."""
    path = Path(codes_location(index.tar))
    if "://" in index.tar or not path.exists():
        return False
    try:
        found, wanted = ShardCodes.open(index.tar, index).about, about_codes(index, codec, max_seconds)
        if any(found[name] != value for name, value in wanted.items()):
            raise DataError(f"{path}: {difference(found, wanted)}; replace=true makes it anew")
    except DataError:
        if replace:
            return False
        raise
    return True


def encode_shard(
    index: ShardIndex, codec: Codec, max_seconds: float, replace: bool, advance: Callable[[int], object] = int
) -> None:
    """Write the codes of one shard, from where an earlier process stopped; `advance` hears of utterances done."""
    with CodesWriter(index, codec, max_seconds, replace) as writer:
        rows = index.speech_rows()
        advance(int(np.count_nonzero(rows < writer.next_row)))
        for row in rows[rows >= writer.next_row].tolist():
            try:
                codes_GT, speaker = encode_row(index, row, codec, max_seconds)
                writer.add(row, codes_GT, speaker)
            except BadSample as error:
                writer.leave_out(row, error.reason)
            advance(1)
        writer.finish()


def encode_row(index: ShardIndex, row: int, codec: Codec, max_seconds: float) -> tuple[Tensor, str]:
    """Codes [G, T] of a sample's speech, and its speaker. Raises BadSample where it cannot be used."""
    limits = replace(Limits(), max_seconds=max_seconds)
    members = index.read_speech(row, limits.max_bytes)
    speech = speech_of(parse_sample(index.key(row), members.get("json", b"")))
    if speech is None or speech.extension not in members:
        raise BadSample("its .json names no speech that is there")
    with uninterrupted():
        wave_S = decode(members[speech.extension], limits, codec.sample_rate)
    frame = codec.sample_rate / codec.frame_rate
    if len(wave_S) < frame:
        seconds = len(wave_S) / codec.sample_rate
        raise BadSample(f"speech lasts {seconds:.3g} s, less than a frame of the codec, {1 / codec.frame_rate:.3g} s")
    if np.abs(wave_S).max() < SILENCE:
        raise BadSample(f"speech is silence: no sample reaches {SILENCE:g} of full scale")
    return codec.encode(torch.from_numpy(wave_S)), speech.speaker


def summarize(corpus: Corpus) -> Summary:
    """Count the codes of a corpus. Raises DataError for a shard without them."""
    found = Summary(shards=len(corpus.paths))
    for shard, tar in enumerate(corpus.paths):
        index = corpus.index(shard)
        codes = ShardCodes.open(tar, index)
        frames_N = codes.frames(slice(None))
        found.silent += index.num_samples - len(index.speech_rows())
        found.not_indexed += len(index.about["left_out"])
        for row in np.flatnonzero(frames_N).tolist():
            count, seconds = found.speakers.get(name := codes.speaker(row), (0, 0.0))
            found.speakers[name] = count + 1, seconds + int(frames_N[row]) / codes.about["frame_rate"]
        for line in codes.about["left_out"]:
            reason = re.sub(r"\d+(\.\d+)?", "N", line.partition(": ")[2])
            found.left_out[reason] += 1
            found.examples.setdefault(reason, f"{corpus.names[shard]}:{line}")
    return found


def tables(found: Summary) -> list[Table]:
    """Utterances by speaker, and what was left out."""
    ranked = sorted(found.speakers.items(), key=lambda item: (-item[1][1], item[0]))
    rows = [[name or "(unknown)", f"{count:,}", hours(seconds)] for name, (count, seconds) in ranked]
    if len(rows) > MAX_ROWS:
        rest = [value for _, value in ranked[MAX_ROWS - 1 :]]
        count, seconds = sum(count for count, _ in rest), sum(seconds for _, seconds in rest)
        rows[MAX_ROWS - 1 :] = [[f"({len(rest)} others)", f"{count:,}", hours(seconds)]]
    total = ["all", f"{found.utterances:,}", hours(found.seconds)]
    title = f"codes of speech in {found.shards:,} shards, {len(found.speakers):,} speakers"
    shown = [Table(title, ["speaker", "utterances", "speech"], rows, total=total)]
    if found.left_out:
        common = [(f"{count:,}", found.examples[reason]) for reason, count in found.left_out.most_common()]
        all_of_them = [f"{found.left_out.total():,}", "all"]
        header = ["utterances", "for instance"]
        shown.append(Table("speech that has no codes", header, common[:MAX_ROWS], words=(1,), total=all_of_them))
    return shown


def _encode_in_parallel(
    tars: Sequence[str], reopen: Callable[[], Codec], max_seconds: float, replace: bool, workers: int, bar: tqdm
) -> None:
    """Encode every n-th shard in each of n processes. They end with this one: what they wrote is not lost."""
    context = get_context("forkserver")  # forking a process that has threads can deadlock
    context.set_forkserver_preload(["data.code_store"])  # the command itself would be imported twice
    workers, busy, processes = min(workers, len(tars)), [], []
    try:
        for first in range(workers):
            pipe, far_end = context.Pipe(duplex=False)
            work = (tars[first::workers], reopen, max_seconds, replace, far_end)
            processes.append(context.Process(target=_serve, args=work, daemon=True))
            processes[-1].start()
            far_end.close()
            busy.append(pipe)
        while busy:
            for pipe in wait(busy):
                assert isinstance(pipe, Connection)
                answer = pipe.recv()
                if isinstance(answer, DataError):
                    raise answer
                if answer is None:
                    busy.remove(pipe)
                else:
                    bar.update(answer)
    except (EOFError, ConnectionError):
        raise DataError(
            "a worker process ended in the middle of its work (out of memory?); the same command goes on where it "
            "stopped, give it fewer workers"
        ) from None
    finally:
        for pipe in busy:
            pipe.close()  # a worker that finds nobody to tell ends after its utterance
        for process in processes:
            process.join(LAST_SECONDS)
            process.terminate()
            process.join()


def _serve(
    tars: Sequence[str], reopen: Callable[[], Codec], max_seconds: float, replace: bool, pipe: Connection
) -> None:
    """A worker process: sends how many utterances it did, then None, or the error that stopped it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    torch.set_num_threads(1)
    try:
        codec = reopen()
        for tar in tars:
            encode_shard(ShardIndex.open(tar), codec, max_seconds, replace, pipe.send)
        pipe.send(None)
    except BrokenPipeError:
        return  # the parent is gone
    except (DataError, OSError) as error:
        pipe.send(error if isinstance(error, DataError) else DataError(str(error)))


def run(arguments: Sequence[str]) -> Summary:
    """Do what the command line asks. Raises DataError."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if len(given) != len(arguments) or set(given) - set(KNOWN) or not {"codec", "shards"} <= set(given):
        raise DataError(USAGE)
    given = KNOWN | given
    if not given["workers"].isdigit() or int(given["workers"]) < 1:
        raise DataError(f"workers={given['workers']}: must be a whole number above 0")
    if given["replace"] not in ("true", "false"):
        raise DataError(f"replace={given['replace']}: must be true or false")
    if not re.fullmatch(r"\d+(\.\d+)?", given["max_seconds"]) or not 0 < float(given["max_seconds"]) <= 3600:
        raise DataError(f"max_seconds={given['max_seconds']}: must be above 0 and at most 3600")
    patterns = re.split(r",(?![^{}]*\})", given["shards"])  # commas in braces belong to a pattern
    if remote := next((pattern for pattern in patterns if "://" in pattern), None):
        raise DataError(f"{remote}: codes are written beside local shards; copy it here, or run this where it lies")
    try:
        device = torch.device(given["device"])
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"device={given['device']}: {str(error).splitlines()[0]}") from None
    if device.type == "cpu":
        torch.set_num_threads(1)
    reopen = partial(open_codec, given["codec"], device=given["device"])
    return encode_shards(
        Corpus.open(patterns),
        reopen(),
        max_seconds=float(given["max_seconds"]),
        replace=given["replace"] == "true",
        workers=int(given["workers"]),
        reopen=reopen,
        quiet=not sys.stderr.isatty(),
    )


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    try:
        found = run(arguments)
    except (DataError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    for table in tables(found):
        print(f"{as_text(table)}\n")
    print(f"{found.silent:,} samples have no speech; {found.not_indexed:,} were left out when the shards were indexed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
