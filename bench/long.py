"""Long packs: does memory grow with their length alone, and do ranks that share a pack find what one finds?

    python -m bench.long [--lengths 4096,8192,...] [--ways all,layers,layers+tiles] [--engines deepspeed,megatron]

    one document of T tokens, half of them sound --one step of `local`--> peak bytes of tensors, T from 4k to 64k
        --least squares--> bytes a token, and how far the peaks are from that line
    three documents that cross every border --deepspeed cp2, megatron cp2--> losses and gradient norms against `local`

A peak is the running sum of the CPU allocator's events above what was alive before the step: bytes of tensors, inside
operators too, whatever else the machine does. Attention's work grows with T^2, its memory must not. Cost with the usual
lengths: five minutes, most of it attention at 64k tokens; the ranks of the second part take half a minute to start.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from data.types import Batch
from models.audio_encoder import num_audio_tokens
from models.config import AudioConfig, TextConfig, ThinkerConfig
from train import ranks
from train.config import EngineConfig, LossConfig, OptimConfig, Phase
from train.engines.build import build_engine
from train.engines.setup import EngineSetup

AUDIO, WORDS = 63, 60
WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "layers": {"recompute_layers": True},
    "layers+tiles": {"recompute_layers": True, "tiles": 8},
}
DOCUMENTS = (701, 902, 397)  # of 2,000 tokens: rank borders at 500, 1,000 and 1,500 lie within them
STEPS, WITHIN = 3, 1e-5


def setup_of(**engine: Any) -> EngineSetup:
    """A toy Thinker under an engine."""
    text = TextConfig(64, 64, 2, 2, 2, 16, 8, 2, 32, mrope_section=(4, 2, 2))
    audio = AudioConfig(16, 1, 2, 32, output_dim=64, downsample_hidden_size=4)
    return EngineSetup(
        model=ThinkerConfig(text, audio, AUDIO),
        engine=EngineConfig(device="cpu", **engine),
        optim=OptimConfig(),
        loss=LossConfig(max_logits=64 * 1024),
        phase=Phase(steps=STEPS),
        phase_name="all",
        seed=0,
        device=torch.device("cpu"),
    )


def batch_of(lengths: tuple[int, ...], seed: int) -> Batch:
    """Documents, of each the first half sound."""
    draw, ids, frames = torch.Generator().manual_seed(seed), [], []
    for length in lengths:
        frames.append(length // 2 * 100 // 13)
        heard = int(num_audio_tokens(frames[-1]))
        words_T = torch.randint(0, WORDS, (length - heard,), generator=draw)
        ids.append(torch.cat([torch.full((heard,), AUDIO), words_T]))
    ids_T = torch.cat(ids)
    return Batch(
        token_ids_T=ids_T,
        labels_T=torch.where(ids_T == AUDIO, -100, ids_T),
        position_ids_3T=torch.cat([torch.arange(length).float() for length in lengths]).expand(3, -1),
        doc_lengths=lengths,
        mel_FM=torch.randn(sum(frames), 128, generator=draw),
        mel_lengths=tuple(frames),
        keys=tuple(map(str, lengths)),
    )


def peak(length: int, way: str) -> int:
    """Bytes above what was alive before, at the fullest moment of a step."""
    engine, batch = build_engine(setup_of(**WAYS[way])), batch_of((length,), 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        engine.train_step([batch], 1e-3)
    now = most = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            most = max(most, now)
    return most


def line(lengths: list[int], peaks: list[int]) -> tuple[float, float]:
    """Bytes a token of the line through the peaks, relative errors weighted alike, and the largest relative error."""
    x, y = np.array(lengths, float), np.array(peaks, float)
    rows = np.stack([x, np.ones_like(x)], 1) / y[:, None]
    (slope, start), *_ = np.linalg.lstsq(rows, np.ones_like(y), rcond=None)
    return float(slope), float(np.abs((slope * x + start) / y - 1).max())


def losses(**engine: Any) -> list[list[float]]:
    """Loss, balance loss and gradient norm of some steps over the documents that cross borders."""
    made = build_engine(setup_of(**engine))
    found = []
    for step in range(STEPS):
        stats = made.train_step([batch_of(DOCUMENTS, step)], 1e-3)
        found.append([stats.loss, stats.balance_loss, stats.grad_norm])
    return found


def shared(engine: str) -> list[list[float]]:
    """The same from two processes that hold each pack together."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*words, "-m", "bench.long", "--rank-of", engine], capture_output=True, text=True)
    rows = [row for row in done.stdout.splitlines() if row.startswith("[[")]
    if done.returncode or not rows:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(rows[0])


def main() -> None:
    """Print both tables; status 1 where a peak is not linear to 5 % or a loss differs by more than 1e-5."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--engines", default="deepspeed,megatron")
    parser.add_argument("--rank-of", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.rank_of:
        found = losses(name=given.rank_of, cp=2)
        if ranks.rank() == 0:
            print(json.dumps(found), flush=True)
        ranks.leave(0)
    good, lengths = True, [int(word) for word in given.lengths.split(",")]
    print(f"peak of a step, MB    {''.join(f'{length:>10,}' for length in lengths)}  bytes a token  off the line")
    for way in filter(None, given.ways.split(",")):
        peaks = [peak(length, way) for length in lengths]
        slope, error = line(lengths, peaks)
        good &= error <= 0.05
        print(f"  kept: {way:<14}{''.join(f'{size / 1e6:>10.1f}' for size in peaks)}{slope:>15,.0f}{error:>14.1%}")
    names = list(filter(None, given.engines.split(",")))
    alone = np.array(losses()) if names else np.zeros(0)
    for name in names:
        error = np.abs(np.array(shared(name)) / alone - 1).max()
        good &= error <= WITHIN
        print(f"{name}, cp2: losses and gradient norms of {STEPS} steps differ from local's by at most {error:.1e}")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
