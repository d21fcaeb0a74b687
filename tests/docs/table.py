"""What is changed in the documented commands before a test runs them, what is left out, and why: all of it.

Every rule whose pattern is found in a command applies, in order. A command needs one rule at least that says how it is run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.docs.commands import Command, words

TINY_STEPS = "data.workers=0 log.view=off save.every=100 eval.every=0 eval.sets={}"
STAGE = f"engine.precision=fp32 data.sequence_length=1024 data.sequences_per_step=2 optim.warmup_steps=1 optim.decay_steps=1 {TINY_STEPS}"
ON_CORPUS = "data.shards=[corpus/train/*.tar] data.tokenizer=corpus/tokenizer"


@dataclass(frozen=True)
class Rule:
    """Where `pattern` is found: replace words, append settings, say how it is run.

    how  run: as a process, exit status 0, or `status`;  fresh: the same, and the run's folder is removed before;
         serve: started, asked for its page, stopped;  skip: not run
    says what its output must contain
    slow more than a few seconds: run by make test-slow
    """

    pattern: str
    why: str
    how: str = ""
    replace: tuple[tuple[str, str], ...] = ()
    append: str = ""
    says: str = ""
    status: int = 0
    slow: bool = False


@dataclass(frozen=True)
class Plan:
    """How a command is run: its words after all changes."""

    command: Command
    words: list[str]
    how: str
    says: str
    status: int
    slow: bool
    why: list[str]


RULES = (
    # not run
    Rule(r"^make \S+", "the suite itself, or minutes of training; launch.fsdd and the curriculum are run below by their parts", "skip"),
    Rule(r"^(\./)?\.ci/", "continuous integration runs it, and this test with it", "skip"),
    Rule(r"^pip install |^apt-get |^git clone |^cd |^(source|\.) ", "sets a machine up; no network here", "skip"),
    Rule(r"^mkdocs serve", "mkdocs' own server; the site is built by test_site.py", "skip"),
    Rule(r"^tensorboard ", "TensorBoard's own server", "skip"),
    Rule(r"^wandb sync", "needs a network", "skip"),
    Rule(r"^(sbatch|scancel|scontrol) ", "needs a cluster; tests/launch/test_slurm.py has one", "skip"),
    Rule(r"^bench/gpu/run\.sh", "needs a GPU", "skip"),
    # how
    Rule(r"^python -m (data|launch|bench)\.", "as it is written", "run"),
    Rule(r"^python train\.py ", "as it is written, in a new run", "fresh"),
    Rule(r"^torchrun ", "as it is written, in a new run", "fresh"),
    Rule(r"^launch/local\.sh ", "as it is written", "fresh", slow=True),
    Rule(r"^python -m launch\.demo ", "a server: started, asked for its page, stopped", "serve", replace=(("port=7860", "port=0"),)),
    Rule(r"resume=", "goes on with the run that the command above it left", "run"),
    # two cores
    Rule(r"--nproc-per-node [48]|--nproc-per-node=[48]", "two processes instead of eight: two cores",
         replace=(("--nproc-per-node 8", "--nproc-per-node 2"), ("--nproc-per-node 4", "--nproc-per-node 2"))),
    Rule(r"engine\.ep=[48]", "experts over two processes", replace=(("engine.ep=8", "engine.ep=2"), ("engine.ep=4", "engine.ep=2"))),
    Rule(r"engine\.tp=2 engine\.pp=2 engine\.cp=2", "two processes hold one degree of two",
         replace=(("engine.tp=2 engine.pp=2 engine.cp=2", "engine.tp=2"),)),
    Rule(r"--nnodes \d", "one node, this one", replace=(("--nnodes 8", "--nnodes 1"), ("--nnodes 2", "--nnodes 1"), ("HOST:29500", "localhost:0"))),
    Rule(r"processes=8", "two cores", replace=(("processes=8", "processes=2"),)),
    # sizes
    Rule(r"^(?!.*(small_data|my_model|launch\.slurm)).*recipe=(stage[123]|sft|sft_lora|talker)\b", "a tiny model and one step instead of 30B and months",
         append=STAGE),
    Rule(r"^(?!.*(small_data|my_model))(torchrun|launch/local\.sh).*recipe=stage[123]\b", "a tiny model", append="model=tiny_vision engine.ep=2"),
    Rule(r"^(?!.*launch\.slurm).*recipe=stage1\b", "one step of each phase", append="'phases={adapter: {steps: 1, train: [audio_tower.proj1.*]}}'"),
    Rule(r"^(?!.*(small_data|my_model|launch\.slurm)).*recipe=(stage[23]|sft|sft_lora)\b", "one step", append="phases.all.steps=1"),
    Rule(r"recipe=sft(_lora)? ", "one process", append="engine=local engine.ep=1 engine.recompute=false"),
    Rule(r"recipe=stage3", "the demo's corpus has no document of 32,768 tokens; one step of 1,024 over two ranks", append="engine.cp=2"),
    Rule(r"recipe=(stage2|sft) .* \.\.\.$|recipe=stage2 \.\.\.", "what the dots stand for", append=f"{ON_CORPUS} init=WEIGHTS"),
    Rule(r"init=outputs/(stage[12])", "the world has released weights instead of a run of that stage",
         replace=(("init=outputs/stage1", "init=WEIGHTS"), ("init=outputs/stage2", "init=WEIGHTS"))),
    Rule(r"^python train\.py recipe=demo( |$)", "one phase of one step", append=f"'phases={{pretraining: {{steps: 1}}}}' {TINY_STEPS}"),
    Rule(r"train\.py recipe=(audio_encoder_demo|audio_encoder_fsdd|fsdd)\b", "one step", append=f"phases.all.steps=1 {TINY_STEPS}"),
    Rule(r"recipe=audio_encoder ", "a tiny encoder, one step, and the sources of the demo's corpus",
         replace=(("{asr_zh_en: 80, asr_other: 10, audio_understanding: 10}", "{transcription: 80, words: 10, sound_text: 10, picture_told: 0, "
                   "picture_text: 0, film_text: 0, animals_aloud: 0, words_aloud: 0, picture_voice: 0, picture_aloud: 0, sound_voice: 0, film_voice: 0}"),
                  ("data.tokenizer=FOLDER", "data.tokenizer=corpus/tokenizer")),
         append=f"model=tiny_audio_encoder engine.precision=fp32 phases.all.steps=1 data.sequence_length=1024 data.sequences_per_step=2 {TINY_STEPS}"),
    Rule(r"recipe=code2wav", "one step", append=f"phases.spectral.steps=1 {TINY_STEPS}"),
    Rule(r"recipe=code2wav .*corpus", "the voices of the demo's corpus",
         append="'model.talker.speaker_id={en_f1: 300, en_m1: 301, de_f1: 302, de_m1: 303, zh_f1: 304, zh_m1: 305}' model.text.vocab_size=1024"),
    Rule(r"torchrun.*recipe=curriculum_1b", "1.9B parameters: its job script is made, for which the whole graph is composed and checked", "run",
         replace=(("torchrun --nproc-per-node 8 train.py", "python -m launch.slurm"), ("torchrun --nproc-per-node 2 train.py", "python -m launch.slurm")),
         append="nodes=1 gpus_per_node=8 time=24:00:00"),
    Rule(r"recipe=curriculum_demo$", "one step of each phase, one phase of each stage", slow=True,
         append=f"{TINY_STEPS} audio_encoder.phases.all.steps=1 'foundation.phases={{all: {{steps: 1}}}}' 'stage1.phases={{all: {{steps: 1}}}}' "
                "stage2.phases.all.steps=1 stage3.phases.all.steps=1 'talker.phases={context: {steps: 1, speech: frozen}}' sft.phases.both.steps=1"),
    Rule(r"launch\.slurm|recipe=curriculum_1b", "no cluster here: the script is printed; tests/launch/test_slurm.py submits to one", append="--dry-run",
         says="#SBATCH"),
    # answers of models that have learnt nothing
    Rule(r"launch\.evaluate (run|model)=(?!outputs/stage2)", "a model that has learnt nothing never ends an answer", append="eval.max_new_tokens=4 eval.max_samples=4"),
    Rule(r"suite=(tts|regression)", "the same of speech; the run's own sets hold none", append="max_seconds=1 max_samples=3"),
    Rule(r"suite=(tts|regression)(?!.*shards=)", "the sets that the runs of the world lack", append="'shards=corpus/voices/*.tar'"),
    Rule(r"launch\.generate", "a model that has learnt nothing never ends an answer", append="max_seconds=1 max_new_tokens=8"),
    Rule(r"speaker[= ](ethan|george)", "the demo's voices", replace=(("ethan", "en_f1"), ("george", "en_f1"))),
    Rule(r"\| aplay", "no sound card", replace=(("| aplay", ""),)),
    Rule(r"launch\.preferences", "a model that has learnt nothing never ends an answer", append="candidates=2 max_seconds=1"),
    Rule(r"suite=lm_eval", "lm_eval is not among our packages: the command says so", status=2, says="pip install lm-eval"),
    Rule(r"^torchrun .*small_data.*max_steps=10", "stops in the middle", says="checkpoint  outputs/stage2/checkpoints/step-00000010"),
    Rule(r"^torchrun .*small_data.*resume=latest", "goes on from there", says="resumed at step 10"),
    Rule(r"recipe=stage2 run=outputs/my_model", "two steps instead of two hundred",
         replace=(("phases.all.steps=200", "phases.all.steps=2"), ("optim.warmup_steps=20 optim.decay_steps=50", "optim.warmup_steps=1 optim.decay_steps=1"))),
    # names
    Rule(r"manifest corpus\.jsonl|llava instruct\.json", "the world has a corpus there already, and the demo's tokenizer",
         replace=((".jsonl corpus ", ".jsonl corpus_new "), (".json corpus ", ".json corpus_llava "), ("Qwen3-Omni-30B-A3B-Instruct", "FOLDER"),
                  ("--tokenizer ...", "--tokenizer FOLDER"))),
    Rule(r"data\.fit_codec", "a small codec of little sound", append="codebooks=2 codebook_size=64 vocoder_steps=1 blocks=300 max_seconds=40"),
    Rule(r"a/\*\.tar,b/", "shards that the world has", replace=(("a/*.tar,b/{000..009}.tar", "corpus/voices/*.tar,corpus/heldout/*.tar"), ("OUT", "OUT2"))),
    Rule(r"data\.codes codec=FOLDER", "the corpus's codec", replace=(("codec=FOLDER", "codec=corpus/codec"),)),
    Rule(r"convert_sets NAME", "one of the sets", replace=(("NAME FOLDER", "librispeech LibriSpeech"), ("[--split test]", "--split test-clean"),
                                                            ("[--languages en,zh]", ""))),
    Rule(r"step00000500", "the step of the world's runs", replace=(("heldout-step00000500", "voices-step00000001"), ("out=FOLDER", "out=compared"))),
    Rule(r"data\.inspect run=.*--pack 1000", "the world's runs have one step", replace=(("--pack 1000", "--pack 0"),)),
    Rule(r"evaluate run=RUN shards='OUT", "the set that the page has made has the tokenizer TOKENIZER, which is RUN's"),
    Rule(r"evaluate run=outputs/audio_encoder_demo", "the run above it was made without sets", append="'shards=outputs/demo_data/voices/*.tar'"),
    Rule(r"recipe=talker ", "what the dots stand for: a tiny model, one phase of one step",
         append=f"{ON_CORPUS} data.codec=corpus/codec init=RUN model=tiny_omni engine.ep=2 'phases={{context: {{steps: 1, speech: frozen, "
                "train: [talker.*]}}'", replace=((" max_steps=220000", ""),)),
    Rule(r"from=FOLDER_OR_RUN", "one of the two", replace=(("FOLDER_OR_RUN", "RUN"),)),
    Rule(r"convert init ", "a tiny model without parts of others; tests/launch/test_convert.py brings them",
         replace=(("to=FOLDER", "to=NEW"), ("model=NAME", "model=tiny"), ("text=QWEN3 vision=SIGLIP2_OR_QWEN3VL audio=OWN", ""))),
    Rule(r"adapter=ADAPTER", "the adapter that the page has made", replace=(("ADAPTER", "outputs/mine_adapter"),)),
    Rule(r"launch\.voice", "one step", replace=(("steps=200", "steps=1"),)),
    Rule(r"speech: cached", "one step, on the demo's corpus", replace=(("recipe= ", "recipe=demo_talker "), ("recipe=...", "recipe=demo_talker"), ("steps: 1500", "steps: 1")), append=TINY_STEPS),
    Rule(r"bench\.|suite=regression|log\.view=bar|log\.tensorboard|guard\.spike|--sequence-length 8192|launch\.(voice|preferences|demo run=outputs)"
         r"|recipe=code2wav data|recipe=audio_encoder_demo|run=outputs/audio_encoder_demo", "seconds each, beside others alike", slow=True),
    Rule(r"^(torchrun|launch/local\.sh)(?!.*(small_data|my_model|curriculum_1b))", "processes that each import everything", slow=True),
    Rule(r"outputs/mine|adapter=ADAPTER", "from the run of a slow command", slow=True),
)  # fmt: skip


def plan(command: Command, rules: tuple[Rule, ...] = RULES) -> Plan | None:
    """How a command is run, or None where no rule says it."""
    found = [rule for rule in rules if re.search(rule.pattern, command.text)]
    how = [rule.how for rule in found if rule.how]
    if not how:
        return None
    if "skip" in how:
        return Plan(command, [], "skip", "", 0, False, [rule.why for rule in found if rule.how == "skip"])
    text = command.text
    for rule in found:
        for old, new in rule.replace:
            text = text.replace(old, new)
        text = f"{text} {rule.append}" if rule.append else text
    text = re.sub(r" \.\.\.(?= |$)", "", text)  # settings of the reader's own; a rule says what is put there
    return Plan(
        command, words(text), how[-1], " ".join(rule.says for rule in found if rule.says), max(rule.status for rule in found),
        any(rule.slow for rule in found), [rule.why for rule in found],
    )  # fmt: skip
