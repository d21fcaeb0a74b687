"""A tiny model, global batches and what the processes of the contract test run.

The global batch of a step is a list of documents; SPLITS deal it out to ranks and micro-batches.
Letters: T tokens, F mel frames, M mel bins, P patches, X values of a patch.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.types import Batch
from models.audio_encoder import num_audio_tokens
from models.config import AudioConfig, TextConfig, ThinkerConfig, VisionConfig
from models.vision_encoder import num_vision_tokens
from train import ranks
from train.config import EngineConfig, LossConfig, OptimConfig, Phase
from train.engines import MOMENTS, VALUE, WEIGHT, Engine, Shard, StepStats
from train.engines.build import build_engine
from train.engines.setup import EngineSetup
from train.loss import SHARE
from train.media import GROUPS
from train.watch import Look

MELS, WORDS, VIDEO, IMAGE, AUDIO = 128, 60, 61, 62, 63
PATCH = 24  # values of a patch: 2 x 2 pixels of 3 colours in 2 frames
TOWERS = 6 + 2 * 8 + 2 * GROUPS  # where in a row the towers' gradient norms begin
STEPS, SAVED = 5, 3  # steps of a run, and after how many its state is kept
LAYOUTS = {f"zero{zero}-ep{ep}": (zero, ep) for zero in (1, 2, 3) for ep in (1, 2)}
PHASE_CASES = (
    (1, 2, "fp32"),
    (2, 2, "fp32"),
    (3, 2, "fp32"),
    (3, 1, "fp32"),
    (1, 1, "bf16"),
    (2, 2, "bf16"),
    (3, 2, "bf16"),
)
FRAMES = {0: 130, 1: 40}  # documents with audio
PICTURES = {3: (IMAGE, (1, 2, 4)), 6: (VIDEO, (2, 4, 2))}  # documents with an image or a video
# Documents of each micro-batch, per rank. Rank 1 has no audio in 0 to 3, and no tokens in 1; rank 0 has no picture in
# 2, and rank 1 none in 1 and 4. Document 5 has no target.
SPLITS = (
    (((0, 1), (2, 3)), ((4,), (5, 6))),
    (((0, 1, 2, 3, 4, 5, 6),), ((),)),
    (((1,), (0, 2), (3,)), ((4, 6), (), (5,))),
    (((), (0, 1, 6)), ((5,), (2, 3, 4))),
    (((3, 4), (6,)), ((0,), (1, 2, 5))),
)
WHOLE = (((0, 1, 2, 3, 4, 5, 6),),)
# eps = 1 makes AdamW's update nearly proportional to the gradient, so that the weights show a wrong scale. Some of the
# gradient norms lie above the clip and some below.
LINEAR = {"lr": 0.5, "eps": 1.0, "weight_decay": 0.01, "clip": 1.63}
USUAL = {"lr": 1e-2, "weight_decay": 0.1, "clip": 0.0, "lr_scale": {"audio_tower.*": 0.5, "*experts*": 2.0}}


def setup(
    name: str, zero: int = 2, ep: int = 1, *, linear: bool = True, freeze: Sequence[str] = (), **engine: Any
) -> EngineSetup:
    """A tiny model under an engine; with `linear` AdamW shows the gradient's scale."""
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    text = TextConfig(64, 32, 2, 4, 2, 8, mrope_section=(2, 1, 1), **moe)
    audio = AudioConfig(16, 1, 2, 32, output_dim=32, downsample_hidden_size=8, num_mel_bins=MELS)
    vision = VisionConfig(2, 16, 16, 2, 32, (0,), 16, patch_size=2)
    return EngineSetup(
        model=ThinkerConfig(text, audio, AUDIO, vision, IMAGE, VIDEO),
        engine=EngineConfig(name=name, device="cpu", zero=zero, ep=ep, **engine),
        optim=OptimConfig(**(LINEAR if linear else USUAL)),
        loss=LossConfig(balance=0.1, max_logits=800),
        phase=Phase(steps=STEPS, freeze=list(freeze)),
        phase_name="all",
        seed=0,
        device=torch.device("cpu"),
    )


def document(step: int, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids, labels, mel and pixels of one document."""
    generator = torch.Generator().manual_seed(100 * step + index)
    ids_T = torch.randint(0, WORDS, (4 + 3 * index,), generator=generator)
    frames = FRAMES.get(index, 0)
    ids_T = torch.cat([torch.full((int(num_audio_tokens(frames)) if frames else 0,), AUDIO), ids_T])
    patches = 0
    if index in PICTURES:
        token, grid = PICTURES[index]
        patches = grid[0] * grid[1] * grid[2]
        ids_T = torch.cat([ids_T[:2], torch.full((num_vision_tokens(grid),), token), ids_T[2:]])
    dropped_T = torch.rand(len(ids_T), generator=generator) < 0.1 * index
    labels_T = torch.where(dropped_T | (index == 5) | (ids_T >= VIDEO), -100, (ids_T * 7 + 3 + step % 2) % WORDS)
    mel_FM = torch.randn(frames, MELS, generator=generator)
    return ids_T, labels_T, mel_FM, torch.randn(patches, PATCH, generator=generator)


def pack(step: int, indices: Sequence[int]) -> Batch:
    """One micro-batch of the documents with these indices."""
    if not indices:
        return Batch.empty(MELS)
    ids, labels, mels, pixels = zip(*(document(step, index) for index in indices), strict=True)
    lengths = tuple(len(ids_T) for ids_T in ids)
    return Batch(
        token_ids_T=torch.cat(ids),
        labels_T=torch.cat(labels),
        position_ids_3T=torch.cat([torch.arange(length).float() for length in lengths]).expand(3, -1),
        doc_lengths=lengths,
        mel_FM=torch.cat(mels),
        mel_lengths=tuple(len(mel_FM) for mel_FM in mels if len(mel_FM)),
        keys=tuple(f"{step}:{index}" for index in indices),
        skipped=("a line",) if 0 in indices else (),
        pixels_PX=torch.cat(pixels),
        grids=tuple(PICTURES[index][1] for index in indices if index in PICTURES),
    )


def microbatches(step: int, shard: Shard, whole: bool = False) -> list[Batch]:
    """What a rank reads of a step's global batch: one data rank all of it, two their halves, four every other pack."""
    split = WHOLE if whole else SPLITS[step % len(SPLITS)]
    if shard.count == 1:
        return [pack(step, indices) for half in split for indices in half]
    stride = shard.count // 2
    mine = split[shard.index % 2][shard.index // 2 :: stride]
    most = -(-max(len(half) for half in split) // stride)
    return [pack(step, indices) for indices in (*mine, *[()] * (most - len(mine)))]


def train(engine: Engine, first: int, last: int, whole: bool = False) -> list[list[float]]:
    """Steps [first, last): loss, balance loss, gradient norm, counts and expert shares of each, and what it tells."""
    lr = engine.setup.optim.lr  # type: ignore[attr-defined]
    rows = []
    for step in range(first, last):
        stats = engine.train_step(microbatches(step, engine.shard, whole), lr, Look(norms=True, experts=True))
        row = [stats.loss, stats.balance_loss, stats.grad_norm, stats.num_tokens, stats.num_targets, stats.num_skipped]
        rows.append(row + stats.expert_shares[SHARE].flatten().tolist() + told(stats))
    return rows


def told(stats: StepStats) -> list[float]:
    """What a step tells of towers, documents and tokens; it must add up to the step's own numbers."""
    seen = stats.seen
    assert abs(sum(norm**2 for norm in seen.norms.values()) / stats.grad_norm**2 - 1) < 1e-5, seen.norms
    losses_G, targets_G = seen.media.tolist()
    if SHARE in stats.expert_shares and "text" in stats.terms:
        assert abs(sum(losses_G) - stats.terms["text"] * sum(targets_G)) < 1e-5 * sum(losses_G)
    kinds = [] if seen.kinds is None else seen.kinds.flatten().tolist()
    if seen.kinds is not None:
        shares_LE = seen.kinds.sum(0) / seen.kinds.sum((0, 2)).unsqueeze(1)
        torch.testing.assert_close(shares_LE.float(), stats.expert_shares[SHARE])
    assert seen.own > 0 and seen.times.keys() <= {"forward", "backward", "forward_backward", "optimizer"}
    return [*losses_G, *targets_G, *(seen.norms[name] for name in sorted(seen.norms)), *kinds]


class State(dict[str, Tensor]):
    """A StateReader in memory: "kind|name" -> whole flattened tensor. It notes what a restore reads."""

    step = 0

    def kinds(self, name: str) -> frozenset[str]:
        return frozenset(key.split("|")[0] for key in self if key.split("|")[1] == name)

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        whole = self[f"{kind}|{name}"]
        assert whole.numel() == torch.Size(shape).numel(), f"{name} has {whole.numel()} elements, not {tuple(shape)}"
        assert 0 <= start <= start + length <= whole.numel()
        return whole[start : start + length].clone()

    def differs(self, other: Mapping[str, Tensor]) -> list[str]:
        """Keys that are missing on a side or not bit-identical."""
        return sorted(
            k for k in self.keys() | other.keys() if k not in self or k not in other or not self[k].equal(other[k])
        )


def gather(engine: Engine) -> State:
    """Every rank's fragments put together. Asserts that they cover each tensor exactly once."""
    reference = engine.setup.build_objective(drawn=False).thinker  # type: ignore[attr-defined]
    sizes = {f"{kind}|{n}": p.numel() for n, p in reference.named_parameters() for kind in (WEIGHT, *MOMENTS)}
    sizes[f"{VALUE}|{SHARE}"] = 2 * 8
    values = {
        key: torch.zeros(2, size, dtype=torch.float64) for key, size in sizes.items()
    }  # the tensor, how often held
    for fragment in engine.fragments():
        if fragment.replicated and not engine.is_main:
            continue
        for kind, tensor in fragment.tensors.items():
            assert tensor.dtype is torch.float32 and tensor.shape == (fragment.length,), fragment
            key, end = f"{kind}|{fragment.name}", fragment.start + fragment.length
            assert torch.Size(fragment.shape).numel() == sizes[key], fragment
            values[key][0, fragment.start : end] = tensor
            values[key][1, fragment.start : end] += 1
    flat = ranks.total(torch.cat([pair.flatten() for pair in values.values()]))
    state = State()
    for key, part in zip(sizes, flat.split([2 * size for size in sizes.values()]), strict=True):
        whole, held = part.view(2, -1)
        assert (held == held[0]).all() and held[0] in (0, 1), f"{key} is held {held.unique()} times"
        if held[0]:
            state[key] = whole.float()
    return state


def run(engine: Engine, folder: str, name: str) -> list[list[float]]:
    """Train, evaluating in between; leave the state after SAVED steps and at the end in the folder."""
    rows = train(engine, 0, SAVED)
    state = gather(engine)
    rows += train(engine, SAVED, STEPS)
    last = gather(engine)
    if engine.is_main:
        save_file(dict(state), f"{folder}/{name}-saved.safetensors")
        save_file(dict(last), f"{folder}/{name}-last.safetensors")
    ranks.barrier()
    return rows


def load(folder: str, name: str) -> State:
    return State(load_file(f"{folder}/{name}.safetensors"))


def go_on(engine: Engine, state: State) -> tuple[list[list[float]], list[str]]:
    """Restore and train the remaining steps: their numbers, and what the restored engine does not hold bit by bit."""
    engine.restore(state, optimizer_step=SAVED)
    differing = state.differs(gather(engine))
    return train(engine, SAVED, STEPS), differing


def look(engine: Engine) -> dict[str, Any]:
    """Evaluation and greedy answers: sums over ranks, answers to this rank's documents. Rank 0 first has none."""
    sums, answers, nats = torch.zeros(3), [], []
    for parts in (((), (2, 6, 0)), ((1, 3), (4,))):
        mine = (*parts, (), ())[engine.shard.index] if engine.shard.count > 1 else parts[0] + parts[1]
        batch = pack(77, mine)
        seen = engine.eval_step(batch)
        sums += engine.shard.leads * torch.tensor([seen[key] for key in ("loss_sum", "targets", "correct")])
        answers += engine.generate(batch, 5, stop_id=1)
        choices = [[[3, 7, index + 1], [5]] if index % 2 else [[9, 2], [4], [1, 2, 3, 4]] for index in mine]
        chosen = engine.likelihoods(batch, choices)
        nats += [[total, *found] for total, found in zip(engine.losses(batch), chosen, strict=True)]
    return {"sums": ranks.total(sums).tolist(), "answers": answers, "nats": nats}


def close(engine: Engine) -> None:
    """Close a DeepSpeed engine and see that its memory is free: the next phase needs it."""
    inner = weakref.ref(engine.engine)  # type: ignore[attr-defined]
    engine.close()
    assert inner() is None, "a closed engine is still in memory"


def layouts(folder: str) -> dict[str, Any]:
    """Run every layout, and restore it from plain torch and from the layout before it."""
    out: dict[str, Any] = {}
    for index, (name, (zero, ep)) in enumerate(LAYOUTS.items()):
        engine = build_engine(setup("deepspeed", zero, ep))
        rows = run(engine, folder, name)
        out[name] = {"rows": rows, "look": look(engine), "after": train(engine, STEPS, STEPS + 1)}
        sources = ["local", *list(LAYOUTS)[max(0, index - 1) : index]]
        out[name]["restored"] = {source: go_on(engine, load(folder, f"{source}-saved")) for source in sources}
        close(engine)
    return out


def every_pair(folder: str) -> dict[str, Any]:
    """Restore every layout from every other and itself, after `layouts`."""
    out: dict[str, Any] = {}
    for name, (zero, ep) in LAYOUTS.items():
        engine = build_engine(setup("deepspeed", zero, ep))
        out[name] = {source: go_on(engine, load(folder, f"{source}-saved")) for source in LAYOUTS}
        close(engine)
    ranks.stop()
    return out


def one_process(folder: str) -> dict[str, Any]:
    """DeepSpeed without torchrun."""
    engine = build_engine(setup("deepspeed", zero=3))
    out = {"rows": run(engine, folder, "one-process"), "look": look(engine)}
    close(engine)
    ranks.stop()
    return out


def more_processes() -> list[list[list[float]]]:
    """Experts over fewer ranks than there are: two copies of each. The optimizer's state in host memory."""
    rows = []
    for zero, ep, offload in ((1, 2, False), (2, 2, True), (3, 2, True), (3, 4, False)):
        engine = build_engine(setup("deepspeed", zero, ep, offload=offload))
        rows.append(train(engine, 0, SAVED) + go_on(engine, gather(engine))[0])
        close(engine)
    ranks.stop()
    return rows


PHASES = (["model.*", "lm_head.*"], ["model.layers.0.mlp.*", "model.embed_tokens.*", "audio_tower.conv*"])


def phases(label: str, folder: str, **engine_settings: Any) -> list[list[list[float]]]:
    """Two phases with other frozen parameters: first the whole decoder, then some experts. States into the folder."""
    rows, state = [], None
    for number, freeze in enumerate(PHASES):
        engine = build_engine(setup(**engine_settings, linear=False, freeze=freeze))
        if state is not None:
            engine.restore(state, optimizer_step=0)
        rows.append(train(engine, 2 * number, 2 * number + 2))
        state = gather(engine)
        if engine.is_main:
            save_file(dict(state), f"{folder}/{label}-{number}.safetensors")
        engine.close()
    return rows


def alone() -> list[list[list[float]]]:
    """Each rank encodes its own media, micro-batch by micro-batch."""
    rows = []
    for zero, ep in ((1, 1), (2, 2), (3, 2)):
        engine = build_engine(setup("deepspeed", zero, ep, share_encoders=False))
        rows.append(train(engine, 0, STEPS))
        close(engine)
    return rows


def two_processes(folder: str) -> dict[str, Any]:
    """All that two processes are asked, one engine after the other: starting them costs more than their work."""
    out = {
        "layouts": layouts(folder),
        "phases": [
            phases(
                f"deepspeed-{zero}-{ep}-{precision}", folder, name="deepspeed", zero=zero, ep=ep, precision=precision
            )
            for zero, ep, precision in PHASE_CASES
        ],
        "alone": alone(),
    }
    ranks.stop()
    return out
