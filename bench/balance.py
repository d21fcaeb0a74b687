"""Balance of 8 to 1,024 ranks on a long-tailed mix: the heaviest rank over the mean, beside simpler ways to deal.

    .venv/bin/python bench/balance.py [steps]

Samples are drawn (45 % text, 30 % images, 15 % audio, 10 % videos, half of these with sound; mean about 1,300 tokens,
up to 32,000), documents longer than a sequence are cut, all are packed in windows as the plan does, and the packs of a
step dealt: 16 to a rank. For the decoder and for each encoder a step's heaviest rank over the mean, worst of all steps:
  robin     packs dealt in turn
  length    packs dealt by their tokens, longest first
  decoder   (encoders) media are encoded where the decoder needs them, packs dealt as here
  here      data.balance
"lockstep" is what a step takes where the ranks wait for each other after every pack, over the mean of a rank; "moved"
the share of an encoder's work that is done at another rank than the decoder's, "least" the smallest share that would
do. Met means: within 2 % of the mean everywhere. With fewer packs to a rank the last table says what can be had.
"""

from __future__ import annotations

import heapq
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report  # noqa: E402
from data.balance import deal, deal_encoder  # noqa: E402
from data.costs import AUDIO, FILM, IMAGE, VIDEO, Costs, Sizes, Sizing, Work  # noqa: E402
from data.packing import pack  # noqa: E402
from data.shard_index import ranges  # noqa: E402
from data.split import split_document  # noqa: E402
from data.video import Sampling  # noqa: E402
from train.layout import ModelLayout  # noqa: E402

GOAL = 1.02
RANKS = (8, 64, 256, 1024)
LENGTHS = (8_192, 32_768)
PACKS = 16  # of a rank in a step
WINDOW = 65_536
MEAN_TOKENS = 1_250
SIZING = Sizing(ModelLayout(), video=Sampling(max_tokens=32_000))
WORK = Work()
WINDOW_WORK = float(WORK.audio(np.array(SIZING.layout.audio_window)))


@dataclass(frozen=True)
class Units:
    """Work of an encoder: that of each medium, of its atoms, and the sample (or later the pack) that it belongs to."""

    work_M: np.ndarray
    atom_M: np.ndarray
    owner_M: np.ndarray


@dataclass(frozen=True)
class Samples:
    """Whole samples and pieces of long ones."""

    tokens_N: np.ndarray
    audio: Units
    vision: Units


def main(num_steps: int) -> None:
    """Print a table for each sequence length, and what holds with fewer packs to a rank."""
    worst, worst_robin = 0.0, 0.0
    for length in LENGTHS:
        print(f"\n{PACKS} packs of {length:,} tokens a rank, {num_steps} steps")
        print(f"{'':>6}{'decoder':>16}{'lockstep':>23}{'audio encoder':>32}{'vision encoder':>34}{'ms a step':>23}")
        heads = ["robin", "length", "here", "robin", "here", *["robin", "decoder", "here", "moved", "least"] * 2]
        print(f"{'ranks':>6}" + "".join(f"{head:>8}" for head in [*heads, "deal", "audio", "vision"]))
        for num_ranks in RANKS:
            rows = [measure(*step, num_ranks) for step in steps(length, num_ranks * PACKS, num_steps)]
            row = {key: max(each[key] for each in rows) for key in rows[0]}
            print(f"{num_ranks:>6}" + "".join(f"{cell(key, value):>8}" for key, value in row.items()))
            worst = max(worst, row["here"], row["audio here"], row["vision here"])
            worst_robin = max(worst_robin, row["robin"], row["audio robin"], row["vision robin"])
    fewer_packs(num_steps)
    report(
        "balance",
        ours=worst,
        peer=worst_robin,
        ratio=worst_robin / worst,
        unit="work of the heaviest rank over the mean, worst of decoder and encoders; peer: packs dealt in turn",
        goal=GOAL,
        met=worst <= GOAL,
    )


def cell(key: str, value: float) -> str:
    """A number as the table shows it."""
    if key.startswith("ms"):
        return f"{value * 1e3:.1f}"
    return f"{value:.1%}" if key.endswith(("moved", "least")) else f"{value:.3f}"


def steps(length: int, packs_of_step: int, count: int) -> list[tuple[np.ndarray, np.ndarray, Units, Units]]:
    """Of each step: tokens of its packs, decoder work of its packs, and its media, owned by packs."""
    tokens_P, work_P, encoders = packed(length, count * packs_of_step)
    out = []
    for first in range(0, count * packs_of_step, packs_of_step):
        mine = slice(first, first + packs_of_step)
        out.append((tokens_P[mine], work_P[mine], *(within(units, first, packs_of_step) for units in encoders)))
    return out


def within(units: Units, first: int, count: int) -> Units:
    """The media of `count` packs from `first` on."""
    inside = (units.owner_M >= first) & (units.owner_M < first + count)
    return Units(units.work_M[inside], units.atom_M[inside], units.owner_M[inside] - first)


def measure(tokens_P: np.ndarray, work_P: np.ndarray, audio: Units, vision: Units, num_ranks: int) -> dict[str, float]:
    """One row of the table, of one step."""
    robin_P = np.arange(len(work_P)) % num_ranks
    start = time.process_time()
    dealt = deal(work_P, num_ranks)
    seconds = [time.process_time() - start]
    home_P = rank_of(dealt)
    row = {
        "robin": heaviest(work_P, robin_P, num_ranks),
        "length": heaviest(work_P, rank_of(longest_first(tokens_P, num_ranks)), num_ranks),
        "here": heaviest(work_P, home_P, num_ranks),
        "robin lockstep": lockstep(work_P.reshape(-1, num_ranks).T),
        "lockstep": lockstep(work_P[np.array(dealt)]),
    }
    for name, units in (("audio", audio), ("vision", vision)):
        home_M = home_P[units.owner_M]
        start = time.process_time()
        stretches = deal_encoder(units.work_M, units.atom_M, home_M, num_ranks)
        seconds.append(time.process_time() - start)
        load_R = np.bincount(home_M, units.work_M, num_ranks)
        row[f"{name} robin"] = heaviest(units.work_M, robin_P[units.owner_M], num_ranks)
        row[f"{name} decoder"] = load_R.max() / load_R.mean()
        row[f"{name} here"] = heaviest(stretches.work_S, stretches.rank_S, num_ranks)
        row[f"{name} moved"] = stretches.moved(home_M)
        row[f"{name} least"] = np.maximum(load_R - GOAL * load_R.mean(), 0).sum() / load_R.sum()
    return row | {"ms deal": seconds[0], "ms audio": seconds[1], "ms vision": seconds[2]}


def fewer_packs(num_steps: int, num_ranks: int = 64) -> None:
    """What holds with fewer packs to a rank, beside the least that equal numbers of packs allow."""
    print(
        f"\nfewer packs to a rank, {num_ranks} ranks: the decoder, and the least that equal counts allow; the encoders"
    )
    print(f"{'length':>8}{'packs':>7}{'here':>8}{'least':>8}{'lockstep':>10}{'audio':>8}{'vision':>8}")
    for length in LENGTHS:
        for packs in (4, 8):
            dealt = steps(length, num_ranks * packs, num_steps)
            rows = [measure(*step, num_ranks) for step in dealt]
            row = {key: max(each[key] for each in rows) for key in rows[0]}
            least = max(bound(step[1], num_ranks) for step in dealt)
            print(
                f"{length:>8,}{packs:>7}{row['here']:>8.3f}{least:>8.3f}{row['lockstep']:>10.3f}"
                f"{row['audio here']:>8.3f}{row['vision here']:>8.3f}"
            )


def bound(work_P: np.ndarray, num_ranks: int) -> float:
    """No deal of equal counts has a heaviest rank below this: the j heaviest packs with the lightest company."""
    sorted_P, each = np.sort(work_P), len(work_P) // num_ranks
    j = np.arange(1, num_ranks + 1)
    light = np.append(0.0, np.cumsum(sorted_P))[j * (each - 1)]
    heavy = np.cumsum(sorted_P[::-1])[j - 1]
    return max(1.0, float(((heavy + light) / j).max() / (sorted_P.sum() / num_ranks)))


def rank_of(dealt: Sequence[Sequence[int]]) -> np.ndarray:
    """Rank of each pack."""
    rank_P = np.zeros(sum(map(len, dealt)), np.int64)
    for rank, packs in enumerate(dealt):
        rank_P[list(packs)] = rank
    return rank_P


def heaviest(work: np.ndarray, rank: np.ndarray, num_ranks: int) -> float:
    """Work of the heaviest rank over the mean."""
    load_R = np.bincount(rank, work, num_ranks)
    return float(load_R.max() / load_R.mean())


def lockstep(work_RK: np.ndarray) -> float:
    """Time of a step whose ranks wait for each other after every pack, over the mean work of a rank."""
    return float(work_RK.max(axis=0).sum() / work_RK.sum(axis=1).mean())


def longest_first(tokens_P: np.ndarray, num_ranks: int) -> list[list[int]]:
    """What is usually done: the longest pack left to the rank with the fewest tokens."""
    room = len(tokens_P) // num_ranks
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for item in np.argsort(-tokens_P, kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        dealt[rank].append(item)
        if len(dealt[rank]) < room:
            heapq.heappush(loads, (load + int(tokens_P[item]), rank))
    return dealt


def packed(length: int, num_packs: int) -> tuple[np.ndarray, np.ndarray, tuple[Units, Units]]:
    """At least `num_packs` packs of windows of the mix: tokens, decoder work, and units owned by packs."""
    tokens, works, parts, count, window = [], [], [], 0, 0
    most = min(WINDOW, num_packs * length // MEAN_TOKENS + 2_000)
    while count < num_packs:
        rng = np.random.default_rng([length, window])
        samples = cut(*draw_mix(rng, most), length)
        shuffled = rng.permutation(len(samples.tokens_N))
        order, starts = pack(samples.tokens_N[shuffled], length)
        packs = rng.permutation(len(starts) - 1)
        order = shuffled[order[ranges(starts[:-1][packs], np.diff(starts)[packs])]]
        starts = np.append(0, np.cumsum(np.diff(starts)[packs]))
        tokens_N = samples.tokens_N[order]
        tokens.append(np.add.reduceat(tokens_N, starts[:-1]))
        works.append(np.add.reduceat(WORK.decoder(tokens_N), starts[:-1]))
        pack_N = np.empty(len(order), np.int64)
        pack_N[order] = np.repeat(np.arange(len(packs)), np.diff(starts)) + count
        parts.append([Units(u.work_M, u.atom_M, pack_N[u.owner_M]) for u in (samples.audio, samples.vision)])
        count, window = count + len(packs), window + 1
    audio, vision = (join([pair[kind] for pair in parts]) for kind in range(2))
    return np.concatenate(tokens), np.concatenate(works), (audio, vision)


def join(parts: Sequence[Units]) -> Units:
    """Units end to end."""
    columns: list[Callable[[Units], np.ndarray]] = [lambda u: u.work_M, lambda u: u.atom_M, lambda u: u.owner_M]
    return Units(*(np.concatenate([column(part) for part in parts]) for column in columns))


def draw_mix(rng: np.random.Generator, count: int) -> tuple[Costs, Sizes]:
    """Documents of at most one medium each."""
    kind = rng.choice([-1, IMAGE, AUDIO, VIDEO, FILM], count, p=[0.45, 0.30, 0.15, 0.05, 0.05])
    text = np.where(kind < 0, np.exp(rng.normal(np.log(350), 0.8, count)), rng.uniform(20, 120, count))
    medium = np.flatnonzero(kind >= 0)
    kind = kind[medium]
    heard = np.clip(np.exp(rng.normal(np.log(40), 0.9, len(kind))), 0.5, 1_800)
    image_side = 32 * np.sqrt(rng.uniform(300, 1_500, len(kind)))
    frame_tokens = rng.uniform(130, 400, len(kind))
    seen = np.clip(np.exp(rng.normal(np.log(5_000), 0.75, len(kind))), 600, 27_000) / frame_tokens
    side = np.where(kind == IMAGE, image_side, np.where(kind == AUDIO, 0, 32 * np.sqrt(frame_tokens))).astype(np.int64)
    seconds = np.where(kind >= VIDEO, seen, 0.0)
    sound = np.select([kind == AUDIO, kind == FILM], [heard, seen], 0.0)
    wraps = np.zeros(count, np.int64)
    wraps[medium] = np.where(kind == FILM, 4, 2)
    costs = Costs(
        text_tokens_N=np.clip(text, 20, 32_000).astype(np.int64) + wraps,
        document_N=np.ones(count, bool),
        owner_M=medium,
        kind_M=kind.astype(np.uint8),
        samples_M=(sound * 16_000).astype(np.int64),
        height_M=side,
        width_M=side,
        frames_M=(seconds * 30).astype(np.int64),
        seconds_M=seconds,
        text_before_M=np.full(len(medium), 10),
    )
    return costs, SIZING.sizes(costs)


def cut(costs: Costs, sizes: Sizes, length: int) -> Samples:
    """Documents longer than `length` become pieces."""
    tokens_N = SIZING.tokens(costs, sizes)
    long = tokens_N > length
    tokens, owners = [tokens_N], [costs.owner_M]
    grids, frames = [sizes.grid_M3], [sizes.frames_M]
    count = len(tokens_N)
    for number in np.flatnonzero(long).tolist():
        pieces = split_document(*one(costs, sizes, number), length, SIZING.layout)
        for piece in pieces:
            media = max(len(piece.frames), len(piece.grids))
            tokens.append(np.array([piece.tokens]))
            owners.append(np.full(media, count))
            frames.append(np.array([*piece.frames, 0][:media], np.int64))
            grids.append(np.array([*piece.grids, (0, 0, 0)][:media], np.int64).reshape(-1, 3))
            count += 1
    tokens_N, owner_M = np.concatenate(tokens), np.concatenate(owners)
    work_of_audio = WORK.audio(np.concatenate(frames))
    grid_M3 = np.concatenate(grids)
    work_of_vision = WORK.vision(grid_M3)
    # what was cut is no sample any more
    kept = np.append(~long, np.ones(count - len(long), bool))
    number_N, kept_M = np.cumsum(kept) - 1, kept[owner_M]
    heard, seen = kept_M & (work_of_audio > 0), kept_M & (work_of_vision > 0)
    patches = np.where(grid_M3[:, 0] > 0, grid_M3[:, 0], 1)
    return Samples(
        tokens_N[kept],
        Units(work_of_audio[heard], np.full(int(heard.sum()), WINDOW_WORK), number_N[owner_M[heard]]),
        Units(work_of_vision[seen], (work_of_vision / patches)[seen], number_N[owner_M[seen]]),
    )


def one(costs: Costs, sizes: Sizes, number: int) -> tuple[Costs, Sizes]:
    """The costs and sizes of one sample."""
    at = np.searchsorted(costs.owner_M, [number, number + 1])
    mine, sample = slice(*at), slice(number, number + 1)
    columns = {name: values[sample if name.endswith("_N") else mine] for name, values in fields_of(costs).items()}
    columns["owner_M"] = columns["owner_M"] - number
    return Costs(**columns), Sizes(**{name: values[mine] for name, values in fields_of(sizes).items()})


def fields_of(table: Costs | Sizes) -> dict[str, np.ndarray]:
    """The columns of a table by name."""
    return {name: getattr(table, name) for name in table.__dataclass_fields__}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
