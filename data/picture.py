"""A packed batch as a picture and as a table: documents, kinds of token, loss, position ids.

    Batch --documents_of--> rows of a table
    Batches of a step --draw_packs--> PNG, for each:   document  [ 1 a.tar:x  ][2][   3 b.tar:y    ]
                                                       kind      text, audio, image or video, by colour
                                                       loss      where the token that follows is learnt
                                                       positions three lines, one for each axis

Cost: about 0.3 s a sequence, most of it matplotlib's.

T tokens of a batch, R runs of equal values.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.types import Batch

KINDS = ("text", "audio", "image", "video")
AXES = ("time", "height", "width")
_IGNORE = -100
_DOCUMENTS = (
    "#8dd3c7",
    "#ffffb3",
    "#bebada",
    "#fb8072",
    "#80b1d3",
    "#fdb462",
    "#b3de69",
    "#fccde5",
    "#d9d9d9",
    "#ccebc5",
)
_KINDS = {"text": "#d9d9d9", "audio": "#f28e2b", "image": "#59a14f", "video": "#4e79a7"}
_LOSS = "#c2185b"
_LINES = {"time": ("#222222", 2.4), "height": ("#e15759", 1.4), "width": ("#4e79a7", 0.7)}  # where equal, all show
_INCHES, _DPI, _LETTER = 14.0, 110, 6.3  # width of the picture; pixels of a letter of a label


@dataclass(frozen=True)
class DocumentRow:
    """One document of a batch."""

    number: int  # from 1, as in the picture
    key: str
    start: int  # its first token in the sequence
    tokens: int
    learned: int  # tokens that carry loss
    kinds: Mapping[str, int]  # placeholders of each medium, text the rest
    position: float  # its largest position id


def documents_of(batch: Batch, pads: Mapping[int, str]) -> list[DocumentRow]:
    """The documents of a batch. `pads` names the kind of each placeholder id: "audio", "image" or "video"."""
    kind_T, learned_T = _kinds_of(batch, pads), batch.labels_T.numpy() != _IGNORE
    position_T = batch.position_ids_3T.numpy().max(axis=0) if batch.doc_lengths else np.zeros(0)
    rows, start = [], 0
    for number, (key, length) in enumerate(zip(batch.keys, batch.doc_lengths, strict=True), 1):
        part = slice(start, start + length)
        counts: dict[str, int] = dict(zip(KINDS, np.bincount(kind_T[part], minlength=len(KINDS)).tolist(), strict=True))
        largest = float(position_T[part].max(initial=0.0))
        rows.append(DocumentRow(number, key, start, length, int(learned_T[part].sum()), counts, largest))
        start += length
    return rows


def draw_packs(batches: Sequence[Batch], pads: Mapping[int, str], sequence_length: int = 0, title: str = "") -> bytes:
    """A PNG with a row for each batch; `sequence_length` shows what is left free at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    longest = max(sequence_length, 1, *(len(batch.token_ids_T) for batch in batches))
    figure, axes = plt.subplots(
        2 * len(batches),
        1,
        figsize=(_INCHES, 0.6 + 2.7 * len(batches)),
        height_ratios=[1.0, 1.1] * len(batches),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    try:
        for number, batch in enumerate(batches):
            bands, lines = axes[2 * number, 0], axes[2 * number + 1, 0]
            used = len(batch.token_ids_T)
            heading = f"sequence {number + 1}: {used:,} tokens, {len(batch.keys)} documents"
            bands.set_title(heading + f", {len(batch.skipped)} left out" * bool(batch.skipped), fontsize=9, loc="left")
            _draw_bands(bands, batch, pads, longest)
            _draw_positions(lines, batch)
        axes[0, 0].set_xlim(0, longest)
        axes[-1, 0].set_xlabel("token", fontsize=9)
        _add_legend(figure, title)
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a key in letters that the font lacks is drawn as boxes
            figure.savefig(file, dpi=_DPI, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)
    return file.getvalue()


def _draw_bands(axis: Any, batch: Batch, pads: Mapping[int, str], longest: int) -> None:
    """Three bands, from the top: documents, kinds, loss."""
    axis.set_ylim(0, 3)
    axis.set_yticks([2.5, 1.5, 0.5], ["document", "kind", "loss"], fontsize=8)
    axis.tick_params(length=0, labelbottom=False)
    pixels = 0.92 * _INCHES * _DPI / longest  # of a token
    for row in documents_of(batch, pads):
        colour = _DOCUMENTS[(row.number - 1) % len(_DOCUMENTS)]
        axis.broken_barh([(row.start, row.tokens)], (2.05, 0.9), facecolor=colour, edgecolor="white", linewidth=0.5)
        label = _fit(row, row.tokens * pixels)
        middle = row.start + row.tokens / 2
        axis.text(middle, 2.5, label, fontsize=7, ha="center", va="center", clip_on=True, parse_math=False)
    kind_T = _kinds_of(batch, pads)
    for number, kind in enumerate(KINDS):
        axis.broken_barh(_runs(kind_T == number), (1.05, 0.9), facecolor=_KINDS[kind], linewidth=0)
    axis.broken_barh(_runs(batch.labels_T.numpy() != _IGNORE), (0.05, 0.9), facecolor=_LOSS, linewidth=0)


def _draw_positions(axis: Any, batch: Batch) -> None:
    """A line for each axis of the position ids, interrupted between documents."""
    start = 0
    for length in batch.doc_lengths:
        part = slice(start, start + length)
        for position_T, (colour, width) in zip(batch.position_ids_3T.numpy(), _LINES.values(), strict=True):
            axis.plot(np.arange(start, start + length), position_T[part], color=colour, linewidth=width)
        start += length
    axis.set_ylabel("position id", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def _add_legend(figure: Any, title: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=kind) for kind, colour in _KINDS.items()]
    patches.append(Patch(color=_LOSS, label="the token after it is learnt"))
    lines = [
        Line2D([], [], color=colour, linewidth=width, label=f"position: {name}")
        for name, (colour, width) in _LINES.items()
    ]
    figure.legend(handles=[*patches, *lines], loc="outside upper right", ncols=8, fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)


def _kinds_of(batch: Batch, pads: Mapping[int, str]) -> np.ndarray:
    """Place in KINDS of each token, int64 [T]."""
    kind_T = np.zeros(len(batch.token_ids_T), np.int64)
    for token, kind in pads.items():
        kind_T[batch.token_ids_T.numpy() == token] = KINDS.index(kind)
    return kind_T


def _runs(true_T: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) of each stretch of true values."""
    edges_R = np.flatnonzero(np.diff(true_T.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return [(start, end - start) for start, end in edges_R.tolist()]


def _fit(row: DocumentRow, pixels: float) -> str:
    """As much of a document's label as has room: number and key, with its shard or without, or the number alone."""
    room = int(pixels / _LETTER)
    short = f"{row.number} {row.key.rpartition(':')[2]}"
    for label in (f"{row.number} {row.key}", short, str(row.number)):
        if len(label) <= room:
            return label
        if label == short and room >= 6:
            return f"{label[: room - 1]}\N{HORIZONTAL ELLIPSIS}"
    return ""
