"""From a published layout to a suite's numbers: converted sets are asked and graded by `launch.evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data.convert_sets import main
from tests.data.convert_kit import clip, film, picture
from tests.data.test_benchmarks import fleurs_files, mmlu_files, put, sheet, vqa_files
from tests.launch.tiny_omni import tiny_tokenizer, write_omni

pytest.importorskip("train.suites", reason="evaluation suites are absent")
SHOWN = {"questions": [{"image_id": 42, "question": "Colour?", "question_id": 42000}]}


def vqa(folder: Path) -> None:
    vqa_files(folder)
    put(folder / "v2_OpenEnded_mscoco_val2014_questions.json", SHOWN)


def lvbench(folder: Path) -> None:
    asked = {"uid": "7", "question": "Who?\n(A) he\n(B) she", "answer": "B", "time_reference": "00:30-01:00"}
    line = {"key": "abc", "video_info": {"duration_minutes": 1}, "qa": [asked]}
    put(folder / "video_info.meta.jsonl", json.dumps(line))
    put(folder / "videos/abc.mp4", film())


def mmau(folder: Path) -> None:
    put(folder / "a.wav", clip())
    row = {"id": "a", "audio_id": "a.wav", "question": "What?", "choices": ["dog", "cat"], "answer": "cat"}
    put(folder / "mmau-test-mini.json", [row])


def clotho(folder: Path) -> None:
    head = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
    captions = [f"rain falls on a roof {i}" for i in range(5)]
    sheet(
        folder / "clotho_captions_evaluation.csv",
        [head, ["rain.wav", *captions], ["b.wav", *["a dog barks twice"] * 5]],
    )
    put(folder / "evaluation/rain.wav", clip())
    put(folder / "evaluation/b.wav", clip())


def coco(folder: Path) -> None:
    notes = [{"image_id": 1, "id": n, "caption": "a cat on a mat"} for n in range(5)]
    put(
        folder / "annotations/captions_val2017.json",
        {"images": [{"id": 1, "file_name": "1.png"}], "annotations": notes},
    )
    put(folder / "val2017/1.png", picture())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_omni(folder / "model")
    tiny_tokenizer().save(folder / "tokenizer")
    return folder


@pytest.mark.parametrize(
    ("name", "make", "suite", "best", "options"),
    [
        ("fleurs", fleurs_files, "asr", {"wer": 0.0, "cer": 0.0}, ()),
        ("vqav2", vqa, "vqa", {"accuracy": 1.0, "exact": 1.0}, ()),
        ("lvbench", lvbench, "long_qa", {"accuracy": 1.0}, ()),
        ("mmau", mmau, "qa", {"accuracy": 1.0, "no_choice": 0.0}, ()),
        ("clotho", clotho, "caption", {"bleu": 1.0}, ()),
        ("coco", coco, "caption", {"rouge_l": 1.0}, ()),
        ("mmlu", mmlu_files, "likelihood", {}, ("--shots", "1")),
    ],
)
def test_a_set_is_asked_and_graded(
    model: Path,
    tmp_path: Path,
    name: str,
    make: Callable[[Path], None],
    suite: str,
    best: dict[str, float],
    options: tuple,
) -> None:
    """The tiny model gets numbers; the published answers themselves get the best that a metric can be."""
    from data.corpus import Corpus
    from data.prompts import PromptSet
    from data.reader import Reader
    from launch.arguments import guarded
    from launch.evaluate import evaluate
    from tests.data.layouts import layout_of
    from train.evaluation_report import make_report
    from train.suites import Answered
    from train.suites.registry import SUITES

    make(tmp_path / "in")
    assert (
        main([name, str(tmp_path / "in"), str(tmp_path / "out"), "--tokenizer", str(model / "tokenizer"), *options])
        == 0
    )
    shards = sorted(map(str, (tmp_path / "out").glob("*/*.tar")))
    words = f"shards={','.join(shards)}", f"suite={suite}", f"out={tmp_path}/eval", "eval.max_new_tokens=4"
    assert guarded(evaluate, (f"model={model}/model", *words)) == 0
    (path,) = (tmp_path / "eval").glob("*.json")
    body = json.loads(path.read_text())
    assert body["suite"] == suite and body["rows"][-1]["num_samples"] >= 1 and set(best) <= set(body["metrics"])
    words_of = tiny_tokenizer()
    corpus = Corpus.open(shards)
    asked = PromptSet(Reader(corpus, words_of, seed=0, layout=layout_of(words_of)))
    prompts = [asked.prompt(int(sample)) for sample in asked.all]
    module = SUITES[suite]
    assert not any(module.refusal(prompt) for prompt in prompts)
    if suite != "likelihood":
        answers = [Answered(prompt, prompt.reference) for prompt in prompts]
        metrics = make_report("set", module, 0, answers, []).metrics
        assert {metric: metrics[metric] for metric in best} == pytest.approx(best)
