"""Which engine and which degrees: what each layout needs, and the command line of the best few.

    python -m launch.plan model=qwen3_omni_30b_a3b gpus=64 gpu=h200 seq=32768
    model=NAME               of recipes/model
    gpus=N gpu=NAME          NAME of train/hardware.py; gpus_per_node=8
    seq=N                    tokens of a packed sequence, with the frames that are said
    batch_tokens=N           of a step (default: 4,194,304), or sequences_per_step=N
    media=SHARE              of the tokens that are sound and pictures (default: 0)
    frames=N                 of speech in a packed sequence, for a Talker that learns (default: 0)
    precision=bf16  train=everything|decoder|encoders|talker  max_logits=N
    top=5  engine=NAME  engine.tp=2 ...     only this engine, only layouts with these degrees

layouts --check_layout--> those that can be --train.throughput--> in order of time --train.memory--> those that fit

Sizes follow from the code and are tested against measured peaks (docs/plan.md). Times are estimates from data sheets,
for ranking. Nothing is allocated. Cost: seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from launch.arguments import guarded, number, parse, whole
from launch.plan_search import TRAIN, Question, choose, why_none, why_nothing
from launch.plan_table import header, table
from models.config import ThinkerConfig, TranscriberConfig
from models.omni_config import OmniConfig
from train.errors import RecipeError
from train.hardware import GPUS
from train.parallel import ENGINES, Layout, Model
from train.recipe import load_recipe
from train.typed import nearest

KNOWN = {
    "model": None,
    "gpus": None,
    "gpu": None,
    "seq": None,
    "gpus_per_node": "8",
    "batch_tokens": "",
    "sequences_per_step": "",
    "precision": "bf16",
    "media": "0",
    "frames": "0",
    "train": "everything",
    "top": "5",
    "engine": "",
    "max_logits": "40000000",
}
DEGREES = ("zero", "ep", "tp", "pp", "cp", "expert_tp", "interleave", "recompute", "recompute_layers", "offload")


def read(argv: Sequence[str]) -> Question:
    """The command line. Raises RecipeError or EngineError."""
    given, rest = parse(argv, KNOWN)
    gpu = _named("gpu", given["gpu"], GPUS)
    engine = given["engine"]
    if engine and engine not in ENGINES:
        raise RecipeError(f"engine={engine}{nearest(engine, ENGINES)}; it is one of {', '.join(ENGINES)}")
    if given["precision"] not in ("bf16", "fp32"):
        raise RecipeError(f"precision={given['precision']}; it is one of bf16, fp32")
    train = given["train"]
    if train not in TRAIN:
        raise RecipeError(f"train={train}{nearest(train, list(TRAIN))}; it is one of {', '.join(TRAIN)}")
    model, seq = model_named(given["model"]), whole(given, "seq", 1, 1 << 24)
    frames = whole(given, "frames", 0, seq - 1)
    speaks = isinstance(model, OmniConfig) and model.talker is not None
    if not speaks and (frames or train == "talker"):
        key = "frames" if frames else "train"
        raise RecipeError(f"{key}={given[key]}: model={given['model']} has no Talker")
    fixed, engines = _fixed(rest), (engine,) if engine else ENGINES
    if isinstance(model, TranscriberConfig):
        engines = _undivided(engines, fixed)
    if given["sequences_per_step"] and given["batch_tokens"]:
        raise RecipeError("give batch_tokens= or sequences_per_step=, not both")
    if given["sequences_per_step"]:
        sequences = whole(given, "sequences_per_step", 1, 1 << 24)
    else:
        tokens = whole({"batch_tokens": given["batch_tokens"] or str(1 << 22)}, "batch_tokens", seq, 1 << 40)
        sequences = tokens // seq
    return Question(
        given["model"],
        model,
        whole(given, "gpus", 1, 1 << 17),
        GPUS[gpu],
        whole(given, "gpus_per_node", 1, 1024),
        seq,
        sequences,
        given["precision"],
        number(given, "media", 0, 0.95),
        frames,
        train,
        whole(given, "max_logits", 1, 1 << 40),
        whole(given, "top", 1, 100),
        engines,
        fixed,
    )


def model_named(name: str) -> Model:
    """The model of recipes/model/NAME.yaml. Raises RecipeError with the nearest name."""
    nothing = [f"{key}=none" for key in ("init", "data.tokenizer")]
    sizes = load_recipe(["recipe=stage2", f"model={name}", "data.shards=[none]", *nothing]).model
    last = sizes.text.vocab_size - 1  # placeholders of media: any three words
    if sizes.audio_decoder is not None:
        return TranscriberConfig(ThinkerConfig(sizes.text, sizes.audio, last), sizes.audio_decoder)
    thinker = ThinkerConfig(sizes.text, sizes.audio, last, sizes.vision, last - 1, last - 2)
    if sizes.talker is None:
        return thinker
    names = [field.name for field in fields(OmniConfig) if field.name.endswith("_token_id")]
    joining: dict[str, Any] = {name: place for place, name in enumerate(names)}
    return OmniConfig(thinker, sizes.talker, **joining)


def _named(key: str, value: str, known: Mapping[str, object]) -> str:
    if value.lower() in known:
        return value.lower()
    raise RecipeError(f"unknown {key}={value}{nearest(value.lower(), list(known))}; there are {', '.join(known)}")


def _undivided(engines: Sequence[str], fixed: Mapping[str, int | bool]) -> tuple[str, ...]:
    """The engines for an audio encoder and its decoder, whose layers no engine divides. Raises RecipeError."""
    alone = "an audio encoder and its decoder have no experts, and no engine divides their layers"
    if engines == ("megatron",):
        raise RecipeError(f"engine=megatron: {alone}; take deepspeed or local")
    for key in fixed:
        if key not in ("zero", "offload", "recompute_layers"):
            raise RecipeError(f"engine.{key}: {alone}; leave it out")
    return tuple(engine for engine in engines if engine != "megatron")


def _fixed(words: Sequence[str]) -> dict[str, int | bool]:
    """engine.tp=2 and the like."""
    kinds = {field.name: field.type for field in fields(Layout) if field.name in DEGREES}
    found: dict[str, int | bool] = {}
    for word in words:
        key, _, value = word.partition("=")
        name = key.removeprefix("engine.")
        if not key.startswith("engine.") or name not in kinds:
            raise RecipeError(f"unknown setting {key!r}{nearest(key, [f'engine.{degree}' for degree in DEGREES])}")
        if kinds[name] == "bool":
            if value not in ("true", "false"):
                raise RecipeError(f"{key} must be true or false, not {value!r}")
            found[name] = value == "true"
        else:
            found[name] = whole({key: value}, key, 1, 1 << 17)
    return found


def answer(question: Question) -> Iterator[str]:
    """Lines of the answer. Raises EngineError where nothing can be or nothing fits."""
    yield from header(question)
    yield "Commands need init=, data.shards= and data.tokenizer= beside what is printed."
    found = {engine: choose(engine, question) for engine in question.engines}
    if not any(best for best, _ in found.values()):
        raise why_nothing(question, {engine: count for engine, (_, count) in found.items()})
    for engine, (best, count) in found.items():
        yield ""
        if best:
            yield from table(question, engine, best, count)
        elif count:
            yield f"{engine}: {count} layouts can be, and none fits"
        else:
            yield f"{engine}: {why_none(question, engine)}"


def main(argv: Sequence[str]) -> None:
    """Print the answer."""
    lines = list(answer(read(argv)))
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
