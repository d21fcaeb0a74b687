"""The layouts of an engine that can be, in order of estimated time, and the best of those that fit.

    degrees that divide --check_layout, check_sequence--> layouts --train.throughput--> sorted --train.memory--> best

Every layout is timed, which is cheap; memory is worked out from the fastest on, until enough fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from models.config import TranscriberConfig
from train.activations import Pack
from train.engine_state import OWNERS, Job
from train.errors import EngineError
from train.fits import RESERVE, check_fits, spoken, usual_pack
from train.hardware import Gpu
from train.memory import Memory, memory_of, weights_of
from train.parallel import Layout, Model, check_layout, check_microbatches, check_sequence, thinker_of
from train.throughput import Estimate, estimate

TRAIN = {"everything": OWNERS, "decoder": ("decoder",), "encoders": ("audio", "vision"), "talker": ("talker",)}
MOST = 64  # of a degree


@dataclass(frozen=True)
class Question:
    """What the command line asks, checked."""

    model_name: str
    model: Model
    gpus: int
    gpu: Gpu
    per_node: int
    seq: int
    sequences: int
    precision: str
    media: float
    frames: int
    train: str
    max_logits: int
    top: int
    engines: tuple[str, ...]
    fixed: Mapping[str, int | bool]

    def job(self, layout: Layout) -> Job:
        """What a rank does in a step."""
        said = spoken(self.words, self.frames)
        return Job(self.pack, self.microbatches(layout), self.max_logits, TRAIN[self.train], spoken=said)

    @property
    def words(self) -> int:
        """Tokens of a pack that the Thinker reads."""
        return self.seq - self.frames

    @property
    def pack(self) -> Pack:
        """What a pack holds of these."""
        return usual_pack(self.model, self.words, self.media)

    def microbatches(self, layout: Layout) -> int:
        """Packs of a rank in a step."""
        return -(-self.sequences // layout.dp)


@dataclass(frozen=True)
class Choice:
    """A layout that can be and fits."""

    layout: Layout
    memory: Memory
    estimate: Estimate


def layouts(engine: str, question: Question) -> Iterator[Layout]:
    """Every layout of an engine that can be, with the degrees that the command line fixed."""
    size, text = question.gpus, thinker_of(question.model).text
    divisors = [n for n in range(1, min(size, MOST) + 1) if size % n == 0]
    both = (False, True)
    options: dict[str, Sequence[int | bool]] = {"recompute": both}
    if engine == "deepspeed":
        shares = [n for n in divisors if n <= 16]
        options |= {"zero": (1, 2, 3), "ep": divisors, "offload": both, "cp": shares, "recompute_layers": both}
    elif engine == "megatron":
        options |= {
            "tp": [n for n in divisors if text.num_key_value_heads % n == 0],
            "pp": [n for n in divisors if n <= text.num_hidden_layers],
            "cp": [n for n in divisors if n <= 16],
            "ep": [n for n in divisors if text.num_experts % n == 0],
            "expert_tp": (1, 2),
            "interleave": [n for n in (1, 2, 3, 4, 6) if n <= text.num_hidden_layers],
            "recompute_layers": both,
        }
    if isinstance(question.model, TranscriberConfig):
        options = {name: values for name, values in options.items() if name in ("zero", "offload")}
        options["recompute_layers"] = both
    options |= {name: (value,) for name, value in question.fixed.items()}
    for values in product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        layout = Layout(engine, question.precision, world=size, **chosen)  # type: ignore[arg-type]
        if layout.recompute and layout.recompute_layers:
            continue  # whole layers hold the experts
        if engine == "deepspeed" and layout.recompute and layout.ep > 1:
            continue  # AutoEP's experts do not know the setting
        try:
            check(question, layout)
        except EngineError:
            continue
        yield layout


def check(question: Question, layout: Layout) -> None:
    """Raise EngineError for a layout that cannot be, or that leaves ranks without work."""
    check_layout(question.model, layout)
    check_sequence(layout, question.seq)
    check_microbatches(layout, question.microbatches(layout))
    if question.sequences % layout.dp:
        raise EngineError(
            f"data.sequences_per_step={question.sequences} is not a multiple of the {layout.dp} data-parallel ranks: "
            "some would have nothing to do; change sequences_per_step, or engine.pp, engine.cp, engine.tp"
        )


def choose(engine: str, question: Question) -> tuple[list[Choice], int]:
    """The best layouts of an engine that fit, the fastest first, and how many can be."""
    room = question.gpu.memory * (1 - RESERVE)
    timed = []
    for layout in layouts(engine, question):
        if _least(question, layout) > room:
            timed.append((float("inf"), layout, None))
            continue
        found = estimate(
            question.model,
            layout,
            question.pack,
            question.microbatches(layout),
            question.sequences,
            question.gpu,
            question.per_node,
        )
        timed.append((found.seconds, layout, found))
    best = []
    for _, layout, found in sorted(timed, key=lambda item: item[0]):
        if found is None or len(best) == question.top:
            break
        memory = memory_of(question.model, layout, question.job(layout))
        if memory.total <= room:
            best.append(Choice(layout, memory, found))
    return best, len(timed)


def _least(question: Question, layout: Layout) -> float:
    """A floor of memory, without activations."""
    dense, experts = weights_of(question.model, layout)
    size = 2 if question.precision == "bf16" else 4
    if layout.name == "deepspeed" and layout.zero == 3:
        return size * (dense / layout.dense_dp + experts / layout.expert_dp)
    return size * (dense + experts) * 0.9


def why_nothing(question: Question, counts: Mapping[str, int]) -> EngineError:
    """Why there is nothing to say."""
    for engine in sorted(question.engines, key=lambda name: name != "megatron"):
        if counts[engine]:
            layout = min(
                layouts(engine, question),
                key=lambda layout: memory_of(question.model, layout, question.job(layout)).total,
            )
            try:
                check_fits(
                    question.model,
                    layout,
                    question.words,
                    question.microbatches(layout),
                    question.max_logits,
                    question.gpu.memory * (1 - RESERVE),
                    media_share=question.media,
                    train=TRAIN[question.train],
                    frames=question.frames,
                )
            except EngineError as error:
                return error
    engine = "megatron" if "megatron" in question.engines else question.engines[0]
    return EngineError(why_none(question, engine))


def why_none(question: Question, engine: str) -> str:
    """Why no layout of an engine can be."""
    plain = Layout(engine, question.precision, world=question.gpus)
    for names in (*[(name,) for name in question.fixed], tuple(question.fixed)):
        try:
            check(question, replace(plain, **{name: question.fixed[name] for name in names}))  # type: ignore[arg-type]
        except EngineError as error:
            if names != ("interleave",) or "pp" in question.fixed:
                return str(error)
    try:
        check(question, plain)
    except EngineError as error:
        return str(error)
    return f"no layout with {', '.join(f'engine.{key}={value}' for key, value in question.fixed.items())} can be"
