"""A tiny audio encoder with its text decoder, and what the processes of its contract test run.

Documents, ranks and micro-batches are those of tests/train/engine_cases.py, without pictures: rank 1
has no audio in most steps and nothing at all in one. Windows of attention are drawn for each clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from data.types import Batch
from models.audio_encoder import num_audio_tokens
from models.config import AudioConfig, AudioDecoderConfig, TextConfig, ThinkerConfig, TranscriberConfig
from models.transcriber import Transcriber
from tests.train import engine_cases
from tests.train.engine_cases import AUDIO, LINEAR, MELS, SPLITS, State
from train import ranks
from train.config import EngineConfig, LossConfig, OptimConfig, Phase
from train.engines import MOMENTS, WEIGHT, Engine
from train.engines.build import build_engine
from train.engines.setup import EngineSetup

STEPS, LR, CLIP = 5, 0.5, 1.75
ZEROS = (1, 2, 3)
LONG = {0: 730, 1: 250}  # mel frames: several windows each
KINDS = {"tied": True, "untied": False}


def config(tied: bool = True) -> TranscriberConfig:
    """The contract's model, its encoder with a decoder."""
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    text = TextConfig(64, 32, 2, 4, 2, 8, mrope_section=(2, 1, 1), **moe)
    audio = AudioConfig(16, 1, 2, 32, output_dim=32, downsample_hidden_size=8, num_mel_bins=MELS)
    return TranscriberConfig(ThinkerConfig(text, audio, AUDIO), AudioDecoderConfig(24, 2, 2, 40, tied))


def setup(name: str, zero: int = 2, tied: bool = True, clip: float = CLIP, **engine: Any) -> EngineSetup:
    optim: dict[str, Any] = LINEAR | {"lr": LR, "clip": clip}
    return EngineSetup(
        model=config(tied),
        engine=EngineConfig(name=name, device="cpu", zero=zero, **engine),
        optim=OptimConfig(**optim),
        loss=LossConfig(max_logits=800),
        phase=Phase(steps=STEPS),
        phase_name="all",
        seed=0,
        device=torch.device("cpu"),
    )


def pack(step: int, indices: Sequence[int], drawn: bool = True) -> Batch:
    """One micro-batch of the documents with these indices; clips are long, and their windows are drawn."""
    parts = []
    for index in indices:
        batch = engine_cases.pack(step, [index])
        seen_T = (batch.token_ids_T != AUDIO) & (batch.token_ids_T < engine_cases.VIDEO)
        ids_T, labels_T, frames = batch.token_ids_T[seen_T], batch.labels_T[seen_T], LONG.get(index, 0)
        heard = int(num_audio_tokens(frames))
        generator = torch.Generator().manual_seed(1000 + 100 * step + index)
        ids_T = torch.cat([ids_T[:2], torch.full((heard,), AUDIO), ids_T[2:]])
        labels_T = torch.cat([labels_T[:2], torch.full((heard,), -100), labels_T[2:]])
        parts.append((ids_T, labels_T, torch.randn(frames, MELS, generator=generator)))
    if not parts:
        return Batch.empty(MELS)
    ids, labels, mels = zip(*parts, strict=True)
    lengths = tuple(len(ids_T) for ids_T in ids)
    heard = [index for index in indices if index in LONG]
    return Batch(
        token_ids_T=torch.cat(ids),
        labels_T=torch.cat(labels),
        position_ids_3T=torch.cat([torch.arange(length).float() for length in lengths]).expand(3, -1),
        doc_lengths=lengths,
        mel_FM=torch.cat(mels),
        mel_lengths=tuple(LONG[index] for index in heard),
        keys=tuple(f"{step}:{index}" for index in indices),
        windows=tuple(100 * (1 + (step + 3 * index) % 8) for index in heard) if drawn else (),
    )


def train(engine: Engine, first: int = 0, last: int = STEPS) -> list[list[float]]:
    """Loss, gradient norm and counts of each step."""
    rows = []
    for step in range(first, last):
        halves = SPLITS[step % len(SPLITS)]
        mine = halves[engine.shard.index] if engine.shard.count > 1 else halves[0] + halves[1]
        most = max(map(len, halves))
        batches = [pack(step, indices) for indices in (*mine, *[()] * (most - len(mine)))]
        stats = engine.train_step(batches, LR)
        rows.append([stats.loss, stats.grad_norm, stats.num_tokens, stats.num_targets])
    return rows


def look(engine: Engine) -> dict[str, Any]:
    """Evaluation and greedy answers: sums over ranks, answers to this rank's documents. Rank 0 first has none."""
    sums, answers = torch.zeros(3), []
    for parts in (((), (2, 6, 0)), ((1, 3), (4,))):
        mine = (*parts, (), ())[engine.shard.index] if engine.shard.count > 1 else parts[0] + parts[1]
        batch = pack(77, mine, drawn=False)
        seen = engine.eval_step(batch)
        sums += engine.shard.leads * torch.tensor([seen[key] for key in ("loss_sum", "targets", "correct")])
        answers += engine.generate(batch, 5, stop_id=1)
    return {"sums": ranks.total(sums).tolist(), "answers": answers}


def gather(engine: Engine, tied: bool) -> State:
    """Every rank's fragments put together; asserts that they cover what they cover exactly once."""
    with torch.device("meta"):
        model = Transcriber(config(tied))
    sizes = {f"{kind}|{name}": p.numel() for name, p in model.named_parameters() for kind in (WEIGHT, *MOMENTS)}
    held = {key: torch.zeros(2, size, dtype=torch.float64) for key, size in sizes.items()}  # values, how often held
    for fragment in engine.fragments():
        for kind, tensor in fragment.tensors.items():
            part = held[f"{kind}|{fragment.name}"][:, fragment.start : fragment.start + fragment.length]
            part[0] = tensor
            part[1] += 1
    flat = ranks.total(torch.cat([pair.flatten() for pair in held.values()]))
    state = State()
    for key, values in zip(held, flat.split([pair.numel() for pair in held.values()]), strict=True):
        whole, times = values.view(2, -1)
        assert (times == 1).all(), f"{key} is held {times.unique()} times"
        state[key] = whole.float()
    return state


def run(name: str, zero: int = 2, tied: bool = True, **settings: Any) -> dict[str, Any]:
    """Steps, a look, and a step after a restore in between."""
    engine = build_engine(setup(name, zero, tied, **settings))
    rows = train(engine)
    state = gather(engine, tied)
    seen = look(engine)
    after = train(engine, STEPS, STEPS + 1)
    engine.restore(state, optimizer_step=STEPS)
    assert not state.differs(gather(engine, tied))
    again = train(engine, STEPS, STEPS + 1)
    engine.close()
    return {
        "rows": rows,
        "after": after,
        "again": again,
        "look": seen,
        "state": {key: value.tolist() for key, value in state.items()},
    }


def two_processes() -> dict[str, Any]:
    """All stages of ZeRO, Megatron, encoders unshared, in one start of the processes."""
    out = {f"zero{zero}-{kind}": run("deepspeed", zero, tied) for zero in ZEROS for kind, tied in KINDS.items()}
    out["ep2-tied"] = run("deepspeed", 2, ep=2)  # there are no experts to shard
    out["offload-tied"] = run("deepspeed", 2, offload=True)
    out["alone-tied"] = run("deepspeed", 3, share_encoders=False)
    out["megatron-tied"] = run("megatron", tp=2)  # which such a run does not heed
    ranks.stop()
    return out
