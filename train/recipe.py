"""A recipe: everything that decides a run, as frozen dataclasses.

    recipes/NAME.yaml + groups (model/ engine/)  --hydra.compose-->  plain values
    + KEY=VALUE from the command line            --train.typed---->  Recipe, types checked
    Recipe  -->  printed, and saved as recipe.yaml in the run folder

Hydra composes and no more: `@hydra.main` would give every rank an output folder of its own, and nothing here is ever
instantiated by a name in a file. A choice is a plain string, looked up where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data.augment import Augment
from data.config import DataConfig
from data.errors import DataError
from data.mixture import Mixture
from models.config import AudioConfig, TextConfig, VisionConfig
from models.omni_config import Code2WavConfig, TalkerConfig
from train.errors import RecipeError
from train.parallel import ENGINES, Degrees
from train.preference import PreferenceConfig
from train.typed import build, nearest, paths
from train.waveform_config import DECODER_PHASES, WaveformConfig

WAYS = ("off", "live", "detached", "frozen", "cached", "preference", *DECODER_PHASES)  # of phases.X.speech
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. Without `vision` it takes text and audio, without `talker` it answers in text alone."""

    text: TextConfig
    audio: AudioConfig
    vision: VisionConfig | None = None
    talker: TalkerConfig | None = None
    code2wav: Code2WavConfig | None = None


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. The learning rate is a pure function of the step."""

    lr: float = 1e-3
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Multiplier by parameter pattern, for instance {"audio_tower.*": 0.1}. The first match counts."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only: norms, biases and embeddings are not decayed."""
    clip: float = 1.0
    """Largest global gradient norm; 0 for none."""
    schedule: str = "cosine"
    """cosine or wsd (warm-up, stable, decay)."""
    warmup_steps: int = 0
    decay_steps: int = 0
    """wsd: the last so many steps of a phase fall to `final_lr` times lr, linearly."""
    final_lr: float = 0.1
    """Where the schedule ends, as a share of lr."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with its own trainable parameters and a fresh optimizer."""

    steps: int
    train: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of the parameters that learn; all others are frozen."""
    freeze: list[str] = field(default_factory=list)
    """Patterns taken out of `train` again."""
    lr: float | None = None
    """Instead of optim.lr."""
    warmup_steps: int | None = None
    """Instead of optim.warmup_steps."""
    speech: str = "off"
    """How the Talker learns, and what of the Thinker runs for it: live (whole, the Talker's gradient reaches it),
    detached (whole, each with its own gradient), frozen (up to the layer that the Talker reads) or cached (not at all:
    launch.cache_hidden has kept that layer). preference: as frozen, from pairs of code sequences (launch.preferences)
    by the loss of train/preference.py. off: text alone. waveform: the waveform decoder learns, by spectral losses, and
    nothing else runs; adversarial: against discriminators too."""
    speakers: list[str] = field(default_factory=list)
    """Learn from answers of these speakers alone; empty: of all."""
    sequence_length: int | None = None
    """Instead of data.sequence_length: the phase then has a plan of its own."""
    mixture: Mixture | None = None
    """Instead of data.mixture: the phase then has a plan of its own, whose epochs count from its first step."""


@dataclass(frozen=True)
class LossConfig:
    """Weights and block sizes of the loss."""

    balance: float = 0.001
    """Weight of the load-balancing loss (docs/design.md)."""
    text: float = 1.0
    """Weight of the Thinker's cross-entropy in phases that train speech with it."""
    residual: float = 0.3
    """Weight of the residual codebooks together, beside the first one's 1; theirs is the mean."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Of phases with speech=preference."""
    max_logits: int = 40_000_000
    """Logits that exist at the same time; 160 MB in fp32 by default."""
    waveform: WaveformConfig = field(default_factory=WaveformConfig)
    """Of phases that train the waveform decoder (train/waveform_config.py)."""


@dataclass(frozen=True)
class EngineConfig(Degrees):
    """What runs the optimizer step: beside its degrees."""

    device: str = "auto"
    """auto, cpu or cuda."""
    share_encoders: bool = True
    """deepspeed: deal the media of a step over the ranks evenly, whatever rank their documents are on. The encoders'
    activations of a whole step are held then; false encodes micro-batch by micro-batch, each rank its own."""
    media_share: float = 0.25
    """megatron: of a pack's tokens, how many are thought to be media when layers are dealt to pipeline stages: the
    first stage has the encoders too, and gets so many layers fewer."""
    dispatcher: str = "alltoall"
    """megatron: alltoall, or deepep where that package is installed."""
    transformer_engine: bool = False
    """megatron: linear maps and norms of TransformerEngine, where that package is installed."""
    overlap: bool = False
    """megatron: reduce gradients while the backward goes on, gather weights while the forward does."""
    memory_gb: float = 0.0
    """megatron: memory that a rank may take; a layout that needs more (docs/plan.md) is refused before a model is made.
    0 is the GPU's own; on a CPU, no limit."""
    threads: int = 0
    """CPU threads of a process; 0 leaves torch's choice."""


@dataclass(frozen=True)
class SaveConfig:
    """Checkpoints."""

    every: int = 1000
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation inside training and by `python -m launch.evaluate`."""

    every: int = 0
    """Steps between evaluations; 0: only at the end of the run."""
    suite: str = "asr"
    sets: dict[str, list[str]] = field(default_factory=dict)
    """Name of a set -> its shards, for instance {heldout: [corpus/heldout/*.tar]}."""
    max_samples: int = 0
    """Samples taken from each set, always the same random ones; 0: all."""
    max_new_tokens: int = 64
    batch_tokens: int = 4096
    """Prompt tokens decoded together."""


@dataclass(frozen=True)
class LogConfig:
    """metrics.jsonl is always written."""

    every: int = 10
    """Steps between lines."""
    wandb: str = "off"
    """off, offline or online."""
    project: str = "omniloom"
    keys: bool = False
    """Also write the keys of every sample consumed, per rank: proof of exact resume."""


@dataclass(frozen=True)
class Recipe:
    """One run."""

    name: str
    model: ModelConfig
    data: DataConfig
    seed: int = 0
    run: str = "outputs/${name}"
    """Folder of the run: recipe.yaml, metrics.jsonl, checkpoints/, eval/, curves.png."""
    resume: str = "auto"
    """auto: go on if there is a checkpoint; latest: there must be one; never: there must be none; or a path of one."""
    init: str | None = None
    """Weights to start from: a run, a checkpoint or a folder of released-layout safetensors."""
    phases: dict[str, Phase] = field(default_factory=dict)
    max_steps: int = 0
    """Stop (and save) after this step even if phases go on; 0: no limit. The schedule is not changed by it."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True)
class Span:
    """A phase and the steps it covers: from `start` up to, not including, `stop`."""

    name: str
    phase: Phase
    start: int
    stop: int


def spans(recipe: Recipe) -> list[Span]:
    """The phases of a recipe one after the other."""
    found, start = [], 0
    for name, phase in recipe.phases.items():
        found.append(Span(name, phase, start, start + phase.steps))
        start += phase.steps
    return found


def load_recipe(argv: Sequence[str], folder: Path = RECIPES) -> Recipe:
    """Compose `recipe=NAME KEY=VALUE ...`. Raises RecipeError with the nearest valid name for a typo."""
    given = [_split(word) for word in argv]
    names = recipe_names(folder)
    chosen = [value for key, value in given if key == "recipe"]
    if len(chosen) != 1:
        raise RecipeError(f"give one recipe=NAME; there are {', '.join(names)}")
    if chosen[0] not in names:
        raise RecipeError(f"unknown recipe {chosen[0]!r}{nearest(chosen[0], names)}; there are {', '.join(names)}")
    groups = {path.name for path in folder.iterdir() if path.is_dir()}
    choices = [(key, value) for key, value in given if key in groups]
    values = [(key, value) for key, value in given if key not in groups | {"recipe"}]
    for group, value in choices:
        options = sorted(path.stem for path in (folder / group).glob("*.yaml"))
        if value not in options:
            raise RecipeError(f"unknown {group}={value}{nearest(value, options)}; there are {', '.join(options)}")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
        composed = compose(chosen[0], overrides=[f"{key}={value}" for key, value in choices])
    return typed(composed, values, where=f"recipe {chosen[0]}")


def load_saved(path: Path, argv: Sequence[str]) -> Recipe:
    """The recipe of an existing run, from its recipe.yaml, with settings changed. Raises RecipeError."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; give the folder of a run")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a recipe: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, DictConfig):
        raise RecipeError(f"{path}: not a recipe: expected settings")
    return typed(loaded, [_split(word) for word in argv], where=str(path))


def typed(plain: DictConfig, values: Iterable[tuple[str, str]], where: str) -> Recipe:
    """Check plain values and overrides against the dataclasses. Raises RecipeError."""
    known = dict(paths(Recipe))
    values = list(values)
    for key, _ in values:
        if key not in known and not any(free and key.startswith(f"{name}.") for name, free in known.items()):
            raise RecipeError(f"unknown setting {key!r}{nearest(key, list(known))}")
    try:
        OmegaConf.set_struct(plain, False)
        merged = plain.copy()
        for key, value in values:  # a value replaces what was there, dictionaries and lists too
            _require_phase(key, merged)
            given = OmegaConf.select(OmegaConf.from_dotlist([f"{key}={value}"]), key)
            OmegaConf.update(merged, key, given, merge=False)
        defaults = {"run": Recipe.run} if "run" not in merged else {}
        resolved = OmegaConf.to_container(OmegaConf.merge(defaults, merged), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise RecipeError(f"{where}: {' '.join(str(error).split())}") from None
    recipe = build(Recipe, resolved)
    _validate(recipe)
    return recipe


def _require_phase(key: str, merged: DictConfig) -> None:
    """Raise RecipeError for a setting of a phase that there is not: it would train as a new one, after the others."""
    parent, _, rest = key.partition(".")
    name, _, setting = rest.partition(".")
    phases = merged.get("phases")
    if parent == "phases" and setting and isinstance(phases, DictConfig) and name not in phases:
        known = [str(phase) for phase in phases]
        raise RecipeError(f"unknown phase in {key}{nearest(name, known)}; phases.{name}={{steps: ...}} adds one")


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(recipe)))


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Recipes that can be run: files that do not start with an underscore."""
    return sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_"))


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise RecipeError(f"cannot read {word!r}: settings are KEY=VALUE, for instance optim.lr=1e-4")
    return key, value


def _one_of(key: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise RecipeError(f"{key}={value}{nearest(value, options)}; it is one of {', '.join(options)}")


def _check_decoder(where: str, recipe: Recipe) -> None:
    if recipe.model.code2wav is None:
        raise RecipeError(f"{where}: the model has no code2wav; choose one that has")
    piece = recipe.loss.waveform.frames + recipe.loss.waveform.context
    if piece > recipe.data.sequence_length:
        raise RecipeError(
            f"{where}: loss.waveform.frames and context are {piece} frames, above "
            f"data.sequence_length={recipe.data.sequence_length}; raise it or take shorter pieces"
        )


def _validate(recipe: Recipe) -> None:
    """What types cannot say. Checks that need other parts (tokenizer, ranks) live with those parts."""
    _one_of("engine.name", recipe.engine.name, ENGINES)
    _one_of("engine.dispatcher", recipe.engine.dispatcher, ("alltoall", "deepep"))
    _one_of("engine.device", recipe.engine.device, ("auto", "cpu", "cuda"))
    _one_of("engine.precision", recipe.engine.precision, ("fp32", "bf16"))
    _one_of("optim.schedule", recipe.optim.schedule, ("cosine", "wsd"))
    _one_of("log.wandb", recipe.log.wandb, ("off", "offline", "online"))
    _one_of("eval.suite", recipe.eval.suite, ("asr",))
    try:
        recipe.data.validate()
        for name, phase in recipe.phases.items():
            if phase.mixture is not None:
                phase.mixture.validate(f"phases.{name}.mixture")
    except DataError as error:
        raise RecipeError(str(error)) from None
    for name, phase in recipe.phases.items():
        _one_of(f"phases.{name}.speech", phase.speech, WAYS)
        if phase.speech != "off" and recipe.model.talker is None:
            raise RecipeError(f"phases.{name}.speech={phase.speech}: the model has no talker; choose one that has")
        if phase.speech != "off" and not recipe.data.codec:
            raise RecipeError(f"phases.{name}.speech={phase.speech}: data.codec is not set: name the codec's folder")
        if phase.speech == "cached" and (set(recipe.data.speeds) != {1.0} or recipe.data.augment != Augment()):
            raise RecipeError(
                f"phases.{name}.speech=cached: hidden states are of recordings as they are: set data.speeds=[1.0] and "
                "leave data.augment out"
            )
        if phase.speakers and phase.speech == "off":
            raise RecipeError(f"phases.{name}.speakers: the phase has no speech; set phases.{name}.speech too")
        if phase.speech in DECODER_PHASES:
            _check_decoder(f"phases.{name}.speech={phase.speech}", recipe)
    if recipe.engine.zero not in (1, 2, 3):
        raise RecipeError(f"engine.zero={recipe.engine.zero}: it is 1, 2 or 3")
    if not recipe.phases:
        raise RecipeError("phases is empty: give at least one, for instance phases.all.steps=1000")
    at_least_one: Mapping[str, float] = {
        **{f"phases.{name}.steps": phase.steps for name, phase in recipe.phases.items()},
        **{
            f"phases.{name}.sequence_length": phase.sequence_length
            for name, phase in recipe.phases.items()
            if phase.sequence_length is not None
        },
        "engine.ep": recipe.engine.ep,
        "save.every": recipe.save.every,
        "save.keep": recipe.save.keep,
        "log.every": recipe.log.every,
        "loss.max_logits": recipe.loss.max_logits,
        "eval.max_new_tokens": recipe.eval.max_new_tokens,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise RecipeError(f"{key}={value}: it must be at least 1")
