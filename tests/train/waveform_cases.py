"""A tiny model with a waveform decoder, pieces of speech, and what the processes of its contract test run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from data.segments import Segments, join
from data.types import Batch
from models.omni import Omni
from models.omni_config import Code2WavConfig, OmniConfig
from tests.train import speech_cases
from tests.train.engine_cases import LINEAR, MELS, State, told
from train import ranks
from train.adversary import AdversaryConfig
from train.config import EngineConfig, LossConfig, OptimConfig, Phase
from train.engines import MOMENTS, WEIGHT, Engine
from train.engines.build import build_engine
from train.engines.setup import EngineSetup
from train.watch import Look
from train.waveform import add_adversary
from train.waveform_config import WaveformConfig
from train.waveform_loss import SpectralConfig

STEPS, CODES, GROUPS = speech_cases.STEPS, speech_cases.CODES, speech_cases.GROUPS
RATE = 12  # samples of a frame
FRAMES = (30, 9, 9, 14, 2)  # of each segment; the last one is shorter than what gives a sample
# Rank 1 has nothing at all in step 1; one of its micro-batches has nothing in step 2, nor has one of rank 0's.
SPLITS = speech_cases.SPLITS
ZEROS = (1, 2, 3)
LR = 0.02
WAYS = ("waveform", "adversarial")
LEARNS = ("code2wav.decoder.1.", "code2wav.pre_transformer.", "adversary.discriminators.0.")
# The usual floor makes gradients of faint bins so large that rounding shows.
SPECTRAL = SpectralConfig(((64, 8), (32, 4)), floor=0.03)
WAVEFORM = WaveformConfig(spectral=SPECTRAL, adversary=AdversaryConfig((2, 3), (4, 8), (64, 32), 4))


def config() -> OmniConfig:
    """The model of the Talker's contract, and a decoder."""
    decoder = Code2WavConfig(CODES, GROUPS, 16, 16, 1, 2, 2, 16, 4, upsample_rates=(3, 2), upsampling_ratios=(2,))
    assert decoder.samples_per_frame == RATE
    return replace(speech_cases.config(), code2wav=decoder)


def setup(name: str, way: str, zero: int = 2, **engine: Any) -> EngineSetup:
    return EngineSetup(
        model=config(),
        engine=EngineConfig(name=name, device="cpu", zero=zero, **engine),
        optim=OptimConfig(**LINEAR | {"lr": LR}),
        loss=LossConfig(waveform=WAVEFORM),
        phase=Phase(steps=STEPS, speech=way),
        phase_name="all",
        seed=0,
        device=torch.device("cpu"),
    )


def segment(step: int, index: int) -> Segments:
    generator = torch.Generator().manual_seed(100 * step + index)
    frames, context = FRAMES[index], (0, 1, 2, 3, 0)[index]
    codes_GF = torch.randint(0, CODES, (GROUPS, frames), generator=generator)
    samples = RATE * (frames - context) - index  # an utterance ends within a frame
    return Segments(codes_GF, 0.1 * torch.randn(samples, generator=generator), (frames,), (context,), (samples,))


def pack(step: int, indices: Sequence[int]) -> Batch:
    if not indices:
        return Batch.empty(MELS)
    keys = tuple(f"{step}:{index}" for index in indices)
    return replace(Batch.empty(MELS), keys=keys, speech=join([segment(step, index) for index in indices]))


def train(engine: Engine, first: int = 0, last: int = STEPS) -> list[list[float]]:
    """Loss, every term, gradient norm and counts of each step."""
    rows = []
    for step in range(first, last):
        halves = SPLITS[step % len(SPLITS)]
        mine = halves[engine.shard.index] if engine.shard.count > 1 else halves[0] + halves[1]
        stats = engine.train_step([pack(step, indices) for indices in mine], LR, Look(norms=True))
        rows.append(
            [stats.loss, *stats.terms.values(), stats.grad_norm, stats.num_tokens, stats.num_targets, *told(stats)]
        )
    return rows


def gather(engine: Engine, way: str) -> State:
    """Every rank's fragments put together; asserts that they cover what they cover exactly once."""
    model = Omni(config())
    if way == "adversarial":
        add_adversary(model, WAVEFORM, 0)
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
        assert times[0] in (0, 1) and (times == times[0]).all(), f"{key} is held {times.unique()} times"
        if times[0]:
            state[key] = whole.float()
    return state


def run(name: str, zero: int = 2, **settings: Any) -> dict[str, Any]:
    """Steps of both ways, the second from the state of the first, and a step after a restore in between."""
    out: dict[str, Any] = {}
    state: State | None = None
    for way in WAYS:
        engine = build_engine(setup(name, way, zero, **settings))
        if state is not None:  # which has no discriminators: they begin anew
            engine.restore(state, optimizer_step=0)
        rows = train(engine)
        state = gather(engine, way)
        after = train(engine, STEPS, STEPS + 1)
        engine.restore(state, optimizer_step=STEPS)
        assert not state.differs(gather(engine, way)), way
        again = train(engine, STEPS, STEPS + 1)
        learnt = {key: value.tolist() for key, value in state.items() if key.split("|")[1].startswith(LEARNS)}
        out[way] = {"rows": rows, "after": after, "again": again, "state": learnt}
        engine.close()
    return out


def two_processes() -> dict[str, Any]:
    """All stages of ZeRO, and Megatron, in one start of the processes."""
    out = {f"zero{zero}": run("deepspeed", zero) for zero in ZEROS}
    out["megatron"] = run("megatron", tp=2)  # which a phase of the decoder does not heed
    ranks.stop()
    return out
