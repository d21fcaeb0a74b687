"""One page of HTML about one run or several: curves, experts, data, speed, samples to hear, lineage, differences.

    python -m launch.report RUN [RUN...] [out=report.html]

    RUN/ --report_read, report_metrics--> runs --report_charts, report_sections, report_samples--> report_page --> out

A curriculum's folder is shown as its stages one after the other. Runs may be running. The page is one file that needs
nothing but itself. Cost: about 80 us a line of metrics. docs/report.md has it all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from data.errors import DataError
from data.files import check_writable, write_atomically
from data.report import human_bytes, printable
from launch.arguments import guarded
from launch.report_page import page
from launch.report_read import Run, open_run
from train.errors import RecipeError
from train.typed import nearest


def report(argv: Sequence[str]) -> None:
    """Read, draw, write. Raises this project's errors."""
    folders, out = read_arguments(argv)
    check_writable(out)
    runs = [open_run(folder) for folder in folders]
    _name_apart(runs)
    payload, notes = page(runs, datetime.now().astimezone())
    try:
        write_atomically(out, payload)
    except OSError as error:
        raise DataError(f"out={out}: cannot be written: {error.strerror}") from None
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    print(f"{out}: {human_bytes(len(payload))}, open it in a browser")


def read_arguments(argv: Sequence[str]) -> tuple[list[Path], Path]:
    """Folders of runs, and where the page goes. Raises RecipeError."""
    folders, out = [], Path("report.html")
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals or "/" in key or Path(word).is_dir():
            folders.append(Path(word))
        elif key != "out" or not value:
            raise RecipeError(
                f"unknown argument {word!r}{nearest(key, ['out'])}; give folders of runs and out=FILE.html"
            )
        else:
            out = Path(value)
    if not folders:
        raise RecipeError("give the folder of a run: python -m launch.report RUN [RUN...] [out=report.html]")
    return folders, out


def _name_apart(runs: Sequence[Run]) -> None:
    """Runs whose folders have the same name are told apart by the folders that they lie in, else by number."""
    for of in (
        lambda run, _: f"{run.folder.resolve().parent.name}/{run.name}",
        lambda run, place: f"{run.name} ({place})",
    ):
        names = [run.name for run in runs]
        new = [of(run, place + 1) if names.count(run.name) > 1 else run.name for place, run in enumerate(runs)]
        for run, name in zip(runs, new, strict=True):
            run.name = name


if __name__ == "__main__":
    sys.exit(guarded(report, sys.argv[1:]))
