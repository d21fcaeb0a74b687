"""The advisor's answer as text: what was asked, then for each engine memory, bytes and times of its best layouts.

Choices --table--> lines of at most 120 characters, and the command line of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launch.plan_search import Choice, Question
from models.config import TranscriberConfig
from train.fits import GB, RESERVE
from train.parallel import Layout
from train.throughput import EFFICIENCY, HIDDEN, pack_flops

COLUMNS = {  # of memory: what a column adds up
    "weights": ("weights",),
    "grads": ("gradients",),
    "optim": ("optimizer",),
    "attn": ("attention",),
    "experts": ("experts",),
    "norms": ("norms",),
    "encod": ("encoders",),
    "head": ("head", "logits"),
    "buffers": ("buffers",),
}
SHORT = {"tp": "tp", "cp": "cp", "pp": "pp", "interleave": "x", "ep": "ep", "expert_tp": "etp"}


def header(question: Question) -> Iterator[str]:
    """What is asked, and by which figures it is answered."""
    gpu, seq = question.gpu, question.seq
    flops = pack_flops(question.model, question.pack) / question.words
    said = f", {question.frames:,} of them frames" if question.frames else ""
    nodes = -(-question.gpus // question.per_node)
    yield (
        f"{question.model_name}, {question.train} trains, {question.precision}: packs of {seq:,} tokens{said} (one "
        f"document, {question.media:.0%} media), {question.sequences:,} a step"
    )
    yield (
        f"{question.gpus} x {gpu.name} on {nodes} {'node' if nodes == 1 else 'nodes'}. Data sheet: {gpu.memory / GB:g} "
        f"GB, {gpu.flops / 1e12:g} TFLOP/s bf16, NVLink {gpu.nvlink / GB:g}, network {gpu.network / GB:g} GB/s a GPU"
    )
    yield (
        f"FLOPs: {flops / 1e9:.2f} GFLOP a token, forward and backward (causal half of attention, chosen experts, no "
        "recomputation)"
    )
    yield (
        f"Times are ESTIMATES from these figures, not measured: products at {EFFICIENCY:.0%} of the peak (assumed), "
        f"{HIDDEN:.0%} of compute"
    )
    yield "hides the reduction of gradients (assumed), nothing else overlaps. They order layouts and promise nothing."
    room = gpu.memory * (1 - RESERVE) / GB
    if question.frames:
        yield "FLOPs and times are the Thinker's alone; memory has the Talker's work too."
    yield f"Memory is the worst rank's, to fit in {1 - RESERVE:.0%} of a GPU: {room:.1f} GB. docs/plan.md says more."


def table(question: Question, engine: str, best: Sequence[Choice], count: int) -> Iterator[str]:
    """Memory, bytes and times of an engine's best layouts, and their commands."""
    yield f"{engine}: best {len(best)} of {count} layouts that can be"
    names = [f"{place}. {name_of(choice.layout)}" for place, choice in enumerate(best, 1)]
    wide = max(28, *(len(name) + 1 for name in names))
    yield f"  {'memory, GB':{wide}}" + "".join(f"{name:>8}" for name in COLUMNS) + f"{'total':>8}"
    for name, choice in zip(names, best, strict=True):
        parts = choice.memory.parts
        sizes = [sum(parts[part] for part in group) / GB for group in COLUMNS.values()]
        yield f"  {name:{wide}}" + "".join(f" {size:7.1f}" for size in sizes) + f" {choice.memory.total / GB:7.1f}"
    yield f"  {'sent by a rank a step, GB':{wide}}" + "".join(
        f"{name:>8}" for name in ("experts", "tensor", "context", "data", "", "MB/tok", "ranks", "nodes")
    )
    for name, choice in zip(names, best, strict=True):
        found = choice.estimate
        sent = found.exchange.step, found.tensor_bytes, found.context_bytes, found.data_bytes
        token = found.exchange.token, found.exchange.leaving, found.exchange.nodes
        line = (
            "".join(f" {size / GB:7.1f}" for size in sent) + " " * 8 + "".join(f"{size / 1e6:8.2f}" for size in token)
        )
        yield f"  {name:{wide}}{line}"
    terms = ("compute", "bubble", "experts", "tensor", "context", "stages", "data")
    yield f"  {'estimated step, seconds':{wide}}" + "".join(
        f"{term:>8}" for term in (*terms, "total", "idle", "tok/s/G")
    )
    for name, choice in zip(names, best, strict=True):
        found = choice.estimate
        times = "".join(f" {getattr(found, term):7.2f}" for term in terms)
        yield f"  {name:{wide}}{times} {found.seconds:7.2f}{found.idle:8.1%}{found.rate:8,.0f}"
    for place, choice in enumerate(best, 1):
        yield f"  {place}. {command(question, choice.layout)}"


def recipe_of(question: Question) -> str:
    """The recipe that trains such a model so."""
    if isinstance(question.model, TranscriberConfig):
        return "audio_encoder"
    return "talker" if question.frames or question.train == "talker" else "stage2"


def name_of(layout: Layout) -> str:
    """A layout in a few letters: tp2 ep8 pp4 x2 recompute."""
    words = [f"zero{layout.zero}"] if layout.name == "deepspeed" else []
    words += [f"{short}{getattr(layout, key)}" for key, short in SHORT.items() if getattr(layout, key) > 1]
    words += [f"dp{layout.dp}"]
    words += ["recompute"] * layout.recompute + ["layers"] * layout.recompute_layers + ["offload"] * layout.offload
    words += ["host"] * layout.offload_activations
    return " ".join(words)


def command(question: Question, layout: Layout) -> str:
    """The command line that trains so."""
    nodes, processes = -(-question.gpus // question.per_node), min(question.gpus, question.per_node)
    words = ["torchrun", f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"][: 1 + (nodes > 1)]
    words = [*words, f"--nproc-per-node {processes} train.py"] if question.gpus > 1 else ["python train.py"]
    words += [f"recipe={recipe_of(question)} model={question.model_name} engine={layout.name}"]
    words += [f"engine.zero={layout.zero}"] if layout.name == "deepspeed" else []
    words += [f"engine.{key}={getattr(layout, key)}" for key in SHORT if key == "ep" or getattr(layout, key) > 1]
    words += [f"engine.precision={layout.precision} engine.recompute={str(layout.recompute).lower()}"]
    flags = "recompute_layers", "offload", "offload_activations"
    words += [f"engine.{key}=true" for key in flags if getattr(layout, key)]
    words += [f"data.sequence_length={question.seq} data.sequences_per_step={question.sequences}"]
    return " ".join(words)
