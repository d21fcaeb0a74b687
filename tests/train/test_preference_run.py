"""The recipe `talker` at toy size: four phases, pairs made before the third, resume, one voice; and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from data.codec import open_codec
from data.codes import encode_shards
from data.corpus import Corpus
from data.pair_store import Pair, PairsWriter
from data.shards import write_shards
from data.tokenizer import train_tokenizer
from data.types import Batch
from launch.released import recipe_config
from models.init import init_weights
from models.omni import Omni
from models.omni_config import OmniConfig
from tests.data.corpus_kit import spoken, written
from tests.data.test_kmeans_codec import write as write_codec
from tests.launch.tts_kit import CODES, GROUPS, TOKENIZER, write_run, write_sets
from tests.train.test_speech_run import SIZES, TALKER, answer, lines
from train.checkpoint import open_weights
from train.feed import open_feed
from train.main import main
from train.opening import model_config
from train.optim import select_trainable
from train.preference import TERMS as TERMS_IN_ORDER
from train.preference import PreferenceConfig, PreferenceObjective
from train.recipe import load_recipe, load_saved

TERMS = ["margin", "preference", "right", "sft"]
SHORT = "{steps: 2, speech: frozen, train: [talker.*], lr: 1e-3}"
PHASES = [
    f"phases.context={SHORT}",
    f"phases.continued={SHORT.replace('}', ', sequence_length: 384}')}",
    "phases.preference={steps: 4, speech: preference, train: [talker.*], lr: 3e-3}",
    f"phases.voice={SHORT.replace('}', ', speakers: [bob]}')}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen spoken answers, two without speech, their codec and codes; no pairs yet."""
    folder = tmp_path_factory.mktemp("pairs")
    words = train_tokenizer(["Say word 1 2 3", "What is said?"] * 3, 400)
    words.save(folder / "tokenizer")
    mute = [spoken("mute0"), written("mute2")]
    write_shards([*map(answer, range(16)), *mute], folder / "train", words, 10)
    write_codec(folder / "codec", SIZES)
    encode_shards(Corpus.open([f"{folder}/train/*.tar"]), open_codec(folder / "codec"))
    return folder


def write_pairs(folder: Path) -> None:
    """For all answers but every fourth: the recording's codes, and random ones; the reference finds all codes alike."""
    corpus, codec = Corpus.open([f"{folder}/train/*.tar"]), open_codec(folder / "codec")
    for shard in range(len(corpus.paths)):
        index = Corpus.open([f"{folder}/train/*.tar"], codec=codec.identity).index(shard)
        with PairsWriter(index, codec, {"by": "hand"}) as writer:
            for row in index.speech_rows().tolist():
                assert index.codes is not None
                codes_GF, generator = index.codes.codes(row), torch.Generator().manual_seed(row)
                other_GF = torch.randint(0, 16, (3, 3 + row), generator=generator)
                assert codes_GF is not None
                counts = torch.tensor([[codes_GF.shape[1] + 1.0], [other_GF.shape[1] + 1.0]])
                logprobs_22 = -counts * torch.tensor([math.log(17), 2 * math.log(16)])
                if row % 4 == 3:
                    writer.leave_out(row, "its candidates score alike: word error rate 0.0%")
                else:
                    writer.add(row, Pair(codes_GF, other_GF, logprobs_22), index.codes.speaker(row))
            writer.finish()


def settings(folder: Path, run: Path, *more: str) -> list[str]:
    data = ["sequence_length=192", "sequences_per_step=2", "workers=0", f"codec={folder}/codec", "too_long=error"]
    data += [f"shards=[{folder}/train/*.tar]", f"tokenizer={folder}/tokenizer"]
    engine = ["engine=local", "engine.precision=fp32", "engine.ep=1", "engine.recompute=false"]
    words = [
        *TALKER,
        "loss.preference.residual_weight=0",
        *(f"data.{word}" for word in data),
        *engine,
        *PHASES,
        "init=null",
        "save.every=1",
        "save.keep=9",
        "log.every=1",
    ]
    return ["recipe=talker", "model=tiny_talker", f"run={run}", *words, "optim.warmup_steps=0", "log.keys=true", *more]


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in two commands, as docs/talker.md has it."""
    run = tmp_path_factory.mktemp("run") / "unbroken"
    assert main(settings(folder, run, "max_steps=4")) == 0, "needs no pairs"
    write_pairs(folder)
    assert main(settings(folder, run)) == 0
    return run


def test_each_phase_learns_what_it_is_for(unbroken: Path) -> None:
    codes = ["code 0", "code 1", "code 2"]
    assert [sorted(line["terms"]) for line in lines(unbroken)] == [codes] * 4 + [TERMS] * 4 + [codes] * 2
    pairs = [line["terms"] for line in lines(unbroken)[4:8]]
    assert all(terms["preference"] > 0 and 0 <= terms["right"] <= 1 for terms in pairs)
    assert pairs[-1]["margin"] > pairs[0]["margin"] + 1 and pairs[-1]["preference"] < pairs[0]["preference"]
    assert [line["loss"] for line in lines(unbroken)[4:8]] == pytest.approx([terms["preference"] for terms in pairs])
    assert all(line["skipped"] == 0 for line in lines(unbroken))


def test_each_phase_reads_what_it_is_for(unbroken: Path) -> None:
    keys = [json.loads(line)["keys"] for line in (unbroken / "keys-rank0.jsonl").read_text().splitlines()]
    numbers = [[int(key.rpartition(":a")[2]) for key in step] for step in keys]
    assert len(numbers) == 10 and all(numbers)
    assert max(map(len, numbers[2:4])) > max(map(len, numbers[:2])), "its sequences are longer"
    assert not {number for step in numbers[4:8] for number in step} & {3, 7, 13}, "they have no pairs"
    assert all(number % 2 == 1 for step in numbers[8:] for number in step), "bob's"
    assert any(number % 2 == 0 for step in numbers[:8] for number in step)


def test_what_only_residual_codes_need_is_frozen_meanwhile(unbroken: Path) -> None:
    before, after = (open_weights(unbroken / "checkpoints" / f"step-{step:08d}") for step in (4, 8))
    assert before.names().keys() == after.names().keys(), "no reference is kept"  # type: ignore[attr-defined]

    def moved(name: str) -> bool:
        shape = before.names()[name]  # type: ignore[attr-defined]
        size = math.prod(shape)
        return bool((before.read("weight", name, shape, 0, size) != after.read("weight", name, shape, 0, size)).any())

    assert moved("talker.codec_head.weight") and moved("talker.code_predictor.model.codec_embedding.0.weight")
    assert not moved("talker.code_predictor.lm_head.0.weight") and not moved("thinker.model.embed_tokens.weight")


def test_a_run_stopped_among_pairs_goes_on_exactly(folder: Path, unbroken: Path, tmp_path: Path) -> None:
    assert main(settings(folder, tmp_path / "run", "max_steps=6")) == 0
    assert main(settings(folder, tmp_path / "run")) == 0
    assert [line["loss"] for line in lines(tmp_path / "run")] == [line["loss"] for line in lines(unbroken)]


def test_a_reference_that_is_the_talker_itself_starts_at_ln_2(tmp_path: Path) -> None:
    """Its log-probabilities are those of the batches that a run reads, questions in sound included."""
    sets = write_sets(tmp_path / "sets")
    run = write_run(tmp_path / "run", sets, True)
    recipe = load_saved(run / "recipe.yaml", ["phases={all: {steps: 1, speech: preference}}"])
    corpus, codec = Corpus.open([f"{sets}/spoken/*.tar"]), open_codec(sets / "codec")
    encode_shards(corpus, codec)
    config = model_config(recipe, TOKENIZER)
    assert isinstance(config, OmniConfig)
    omni = Omni(config)
    init_weights(omni, 3)
    settings = PreferenceConfig(residual_weight=0.5)
    objective = PreferenceObjective(omni, settings)

    def written(logprobs: dict[int, torch.Tensor]) -> Batch:
        """A batch of all samples, with these of each key."""
        with PairsWriter(corpus.index(0), codec, {"by": "hand"}) as writer:
            for row in range(6):
                codes = [
                    torch.randint(0, CODES, (GROUPS, frames), generator=torch.Generator().manual_seed(row))
                    for frames in (3 + row, 2 * row)
                ]
                writer.add(row, Pair(*codes, logprobs.get(row, torch.zeros(2, 2))), ("anna", "berta")[row % 2])
            writer.finish()
        (span,) = open_feed(recipe, TOKENIZER, config).spans
        course = open_feed(recipe, TOKENIZER, config).courses[span.name]
        (batch,) = [course.reader.batch(pack) for pack in course.plan.step(0)][:1]
        return batch

    batch = written({})
    rows = [int(key[-1]) for key in batch.keys]
    assert sorted(rows) == list(range(6)) and len(batch.mel_lengths) == 2 and not batch.skipped
    found = dict(zip(rows, objective.reference(batch).split(2), strict=True))
    sums = dict(zip(TERMS_IN_ORDER, objective(written(found)).losses_K.tolist(), strict=True))
    assert sums["preference"] == pytest.approx(6 * math.log(2), rel=1e-5) and abs(sums["margin"]) < 1e-4
    assert objective.totals([batch]).targets == (6,) * 4 and objective.totals([batch]).tokens[0] > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["phases.voice.speakers=[carl]"], "phases.voice.speakers: no answer of 'carl' has speech codes of carl"),
        (["phases.context={steps: 1, speakers: [bob]}"], "phases.context.speakers: the phase has no speech"),
        (["phases.continued.sequence_length=0"], "phases.continued.sequence_length=0: it must be at least 1"),
        (["loss.preference.beta=0"], "loss.preference: beta must be above 0, not 0.0"),
        (["loss.preference.bta=1"], "unknown setting 'loss.preference.bta', did you mean 'loss.preference.beta'?"),
        (["data.shards=[OTHER/*.tar]"], "has no preference pairs; make them with: python -m launch.preferences"),
        (["phases={p: {steps: 1, speech: preference, train: [thinker.*]}}"], "leaves nothing to train of what train"),
        (["data.sequence_length=12", "data.too_long=drop", "phases={p: {steps: 1, speech: preference}}"],
         "no sample is left: all that have preference pairs are longer"),
    ],
)  # fmt: skip
def test_what_is_refused(
    changes: list[str], message: str, folder: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for path in (folder / "train").glob("*[rsx]"):  # without the pairs
        (tmp_path / path.name).symlink_to(path) if path.suffix != ".pairs" else None
    words = [word.replace("OTHER", str(tmp_path)) for word in changes]
    given = settings(folder, tmp_path / "run", *words)
    assert main(given) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_the_real_recipe_builds_the_released_talker() -> None:
    recipe = load_recipe(["recipe=talker", "init=null", "data.shards=[a]", "data.tokenizer=t", "data.codec=c"])
    released = recipe_config("qwen3_omni_30b_a3b")
    assert recipe.model.talker == released.talker and recipe.model.text == released.thinker.text
    assert [phase.speech for phase in recipe.phases.values()] == ["frozen", "frozen", "preference", "frozen"]
    assert recipe.phases["continued"].sequence_length == 32768 and recipe.engine.name == "deepspeed"
    with torch.device("meta"):
        omni = Omni(released)
    for name, phase in recipe.phases.items():
        select_trainable(omni, phase, name)
