"""Whether a layout fits in a GPU, said in one line before anything is built.

model, layout, tokens of a pack --train.memory--> Memory of the worst rank --over the limit?--> EngineError:
what does not fit, the largest parts, and the first change of a setting that would
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from models.audio_encoder import CHUNK_FRAMES, CHUNK_TOKENS
from train.activations import Pack
from train.engine_state import OWNERS, Job
from train.errors import EngineError
from train.memory import Memory, memory_of
from train.parallel import Layout, Model, check_layout, thinker_of

GB = 1e9
RESERVE = 0.1  # of a GPU: the allocator's gaps, the libraries' own buffers, routing that is not even
CLIP = 30  # seconds of a clip, in packs that are made up
SIDE = 32  # patches along an image's side in them


def usual_pack(model: Model, tokens: int, media_share: float = 0.0) -> Pack:
    """One document of `tokens`, a share of which is sound and pictures, half and half where the model sees.

    Clips of 30 seconds and images of 32 x 32 patches; what is not of media has a label.
    """
    thinker = thinker_of(model)
    heard = int(tokens * media_share / (2 if thinker.vision is not None else 1))
    clips, rest = divmod(heard // CHUNK_TOKENS, CLIP)
    mels = [CLIP * CHUNK_FRAMES] * clips + [rest * CHUNK_FRAMES] * bool(rest)
    grids = []
    if thinker.vision is not None and media_share:
        merge = thinker.vision.spatial_merge_size
        side = SIDE // merge * merge or merge
        grids = [(1, side, side)] * round(heard * merge**2 / side**2)
    return Pack((tokens,), tuple(mels), tuple(grids), targets=round(tokens * (1 - media_share)))


def spoken(tokens: int, frames: int) -> Pack | None:
    """What the Talker reads of a pack of `tokens` whose answers have so many frames of speech."""
    return Pack((tokens + frames,), targets=frames) if frames else None


def check_fits(
    model: Model,
    layout: Layout,
    tokens: int,
    microbatches: int,
    max_logits: int,
    memory_bytes: float,
    *,
    media_share: float = 0.0,
    train: Collection[str] = OWNERS,
    kernels: str = "cuda",
    frames: int = 0,
) -> Memory:
    """The worst rank's memory. Raises EngineError, one line, where it is more than `memory_bytes`.

    Args:
        model: sizes; of a Talker weights, gradients and optimizer state, and with `frames` its activations.
        layout: settings of the engine, which check_layout has passed.
        tokens: of a packed sequence.
        microbatches: packs of a rank in a step.
        max_logits: loss.max_logits.
        memory_bytes: what a GPU has. Nothing is taken off here: a caller may pass less (RESERVE).
        media_share: of the tokens, see `usual_pack`.
        train: what learns, of train.memory.OWNERS.
        kernels: see train.activations.KERNELS.
        frames: see `spoken`. The Talker has a position for each, and one for each token.
    """
    said = spoken(tokens, frames)
    job = Job(usual_pack(model, tokens, media_share), microbatches, max_logits, train, kernels, said)
    needed = memory_of(model, layout, job)
    if needed.total <= memory_bytes:
        return needed
    parts = ", ".join(f"{part} {size / GB:.1f}" for part, size in needed.largest())
    raise EngineError(
        f"engine.name={layout.name} needs {needed.total / GB:.1f} GB a rank for packs of {tokens} tokens and has "
        f"{memory_bytes / GB:.1f}: {parts}; {_advice(model, layout, job, memory_bytes)}"
    )


def _advice(model: Model, layout: Layout, job: Job, memory_bytes: float) -> str:
    """The first change that fits, else the one that needs least."""
    best, least = "", float("inf")
    for said, changed in changes(layout):
        try:
            check_layout(model, changed)
            total = memory_of(model, changed, job).total
        except EngineError:
            continue
        if total <= memory_bytes:
            return f"{said} fits in {total / GB:.1f} GB"
        if total < least:
            best, least = said, total
    if best:
        return f"{best} still needs {least / GB:.1f} GB: take more GPUs or a shorter data.sequence_length"
    return "take more GPUs or a shorter data.sequence_length"


def changes(layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Settings that need less memory, the cheapest in time first; then some of them together."""
    steps: list[dict[str, Any]] = []
    if not layout.recompute and not layout.recompute_layers:
        steps.append({"recompute": True})
    if layout.name == "deepspeed":
        steps += [{"zero": zero} for zero in range(layout.zero + 1, 4)]
        steps += [{"ep": layout.ep * times} for times in (2, 4, 8, 16, 32)]
        steps += [{"zero": 3, "recompute": True}, {"offload": True}, {"zero": 3, "recompute": True, "offload": True}]
        whole = {"zero": 3, "recompute": False, "recompute_layers": True}
        steps += [whole, *(whole | {"cp": layout.cp * times} for times in (2, 4, 8))]
    if layout.name == "megatron":
        whole = {"recompute": False, "recompute_layers": True}
        steps += [{"ep": layout.ep * times} for times in (2, 4, 8, 16, 32)] + [whole]
        steps += [{key: getattr(layout, key) * times} for times in (2, 4) for key in ("tp", "cp", "pp")]
        steps += [whole | {"ep": max(layout.ep, ep), "pp": max(layout.pp, pp)} for ep in (8, 16) for pp in (1, 2, 4, 8)]
        steps += [whole | {"ep": 8, "pp": pp, "tp": max(2, layout.tp)} for pp in (1, 2, 4)]
    for step in steps:
        changed = {key: value for key, value in step.items() if getattr(layout, key) != value}
        if changed:
            said = " ".join(f"engine.{key}={str(value).lower()}" for key, value in changed.items())
            yield said, replace(layout, **step)
