"""Which rank hangs, from what the ranks wrote of themselves.

    RUN/heartbeats/*.json of this launch --is each still written?--> pulses --> who is behind, or nobody yet

Behind is, in this order: a rank that does not answer (its process is stopped, or a call into C holds the interpreter's
lock), one that has made fewer beats than the others (all ranks beat at the same places: it is not as far), one that is
as far as the others but does not wait in a collective as they do. A rank that is behind in a part that may take long
(start, first step, save, evaluation) has `slow` times as long. Ranks whose files are not in this folder are not judged:
the folder may not be shared; then this rank's own patience is the longer one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

COLLECTIVE = ("/torch/distributed/", "/deepspeed/comm/", "/train/ranks.py")
OURS = ("/train/", "/data/", "/models/", "/launch/")
SILENT = 0.2  # of the patience: a process whose file does not change for so long does not answer
MOST = 5  # ranks that a line names


@dataclass
class Pulse:
    """What a rank wrote last."""

    line: Mapping[str, Any]
    silent_s: float  # for how long it has been the same
    answers: bool  # whether its process still writes

    @property
    def progress(self) -> tuple[int, int]:
        """How far it is."""
        return self.line["step"], self.line["beats"]

    @property
    def waits(self) -> bool:
        """Whether it stands in a collective."""
        return str(self.line.get("where", "")).startswith("a collective")


class Verdict(NamedTuple):
    """That somebody hangs."""

    text: str
    step: int
    behind: list[int]


def where(thread: int) -> str:
    """The innermost line of this project that a thread stands in, `a collective at` before it where it waits in one."""
    frame: FrameType | None = sys._current_frames().get(thread)
    waits = False
    while frame is not None:
        name = frame.f_code.co_filename
        waits = waits or any(part in name for part in COLLECTIVE)
        if any(part in name for part in OURS) and "site-packages" not in name and not name.endswith("/train/ranks.py"):
            at = "/".join(name.split("/")[-3:])
            return f"{'a collective at ' if waits else ''}{at}:{frame.f_lineno}"
        frame = frame.f_back
    return "a collective" if waits else ""


def read(
    folder: Path, launch: str, world: int, known: dict[int, Pulse], period_s: float = 0.0, hang_s: float = 1.0
) -> None:
    """Look at every rank's file once more, `period_s` after the last look."""
    for rank in range(world):
        try:
            line = json.loads((folder / f"rank{rank:05d}.json").read_text())
            mine = line["launch"] == launch and line["part"] != "end"
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not mine:
            continue
        last = known.get(rank)
        same = last is not None and last.line["alive"] == line["alive"]
        silent_s = last.silent_s + period_s if last is not None and same else 0.0
        known[rank] = Pulse(line, silent_s, silent_s < SILENT * hang_s)


def verdict(known: Mapping[int, Pulse], rank: int, world: int, hang_s: float, slow: float) -> Verdict | None:
    """What this rank says of the hang that it is in, or None where it is to wait on."""
    if rank not in known:
        return None  # its own file cannot be written; wait for it
    mine = known[rank].line
    patience = hang_s * (slow if mine["slow"] or len(known) < world else 1.0)
    behind = who(known)
    for each in behind:
        line = known[each].line
        own = hang_s * (slow if line["slow"] else 1.0)
        patience = max(patience, own)
        if known[each].answers and line["still"] <= own:  # it is late, but has gone on
            return None
    if mine["still"] <= patience:
        return None
    return Verdict(describe(known, behind, world), int(known[behind[0]].line["step"]), behind)


def who(known: Mapping[int, Pulse]) -> list[int]:
    """The ranks that are behind."""
    silent = [rank for rank, pulse in sorted(known.items()) if not pulse.answers]
    if silent:
        return silent
    least = min(pulse.progress for pulse in known.values())
    behind = [rank for rank, pulse in sorted(known.items()) if pulse.progress == least]
    if len(behind) < len(known):
        return behind
    return [rank for rank in behind if not known[rank].waits] or behind


def describe(known: Mapping[int, Pulse], behind: Sequence[int], world: int) -> str:
    """One line that names who is behind, and where the others are."""
    parts = [_place(rank, known[rank]) for rank in behind[:MOST]]
    if len(behind) > MOST:
        parts.append(f"{len(behind) - MOST} more ranks too")
    others = [pulse for rank, pulse in sorted(known.items()) if rank not in behind]
    if others:
        ahead = max(others, key=lambda pulse: pulse.progress)
        line = ahead.line
        waits = "wait in a collective" if ahead.waits else "are"
        parts.append(f"the others {waits} in {line['part']} of step {line['step']}")
        if all(known[rank].waits for rank in behind) and ahead.progress > known[behind[0]].progress:
            parts.append("they have passed the collective that it waits in, or never entered it")
    if len(known) < world:
        parts.append(f"{world - len(known)} of {world} ranks have no heartbeat in this folder, which may not be shared")
    return "; ".join(parts)


def _place(rank: int, pulse: Pulse) -> str:
    line = pulse.line
    media = f" ({line['media']})" if line["media"] else ""
    text = f"rank {rank} on host {line['host']} has been in {line['part']} of step {line['step']}{media}"
    if not pulse.answers:
        return f"{text} since it last answered; its process is stopped or holds the interpreter's lock"
    at = f", at {line['where']}" if line.get("where") else ""
    return f"{text} for {line['still']:.0f} s{at}"
