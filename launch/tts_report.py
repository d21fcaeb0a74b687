"""What `suite=tts` leaves: tables for people, JSON, and a few utterances as sound and pictures.

    SpeechReport --> table, as_json;  Heard of chosen samples --Files.keep--> SET-KEY-{speech,codec,recording}.wav, .png

A folder appears when it is whole, in place of that of the same evaluation before.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import soundfile
import soxr

from data.audio import SAMPLE_RATE
from data.errors import DataError
from data.hashing import permutation
from data.mel import log_mel
from train.speech_eval import KINDS, Heard, SpeechReport

NUM_KEPT = 5  # utterances of a set
REPORTS = ("report.json", "regression.json")  # one of which tells a folder of ours


class Files:
    """Keeps a few utterances of a set, the same ones whenever the set is the same."""

    def __init__(self, folder: Path, set_name: str, samples: Sequence[int], rate: int) -> None:
        self.folder, self.set_name, self.rate = folder, set_name, rate
        self.chosen = {samples[place] for place in permutation(len(samples), 0)[:NUM_KEPT].tolist()}

    def keep(self, heard: Heard) -> None:
        """Write an utterance if it is one of the chosen."""
        if heard.sample not in self.chosen:
            return
        stem = re.sub(r"[^\w.-]+", "_", f"{self.set_name}-{heard.utterance.key.partition(':')[2]}", flags=re.ASCII)[:96]
        stem = f"{stem}-{heard.sample}"
        with writing(self.folder):
            for kind in KINDS:
                soundfile.write(self.folder / f"{stem}-{kind}.wav", heard.waves[kind], self.rate, subtype="PCM_16")
            self._draw(self.folder / f"{stem}.png", heard)

    def _draw(self, path: Path, heard: Heard) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(len(KINDS), 1, figsize=(8, 7), layout="constrained", sharex=True)
        for axis, kind in zip(axes, KINDS, strict=True):
            axis.set_title(kind, fontsize=10, loc="left")
            axis.set_ylabel("mel band", fontsize=9)
            if len(heard.waves[kind]):
                mel_MF = log_mel(soxr.resample(heard.waves[kind], self.rate, SAMPLE_RATE)).numpy().T
                extent = (0, len(heard.waves[kind]) / self.rate, 0, len(mel_MF))
                axis.imshow(mel_MF, origin="lower", aspect="auto", extent=extent, cmap="magma")
        axes[-1].set_xlabel("seconds")
        axes[-1].set_xlim(0, max(len(heard.waves[kind]) for kind in KINDS) / self.rate)
        figure.savefig(path, dpi=100)
        plt.close(figure)


def check_folder(folder: Path) -> None:
    """Raise DataError where `folder` exists and holds anything but an earlier report."""
    if folder.exists() and not any((folder / name).is_file() for name in REPORTS):
        raise DataError(f"out={folder}: exists and holds something else; choose another folder")


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when the block ends well, and goes otherwise."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(folder):
            partial.mkdir(parents=True)
        yield partial
        with writing(folder):
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say what cannot be written. Raises DataError."""
    try:
        yield
    except (OSError, soundfile.LibsndfileError) as error:
        raise DataError(f"{folder}: cannot be written: {error}") from None


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """For machines."""
    with writing(path):
        path.write_text(json.dumps(body, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def table(report: SpeechReport) -> str:
    """For people."""
    lines = [f"{report.set_name} at step {report.step}: word error rate of what a recogniser hears"]
    lines.append(f"  {'language':<10}" + "".join(f"{kind:>11}" for kind in KINDS) + f"{'words':>8}{'samples':>9}")
    for rows in zip(*(report.rows[kind] for kind in KINDS), strict=True):
        rates = "".join(f"{row.wer:>11.1%}" for row in rows)
        lines.append(f"  {rows[0].group:<10}{rates}{rows[0].num_words:>8}{rows[0].num_samples:>9}")
    if report.original is not None:
        lines.append(f"  against the texts that were rewritten: {report.original:.1%}")
    lines.append(f"  likeness{'':<14}{'same':>8}{'others':>8}{'nearest':>9}{'clips':>7}")
    for kind, found in report.voices.items():
        values = _shown(found.same, "8.2f") + _shown(found.different, "8.2f") + _shown(found.nearest, "9.1%")
        lines.append(f"    {kind:<20}{values}{found.num_clips:>7}")
    guesses = report.guesses
    if guesses.frames:
        lines.append(f"  codebook, of {guesses.frames} frames{'accuracy':>12}{'nats':>8}")
        for book, (correct, nll) in enumerate(zip(guesses.correct_G.tolist(), guesses.nll_G.tolist(), strict=True)):
            lines.append(f"    {book:<26}{correct / guesses.frames:>8.1%}{nll / guesses.frames:>8.3f}")
    for count, what in (
        (report.num_unscored, "recordings are of speakers that the Talker does not have: their codes were not guessed"),
        (report.num_silent, "answers stayed silent"),
        (report.num_endless, "answers did not end by themselves"),
    ):
        lines += [f"  {count} {what}"] * (count > 0)
    if report.skipped:
        lines.append(f"  {len(report.skipped)} samples could not be used, first: {report.skipped[0]}")
    return "\n".join(lines)


def as_json(report: SpeechReport) -> dict[str, Any]:
    """Every number and every answer."""
    frames = max(1, report.guesses.frames)
    rows = {kind: [{**asdict(row), "wer": row.wer} for row in found] for kind, found in report.rows.items()}
    return {
        "set": report.set_name,
        "step": report.step,
        "wer": {kind: found[-1].wer for kind, found in report.rows.items()},
        "wer_of_rewritten_texts": report.original,
        "rows": rows,
        "code_accuracy": (report.guesses.correct_G / frames).tolist(),
        "code_nll": (report.guesses.nll_G / frames).tolist(),
        "code_frames": report.guesses.frames,
        "likeness": {kind: asdict(found) for kind, found in report.voices.items()},
        "silent": report.num_silent,
        "endless": report.num_endless,
        "unscored": report.num_unscored,
        "skipped": list(report.skipped),
        "examples": list(report.examples),
    }


def comparison(before: Sequence[SpeechReport], after: Sequence[SpeechReport]) -> tuple[str, dict[str, float]]:
    """A table of both runs' speech, and by how much the word error rate of each set rose."""
    lines = ["word error rate of the speech"]
    lines.append(f"  {'set':<16}{'language':<10}{'baseline':>10}{'run':>10}{'rise':>10}")
    rises = {}
    for old, new in zip(before, after, strict=True):
        olds = {row.group: row.wer for row in old.rows["speech"]}
        for row in new.rows["speech"]:
            wer = olds.get(row.group)
            rise = "" if wer is None else f"{row.wer - wer:>+10.1%}"
            lines.append(f"  {new.set_name:<16}{row.group:<10}{_shown(wer, '10.1%')}{row.wer:>10.1%}{rise}")
        rises[new.set_name] = new.wer - old.wer
    return "\n".join(lines), rises


def _shown(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else "-".rjust(int(form.split(".")[0]))
