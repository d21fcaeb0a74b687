"""The settings of a recipe: frozen dataclasses, whose docstrings are the reference of `KEY=VALUE`.

train.recipe composes them from YAML and the command line, and checks what types cannot say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from data.config import DataConfig
from data.mixture import Mixture
from models.config import AudioConfig, AudioDecoderConfig, TextConfig, VisionConfig
from models.omni_config import Code2WavConfig, TalkerConfig
from train.guard_config import GuardConfig
from train.lora_config import LoraConfig
from train.parallel import Degrees
from train.preference import PreferenceConfig
from train.transcribe_config import TranscribeConfig
from train.waveform_config import WaveformConfig


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. Without `vision` it takes text and audio, without `talker` it answers in text alone."""

    text: TextConfig
    audio: AudioConfig
    vision: VisionConfig | None = None
    talker: TalkerConfig | None = None
    code2wav: Code2WavConfig | None = None
    audio_decoder: AudioDecoderConfig | None = None
    """With one, the run trains the audio encoder with it and makes no Thinker (docs/audio_encoder.md)."""
    weights: str | None = None
    """A released checkpoint to finetune: a folder with config.json, whose sizes take the place of these, and
    safetensors, which are what the run starts from (train/finetune.py)."""


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

    steps: int = 0
    tokens: int = 0
    """Instead of `steps`: as many steps as hold so many tokens, every position of the packs counted."""
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
    transcribe: TranscribeConfig = field(default_factory=TranscribeConfig)
    """Of runs with model.audio_decoder."""


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
class EvalSet:
    """A set with a suite of its own."""

    shards: list[str]
    suite: str = ""
    """Instead of eval.suite."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation inside training and by `python -m launch.evaluate`."""

    every: int = 0
    """Steps between evaluations; 0: only at the end of the run."""
    suite: str = "asr"
    """What is asked and counted: asr, vqa, caption, qa, long_qa, likelihood or text (docs/evaluate.md)."""
    best: str = ""
    """SET.METRIC: the checkpoint where it was best is kept, and checkpoints/best names it."""
    sets: dict[str, list[str] | EvalSet] = field(default_factory=dict)
    """Name of a set -> its shards, for instance {heldout: [corpus/heldout/*.tar]}, or {shards: [...], suite: vqa}."""
    max_samples: int = 0
    """Samples taken from each set, always the same random ones; 0: all."""
    max_new_tokens: int = 64
    batch_tokens: int = 4096
    """Prompt tokens decoded together."""


def shards_of(entry: list[str] | EvalSet) -> list[str]:
    """The shards of an evaluation set."""
    return entry if isinstance(entry, list) else entry.shards


@dataclass(frozen=True)
class EndConfig:
    """When the last phase of a run ends before its steps are over: a metric got no better."""

    metric: str = ""
    """SET.METRIC of an evaluation, for instance heldout.wer; empty: never."""
    patience: int = 3
    """Evaluations in a row without a better value."""
    min_delta: float = 0.0
    """What counts as better: by more than this."""


@dataclass(frozen=True)
class LogConfig:
    """metrics.jsonl is always written."""

    every: int = 10
    """Steps between lines."""
    experts_every: int = 100
    """Steps between lines of expert shares by layer and modality; 0: none."""
    view: str = "auto"
    """What the terminal shows: rich (a live table, on a terminal only), bar (one line), off (what happens alone), or
    auto: rich on a terminal and bar elsewhere."""
    tensorboard: bool = False
    """Also write events to RUN/tensorboard."""
    wandb: str = "off"
    """off, offline or online. A server that cannot be reached is said, and the run kept offline."""
    project: str = "omniloom"
    """Of wandb."""
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
    """Weights to start from: a run, a checkpoint or a folder of released-layout safetensors. Several have commas
    between them, and the first that has a parameter gives it."""
    fresh: list[str] = field(default_factory=list)
    """Patterns of parameters that may be in none of them, and then begin anew."""
    carry: str = "weights"
    """What `init` gives: weights, or optimizer: AdamW's moments too, of a run whose last phase trained the same."""
    lora: LoraConfig | None = None
    """Low-rank adapters learn, and nothing else; null: the parameters themselves."""
    phases: dict[str, Phase] = field(default_factory=dict)
    max_steps: int = 0
    """Stop (and save) after this step even if phases go on; 0: no limit. The schedule is not changed by it."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    end: EndConfig = field(default_factory=EndConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
