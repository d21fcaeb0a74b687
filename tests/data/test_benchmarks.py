"""Published evaluation sets: tiny folders of the same layout become samples that suites can ask and grade."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data.benchmarks import BENCHMARKS
from data.convert_sets import main
from data.grading import Grading
from data.sample import SampleRecord
from tests.data.convert_kit import clip, counts, film, picture, said, samples, tree
from tests.data.corpus_kit import tokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs/datasets.md"
WAV, FLAC, PNG, JPG = clip(), clip(0.4, 300, "flac"), picture(), picture((9, 9, 90), "JPEG")


def put(path: Path, content: bytes | str | Any) -> Path:
    """A file of bytes, text, or anything as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def sheet(path: Path, rows: Sequence[Sequence[Any]], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table as the hub has it: media are bytes and a path."""
    pytest.importorskip("datasets", reason="the optional extra hf is absent")
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def cell(payload: bytes, path: str | None = None) -> dict[str, Any]:
    return {"bytes": payload, "path": path}


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    tokenizer().save(folder)
    return folder


class Kit:
    """Converts a folder and reads what came of it."""

    def __init__(self, folder: Path, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.out, self.words, self.capsys = folder / "in", folder / "out", words, capsys
        self.folder.mkdir()

    def run(self, name: str, *options: Any) -> tuple[int, str, str]:
        self.capsys.readouterr()
        arguments = [name, self.folder, self.out, "--tokenizer", self.words, *options]
        status = main([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        return status, captured.out, captured.err

    def converts(self, name: str, *options: Any) -> str:
        status, printed, error = self.run(name, *options)
        assert status == 0, error
        return printed

    def fails(self, name: str, *options: Any) -> str:
        status, _, error = self.run(name, *options)
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    def records(self, split: str) -> list[SampleRecord]:
        found = samples(self.out / split)
        return [found[key] for key in sorted(found)]


@pytest.fixture
def kit(tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]) -> Kit:
    return Kit(tmp_path, words, capsys)


def asked(record: SampleRecord) -> str:
    """The text of the question, media as their kinds in brackets."""
    parts = record.messages[0]["content"]
    return "".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in parts)


def grading(record: SampleRecord) -> Grading:
    assert record.grading is not None
    return record.grading


# Recordings


def test_librispeech(kit: Kit) -> None:
    home = kit.folder / "LibriSpeech/test-clean/1089/134686"
    put(home / "1089-134686-0000.flac", FLAC)
    put(home / "1089-134686-0001.flac", b"not a flac")
    put(home / "1089-134686.trans.txt", "".join(f"1089-134686-000{i} HE HOPED {i}\n" for i in range(3)))
    printed = kit.converts("librispeech")
    assert counts(printed, "test-clean") == (1, 1, 2)
    assert "no such file: LibriSpeech/test-clean/1089/134686/1089-134686-0002.flac" in printed
    assert "test-clean: 1 samples; 2620 are published (OpenSLR 12): 2619 are missing" in printed
    (record,) = kit.records("test-clean")
    assert (record.key, record.language, record.speaker) == ("000000-1089-134686-0000", "en", "1089")
    assert asked(record) == "[audio]Transcribe." and said(record) == "HE HOPED 0" and record.media == {"flac": FLAC}
    assert record.source == "librispeech" and record.grading is None


def fleurs_files(folder: Path) -> None:
    for language, text in (("en_us", "he said hello"), ("cmn_hans_cn", "他说你好")):
        put(folder / f"data/{language}/audio/test/7.wav", WAV)
        line = f'1\t7.wav\tHe "said\t{text}\th e\t4800\tMALE\n'
        put(folder / f"data/{language}/test.tsv", line)


def test_fleurs(kit: Kit) -> None:
    fleurs_files(kit.folder)
    printed = kit.converts("fleurs")
    assert "test-en_us: 1 samples; 647 are published" in printed
    (record,) = kit.records("test-cmn_hans_cn")
    assert record.language == "zh" and said(record) == "他说你好"


def test_languages_are_chosen_by_code_or_by_folder(kit: Kit) -> None:
    fleurs_files(kit.folder)
    kit.converts("fleurs", "--languages", "zh")
    assert sorted(path.name for path in kit.out.iterdir() if path.is_dir()) == ["test-cmn_hans_cn", "tokenizer"]
    assert "(--languages fr); expected: [data/]LANGUAGE/" in kit.fails("fleurs", "--languages", "fr")
    assert "holds no language fr, but test-en_us; expected" in kit.fails("fleurs", "--languages", "en,fr")


def test_fleurs_as_parquet(kit: Kit) -> None:
    rows = [{"id": 1, "audio": cell(WAV, "7.wav"), "transcription": "hello"}, {"id": 2, "audio": None}]
    parquet(kit.folder / "en_us/test-00000-of-00001.parquet", rows)
    parquet(kit.folder / "de_de/test/0000.parquet", rows[:1])
    printed = kit.converts("fleurs")
    assert counts(printed, "test-en_us") == (1, 1, 1) and "no media: 'audio' is empty" in printed
    assert kit.records("test-de_de")[0].language == "de" and kit.records("test-en_us")[0].media == {"wav": WAV}


def test_common_voice(kit: Kit) -> None:
    home = kit.folder / "cv-corpus-15.0/zh-CN"
    put(home / "clips/a.mp3", clip(1.0, kind="mp3", rate=16_000))
    put(home / "test.tsv", 'client_id\tpath\tsentence\tlocale\nxyz\ta.mp3\t"你好\tzh-CN\nxyz\t../../x.mp3\tno\tzh-CN\n')
    printed = kit.converts("common_voice", "--languages", "zh-CN")
    assert counts(printed, "test-zh-CN") == (1, 1, 1) and "how many are published is not known" in printed
    (record,) = kit.records("test-zh-CN")
    assert said(record) == '"你好' and record.language == "zh" and set(record.media) == {"mp3"}


def test_a_path_does_not_leave_the_folder(kit: Kit) -> None:
    put(kit.folder.parent / "secret.wav", WAV)
    put(kit.folder / "mmau-test-mini.json", [{"id": "1", "audio_id": "../secret.wav", "question": "?", "task": "x"}
                                             | {"choices": ["a", "b"], "answer": "a"}])  # fmt: skip
    assert "path leaves the media folder" in kit.fails("mmau")
    assert "--allow-outside" in kit.fails("mmau") and kit.converts("mmau", "--allow-outside")


def test_aishell1(kit: Kit) -> None:
    home = kit.folder / "data_aishell"
    for name in ("BAC009S0764W0121", "BAC009S0764W0122"):
        put(home / f"wav/test/S0764/{name}.wav", WAV)
    put(home / "transcript/aishell_transcript_v0.8.txt", "BAC009S0764W0121 甚至 出现\n")
    assert "no transcript: BAC009S0764W0122" in kit.converts("aishell1")
    (record,) = kit.records("test")
    assert said(record) == "甚至出现" and (record.language, record.speaker) == ("zh", "S0764")


def test_gtzan(kit: Kit) -> None:
    put(kit.folder / "genres_original/jazz/jazz.00003.wav", WAV)
    kit.converts("gtzan")
    (record,) = kit.records("all")
    assert grading(record).choices[grading(record).correct] == "jazz" and said(record) == "F"
    assert "F. jazz\n" in asked(record)


def test_voicebench(kit: Kit) -> None:
    row = {"audio": cell(WAV), "prompt": "spoken", "reference": "C"}
    parquet(kit.folder / "openbookqa/test-00000-of-00001.parquet", [row, {**row, "reference": "?"}])
    parquet(kit.folder / "sd-qa/usa-00000-of-00001.parquet", [{**row, "reference": "Paris"}])
    printed = kit.converts("voicebench")
    assert counts(printed, "openbookqa-test") == (1, 1, 1) and "answer is no letter of a choice" in printed
    (choice,), (free,) = kit.records("openbookqa-test"), kit.records("sd-qa-usa")
    assert asked(choice) == "[audio]" and said(choice) == "C" and grading(choice).correct == 2
    assert said(free) == "Paris" and free.grading is None


def test_mmau(kit: Kit) -> None:
    put(kit.folder / "test-mini-audios/a.wav", WAV)
    row = {"id": "a", "audio_id": "./test-mini-audios/a.wav", "question": "What is it?", "task": "sound"}
    rows = [{**row, "choices": ["(A) a dog", "(B) a cat"], "answer": "(B) a cat"}]
    rows += [{**row, "choices": ["dog", "cat"], "answer": "cow"}, {**row, "choices": ["dog", "cat"]}]
    put(kit.folder / "mmau-test-mini.json", rows)
    printed = kit.converts("mmau")
    assert "answer is none of the choices: 'cow'" in printed and "no answer: it is not published" in printed
    (record,) = kit.records("test-mini")
    assert asked(record) == "[audio]What is it?\nA. a dog\nB. a cat\nAnswer with the letter." and said(record) == "B"
    assert grading(record) == Grading((), ("a dog", "a cat"), 1, group="sound")


def test_clotho(kit: Kit) -> None:
    head = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
    sheet(kit.folder / "clotho_captions_evaluation.csv", [head, ["rain, 1.wav", *(f"It, rains {i}" for i in range(5))]])
    put(kit.folder / "evaluation/rain, 1.wav", WAV)
    kit.converts("clotho")
    (record,) = kit.records("evaluation")
    assert (
        grading(record).answers == tuple(f"It, rains {i}" for i in range(5))
        and asked(record) == "[audio]Describe the sound."
    )


def test_audiocaps_gathers_the_captions_of_a_clip(kit: Kit) -> None:
    rows = [[n, "-abc", 30, f"caption {n}"] for n in range(5)] + [[9, "gone", 0, "no file"]]
    sheet(kit.folder / "dataset/test.csv", [["audiocap_id", "youtube_id", "start_time", "caption"], *rows])
    put(kit.folder / "audio/test/-abc.wav", WAV)
    printed = kit.converts("audiocaps")
    assert counts(printed, "test") == (1, 1, 1) and "no such file: gone" in printed
    assert len(grading(kit.records("test")[0]).answers) == 5


# Pictures


def test_mmmu_pictures_stand_where_the_text_names_them(kit: Kit) -> None:
    row = {"id": "validation_Art_Theory_1", "question": "Compare <image 1> with it.", "explanation": ""}
    rows = [
        {**row, "options": "['$6', \"it's <image 2>\"]", "answer": "B", "question_type": "multiple-choice"}
        | {"image_1": cell(PNG), "image_2": cell(JPG), "image_3": None},
        {**row, "id": "validation_Art_Theory_2", "options": "[]", "answer": "['7', 'seven']", "question_type": "open"}
        | {"image_1": cell(PNG), "image_2": None, "image_3": cell(JPG)},
        {**row, "options": "['a', 'b']", "answer": "?", "question_type": "multiple-choice", "image_1": cell(PNG)},
    ]
    parquet(kit.folder / "Art_Theory/validation-00000-of-00001.parquet", rows)
    assert "answer is no letter of a choice (not published?)" in kit.converts("mmmu")
    choice, free = kit.records("validation")
    assert asked(choice) == "Compare [image] with it.\nA. $6\nB. it's [image]\nAnswer with the letter."
    assert choice.media == {"0.png": PNG, "1.jpg": JPG} and grading(choice).group == "Art_Theory"
    assert asked(free).startswith("[image]Compare [image]") and grading(free).answers == ("7", "seven")


def test_mmmu_pro(kit: Kit) -> None:
    shared = {"id": "test_History_1", "options": str([f"o{i}" for i in range(10)]), "answer": "J", "subject": "History"}
    parquet(kit.folder / "vision/test-00000-of-00001.parquet", [{**shared, "image": cell(PNG)}])
    row = {**shared, "question": "Which <image 1>?", "image_1": cell(PNG)}
    parquet(kit.folder / "standard (10 options)/test-00000-of-00001.parquet", [row])
    kit.converts("mmmu_pro")
    assert said(kit.records("vision")[0]) == said(kit.records("standard")[0]) == "J"


def test_mmstar_takes_the_choices_out_of_the_question(kit: Kit) -> None:
    row = {"index": 0, "image": PNG, "answer": "B", "category": "coarse perception"}
    rows = [
        {**row, "question": "Where is it?\nOptions: A: Indoors, B: A park, near a lake, C: Sea, D: None"},
        {**row, "question": "Which one?", "image": PNG},
    ]
    parquet(kit.folder / "mmstar.parquet", rows)
    kit.converts("mmstar")
    parsed, plain = kit.records("val")
    assert grading(parsed).choices == ("Indoors", "A park, near a lake", "Sea", "None")
    assert asked(plain) == "[image]Which one?\nAnswer with the letter." and said(plain) == "B"


def test_ai2d_mathvista_mathvision(kit: Kit) -> None:
    home = kit.folder
    parquet(
        home / "a/test-00000-of-00001.parquet",
        [{"question": "q", "options": ["x", "y"], "answer": "1", "image": cell(PNG)}],
    )
    shown = {"decoded_image": cell(PNG), "question": "How long?"}
    rows = [
        {**shown, "pid": "1", "choices": ["3", "4"], "answer": "4", "unit": "cm"},
        {**shown, "pid": "2", "choices": None, "answer": "12", "unit": None},
    ]
    parquet(home / "b/testmini-00000-of-00001.parquet", rows)
    kit.converts("ai2d")
    assert said(kit.records("test")[0]) == "B"
    kit.out = kit.out.with_name("out2")
    kit.converts("mathvista")
    choice, free = kit.records("testmini")
    assert "(unit: cm)\nA. 3" in asked(choice) and said(choice) == "B" and grading(free).answers == ("12",)
    row = {
        "id": "1",
        "question": "See <image1>. Which?",
        "options": ["A", "B"],
        "decoded_image": cell(PNG),
        "answer": "B",
        "subject": "algebra",
    }
    kit.folder, kit.out = home / "c", kit.out.with_name("out3")
    parquet(kit.folder / "data/test-00000-of-00001.parquet", [row])
    kit.converts("mathvision")
    assert asked(kit.records("test")[0]).startswith("[image]See . Which?\nA. A\nB. B")


@pytest.mark.parametrize("names", [("question", "answer"), ("query", "label")])
def test_chartqa_as_parquet(kit: Kit, names: tuple[str, str]) -> None:
    row = {names[0]: "How much?", names[1]: "14" if names[1] == "answer" else ["14"], "image": cell(PNG)}
    parquet(kit.folder / "data/test-00000-of-00001.parquet", [row])
    kit.converts("chartqa")
    assert grading(kit.records("test")[0]).answers == ("14",)


def test_chartqa_as_files(kit: Kit) -> None:
    for kind in ("human", "augmented"):
        row = {"imgname": f"{kind}.png", "query": "How much?", "label": "14"}
        put(kit.folder / f"ChartQA Dataset/test/test_{kind}.json", [row])
        put(kit.folder / f"ChartQA Dataset/test/png/{kind}.png", PNG)
    assert "test: 2 samples; 2500 are published" in kit.converts("chartqa")
    assert [grading(record).group for record in kit.records("test")] == ["human", "augmented"]


def vqa_files(folder: Path) -> None:
    shown = [
        {"image_id": 42, "question": "Colour?", "question_id": 42000},
        {"image_id": 7, "question": "?", "question_id": 1},
    ]
    put(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": shown})
    answers = [{"answer": text, "answer_id": n} for n, text in enumerate(["blue"] + ["red"] * 9)]
    notes = [{"question_id": 42000, "answers": answers, "answer_type": "other"}]
    put(folder / "v2_mscoco_val2014_annotations.json", {"annotations": notes})
    put(folder / "val2014/COCO_val2014_000000000042.jpg", JPG)


def test_vqav2(kit: Kit) -> None:
    vqa_files(kit.folder)
    printed = kit.converts("vqav2")
    assert counts(printed, "val") == (1, 1, 1) and "no answer: it is not published" in printed
    (record,) = kit.records("val")
    assert grading(record) == Grading(("blue", *["red"] * 9), group="other") and said(record) == "red"


def test_textvqa(kit: Kit) -> None:
    row = {"image_id": "abc", "question": "Brand?", "question_id": 5, "answers": ["nokia"] * 10}
    put(kit.folder / "TextVQA_0.5.1_val.json", {"data": [row]})
    put(kit.folder / "train_images/abc.jpg", JPG)
    kit.converts("textvqa")
    assert len(grading(kit.records("val")[0]).answers) == 10


def test_hallusionbench(kit: Kit) -> None:
    row = {"category": "VD", "subcategory": "figure", "set_id": "0", "figure_id": "1", "question_id": "0"}
    row |= {"question": "Is it red?", "gt_answer": "1", "visual_input": "1", "filename": "./VD/figure/0_1.png"}
    put(kit.folder / "HallusionBench.json", [row, {**row, "visual_input": "0", "filename": None, "gt_answer": "0"}])
    put(kit.folder / "hallusion_bench/VD/figure/0_1.png", PNG)
    kit.converts("hallusionbench")
    seen, unseen = kit.records("all")
    assert asked(seen) == "[image]Is it red?\nAnswer yes or no." and said(seen) == "Yes" and said(unseen) == "No"
    assert not unseen.media and grading(unseen).correct == 1


def test_coco(kit: Kit) -> None:
    put(kit.folder / "val2017/1.jpg", JPG)
    notes = [{"image_id": 1, "id": n, "caption": f"A cat {n}.\n"} for n in range(5)]
    put(
        kit.folder / "annotations/captions_val2017.json",
        {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": notes},
    )
    image = {"filepath": "val2017", "filename": "1.jpg", "split": "test", "cocoid": 1, "sentences": [{"raw": "A cat."}]}
    put(kit.folder / "dataset_coco.json", {"images": [image, {**image, "split": "train"}]})
    kit.converts("coco")
    assert grading(kit.records("val2017")[0]).answers == tuple(f"A cat {n}." for n in range(5))
    kit.out = kit.out.with_name("out2")
    kit.converts("coco_karpathy")
    assert [said(record) for record in kit.records("test")] == ["A cat."]


# Films


def test_videomme(kit: Kit) -> None:
    row = {"videoID": "abc", "question_id": "001-1", "question": "Who?", "duration": "short", "answer": "B"}
    row |= {"options": ["A. The cook.", "B. The guest."]}
    parquet(kit.folder / "videomme/test-00000-of-00001.parquet", [row, {**row, "videoID": "gone", "duration": "long"}])
    put(kit.folder / "videos/abc.mp4", film(sound=True))
    printed = kit.converts("videomme")
    assert "no such file: gone with an extension of video in videos/, data/, video/" in printed
    (record,) = kit.records("test")
    assert asked(record) == "[video]Who?\nA. The cook.\nB. The guest.\nAnswer with the letter."
    assert grading(record).group == "short" and "sound" not in record.messages[0]["content"][0]
    assert "sound" in kit.fails("videomme", "--sound")  # OUT holds another conversion
    kit.out = kit.out.with_name("heard")
    kit.converts("videomme", "--sound")
    assert kit.records("test")[0].messages[0]["content"][0]["sound"]


def test_mlvu(kit: Kit) -> None:
    put(kit.folder / "MLVU/video/2_needle/n_1.mp4", film())
    row = {
        "video": "n_1.mp4",
        "question": "What?",
        "candidates": ["a cat", "a dog"],
        "answer": "a dog",
        "duration": 1.0,
    }
    put(kit.folder / "MLVU/json/2_needle.json", [row])
    kit.converts("mlvu")
    (record,) = kit.records("dev")
    assert grading(record) == Grading((), ("a cat", "a dog"), 1, group="needle")


def test_lvbench_knows_where_the_answer_lies(kit: Kit) -> None:
    asked_of = {
        "uid": "7",
        "question": "What year?\n(A) 1636 (about)\n(B) 1366",
        "answer": "B",
        "question_type": ["entity recognition"],
    }
    questions = [{**asked_of, "time_reference": "00:30-01:00"}, {**asked_of, "uid": "8", "time_reference": ""}]
    line = {"key": "abc", "type": "cartoon", "video_info": {"duration_minutes": 1}, "qa": questions}
    put(kit.folder / "data/video_info.meta.jsonl", json.dumps(line) + "\n")
    put(kit.folder / "all_videos/abc.mp4", film())
    kit.converts("lvbench")
    placed, unplaced = kit.records("test")
    assert grading(placed).position == 0.75 and grading(unplaced).position == -1
    assert grading(placed).choices == ("1636 (about)", "1366") and grading(placed).group == "entity recognition"


def test_worldsense_and_dailyomni_are_heard(kit: Kit) -> None:
    task = {"question": "Who?", "candidates": ["A. he", "B. she"], "answer": "A", "task_type": "Sound"}
    put(
        kit.folder / "worldsense_qa.json", {"abc": {"video_id": "abc", "task0": task, "task1": {**task, "answer": "B"}}}
    )
    put(kit.folder / "videos/abc.mp4", film(sound=True))
    kit.converts("worldsense")
    assert [said(record) for record in kit.records("test")] == ["A", "B"]
    assert kit.records("test")[0].messages[0]["content"][0]["sound"]
    put(
        kit.folder / "qa.json",
        [{"video_id": "v1", "Question": "Who?", "Choice": ["A. he", "B. she"], "Answer": "B", "Type": "AV"}],
    )
    put(kit.folder / "Videos/v1/v1_video.mp4", film(sound=True))
    kit.out = kit.out.with_name("out2")
    kit.converts("dailyomni")
    assert said(kit.records("test")[0]) == "B"


# Text


def mmlu_files(folder: Path, shots: int = 5) -> None:
    sheet(folder / "data/dev/high_school_physics_dev.csv", [[f"Shot {n}?", *"wxyz", "A"] for n in range(shots)])
    sheet(folder / "data/test/high_school_physics_test.csv", [["Which,\nthen?", "p", "q", "r", "s", "C"]])


def test_mmlu_has_five_shots_and_chat_has_none(kit: Kit) -> None:
    mmlu_files(kit.folder)
    kit.converts("mmlu")
    (record,) = kit.records("test")
    (part,) = record.segments
    assert part["text"].startswith(
        "The following are multiple choice questions (with answers) about high school physics.\n\nShot 0?\nA. w\n"
    )
    assert part["text"].endswith("Answer: A\n\nWhich,\nthen?\nA. p\nB. q\nC. r\nD. s\nAnswer:")
    assert part["text"].count("Answer: A\n\n") == 5
    assert grading(record) == Grading((), (" A", " B", " C", " D"), 2, group="high_school_physics")
    kit.out = kit.out.with_name("out2")
    kit.converts("mmlu_chat")
    assert asked(kit.records("test")[0]) == "Which,\nthen?\nA. p\nB. q\nC. r\nD. s\nAnswer with the letter."


def test_mmlu_without_enough_shots(kit: Kit) -> None:
    mmlu_files(kit.folder, shots=3)
    assert "fewer than 5 answered questions in dev: high_school_physics; give --shots 0" in kit.fails("mmlu")
    assert kit.converts("mmlu", "--shots", 3)


def test_mmlu_as_parquet(kit: Kit) -> None:
    row = {"question": "Which?", "subject": "law", "choices": list("pqrs"), "answer": 3}
    for split, count in (("test", 2), ("dev", 5)):
        parquet(kit.folder / f"all/{split}-00000-of-00001.parquet", [row] * count)
    kit.converts("mmlu")
    assert len(kit.records("test")) == 2 and grading(kit.records("test")[0]).correct == 3


def test_gpqa_shuffles_alike_each_time(kit: Kit) -> None:
    head = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Record ID"]
    sheet(kit.folder / "gpqa_diamond.csv", [head, *([f"q{n}", "right", "x", "y", "z", f"rec{n}"] for n in range(12))])
    kit.converts("gpqa")
    records = kit.records("diamond")
    assert all(grading(record).choices[grading(record).correct] == "right" for record in records)
    assert len({grading(record).correct for record in records}) > 1
    before, kit.out = tree(kit.out / "diamond"), kit.out.with_name("out2")
    kit.converts("gpqa", "--workers", 2)
    assert tree(kit.out / "diamond") == before


# What is wrong


@pytest.mark.parametrize("name", [*BENCHMARKS])
def test_a_folder_of_something_else_is_one_line(kit: Kit, name: str) -> None:
    put(kit.folder / "notes.txt", "nothing")
    put(kit.folder / "data/notes.txt", "nothing")
    error = kit.fails(name)
    assert f"is not {name} as published; expected: {BENCHMARKS[name].layout}" in error and not kit.out.exists()


def test_wrong_options(kit: Kit, words: Path) -> None:
    vqa_files(kit.folder)
    assert "is no set that is known; there are librispeech, fleurs" in kit.fails("imagenet")
    assert "is not vqav2 as published (--split test)" in kit.fails("vqav2", "--split", "test")
    assert "holds no split test, but val; expected" in kit.fails("vqav2", "--split", "val,test")
    assert "has no folders of languages" in kit.fails("vqav2", "--languages", "en")
    assert "has no films" in kit.fails("vqav2", "--sound")
    assert "--workers 0: must be 1 or more" in kit.fails("vqav2", "--workers", 0)
    assert main(["vqav2", str(kit.folder)]) == 2 and "folder to write" in kit.capsys.readouterr().err
    assert main(["vqav2", str(kit.folder), str(kit.out)]) == 2 and "--tokenizer" in kit.capsys.readouterr().err
    missing = [str(kit.folder / "no"), str(kit.out), "--tokenizer", str(words)]
    assert main(["vqav2", *missing]) == 2 and "no such folder; expected: v2_" in kit.capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", "is not JSON"),
        ("[]", "is not textvqa as published"),
        ('{"data": [{}]}', "lacks 'image_id'"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_broken_files(kit: Kit, content: Any, error: str) -> None:
    put(kit.folder / "TextVQA_0.5.1_val.json", content)
    assert error in kit.fails("textvqa")


def test_a_table_of_other_columns(kit: Kit) -> None:
    parquet(kit.folder / "mmstar.parquet", [{"text": "?"}])
    assert "it lacks the columns question, image, answer; it has text" in kit.fails("mmstar")


def test_rows_that_are_not_as_published_are_left_out(kit: Kit) -> None:
    put(kit.folder / "test-mini-audios/a.wav", WAV)
    good = {"id": "a", "audio_id": "test-mini-audios/a.wav", "question": "?", "choices": ["x", "y"], "answer": "y"}
    put(
        kit.folder / "mmau-test-mini.json",
        [good, {"id": "b", "answer": "x", "choices": ["x", "y"]}, 7, {**good, "choices": 3}],
    )
    printed = kit.converts("mmau")
    assert counts(printed, "test-mini") == (1, 1, 3)
    assert "mmau-test-mini.json row 2: row is not as published: it lacks 'audio_id'" in printed


def test_a_dry_run_writes_nothing_and_an_instruction_is_taken(kit: Kit) -> None:
    vqa_files(kit.folder)
    assert counts(kit.converts("vqav2", "--dry-run"), "val") == (1, 1, 1) and not kit.out.exists()
    kit.converts("vqav2", "--instruction", "Be short.")
    assert asked(kit.records("val")[0]) == "[image]Colour?\nBe short."


def test_the_list_says_what_is_expected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"suite={each.suite}" in printed and each.layout in printed for each in BENCHMARKS.values())


def test_the_page_has_every_set() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `") and line.count(" | ") == 3]
    cells = {row.split("|")[1].strip().strip("`"): row.split("|")[3].strip().strip("`") for row in rows}
    assert cells == {name: each.suite for name, each in BENCHMARKS.items()}
