"""Questions about pictures and captions of them: MMMU, MMMU-Pro, MMStar, AI2D, ChartQA, TextVQA, VQAv2, MathVista,
MATH-Vision, HallusionBench, COCO.

    picture + question + lettered choices --> a letter     picture + question --> a word, ten annotators     --> caption

Parquet is that of the authors' repositories on the hub (of AI2D and ChartQA also that of lmms-lab), JSON that of their
own sites.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.benchmark import (
    SHORT,
    File,
    Question,
    Sources,
    Wanted,
    by_letter,
    by_text,
    listed,
    multiple_choice,
    needed,
    read_json,
    stored,
    tables,
    together,
    unlettered,
)
from data.benchmark_speech import captioned
from data.errors import BadSample
from data.grading import Grading
from data.sources import INSTRUCTIONS

_IMAGES = tuple(f"image_{number}" for number in range(1, 8))
_REFERENCE = re.compile(r"<image (\d)>")
_OPTION = re.compile(r"(?:^|[\s,;])\(?([A-Z])[:.)]\s*")


def _parquet(wanted: Wanted, split: str) -> list[Path]:
    """Files of a split, in the folder or in folders of it."""
    names = (f"{split}-*.parquet", f"{split}.parquet")
    return sorted({path for name in names for path in wanted.folder.rglob(name)})


def _texts(value: Any) -> list[str]:
    """A list of texts that is stored as such, or as Python writes it."""
    if isinstance(value, str):
        try:
            found = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]
        value = found if isinstance(found, list | tuple) else [value]
    return [str(each) for each in value or ()]


def answered(
    asks: Sequence[str | File], answers: Sequence[str], wanted: Wanted, *, name: str = "", group: str = ""
) -> Question:
    """A question answered freely; `asks` ends with its text. Raises BadSample where nobody has answered."""
    answers = [str(text).strip() for text in answers if str(text).strip()]
    if not answers:
        raise BadSample("no answer: it is not published")
    text = "\n".join([*(ask for ask in asks if isinstance(ask, str)), wanted.asked(SHORT)]).rstrip("\n")
    usual = max(dict.fromkeys(answers), key=answers.count)
    grading = Grading(tuple(answers), group=group)
    return Question([*(ask for ask in asks if isinstance(ask, File)), text], usual, name, grading)


def mmmu(wanted: Wanted) -> Sources:
    """SUBJECT/SPLIT-*.parquet."""
    columns = ("id", "question", "options", "answer", "image_1")
    return together(
        tables(wanted, _parquet(wanted, split), split, columns, _mmmu, (*_IMAGES[1:], "question_type", "subject"))
        for split in wanted.splits or ("validation",)
    )


def mmmu_pro(wanted: Wanted) -> Sources:
    """standard (10 options)/test-*.parquet; the picture alone in vision/."""
    found: Sources = {}
    for split in wanted.splits or ("standard", "vision"):
        options = f"{split} (10 options)" if split == "standard" else split
        files = sorted((wanted.folder / options).glob("test-*.parquet"))
        if split == "vision":
            found |= tables(wanted, files, split, ("id", "image", "options", "answer"), _mmmu_vision, ("subject",))
        else:
            columns = ("id", "question", "options", "answer", "image_1")
            found |= tables(wanted, files, split, columns, _mmmu, (*_IMAGES[1:], "subject"))
    return found


def _mmmu(row: Mapping[str, Any], wanted: Wanted) -> Question:
    """Pictures stand where the text says <image 1>; those that it does not name come first."""
    options, name = _texts(row["options"]), str(row["id"])
    pictures = {str(number): stored("image", row.get(column), column) for number, column in enumerate(_IMAGES, 1)}
    group = str(row.get("subject") or "_".join(name.split("_")[1:-1]))
    if row.get("question_type", "multiple-choice") == "open" or not options:
        answers = [text for text in _texts(row["answer"]) if text != "?"]
        plain = answered([row["question"]], answers, wanted, name=name, group=group)
    else:
        correct = by_letter(row["answer"], options)
        plain = multiple_choice([row["question"]], options, correct, wanted, name=name, group=group)
    pieces = _REFERENCE.split(str(plain.asks[-1]))  # text, number, text, number, text
    named = set(pieces[1::2])
    asks: list[str | File] = [file for number, file in pictures.items() if file and number not in named]
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            asks += [piece] if piece else []
        elif file := pictures.get(piece):
            asks.append(file)
        else:
            raise BadSample(f"no media: its text names <image {piece}>, which is empty")
    return Question(asks, plain.answer, name, plain.grading, "en")


def _mmmu_vision(row: Mapping[str, Any], wanted: Wanted) -> Question:
    choices = _texts(row["options"])
    grading = Grading((), tuple(choices), by_letter(row["answer"], choices), group=str(row.get("subject") or ""))
    asks = [needed("image", row["image"], "image"), wanted.asked("Answer the question in the image with a letter.")]
    return Question(asks, grading.letter, str(row["id"]), grading, "en")


def mmstar(wanted: Wanted) -> Sources:
    """mmstar.parquet; the question's text holds its choices."""
    files = [*wanted.folder.glob("mmstar.parquet"), *_parquet(wanted, "val")]
    return tables(wanted, files[:1], "val", ("question", "image", "answer"), _mmstar, ("index", "category"))


def _mmstar(row: Mapping[str, Any], wanted: Wanted) -> Question:
    text, _, options = str(row["question"]).partition("Options:")
    pieces = _OPTION.split(options.strip())
    choices = [piece.strip().rstrip(",;").strip() for piece in pieces[2::2]]
    asks = [needed("image", row["image"], "image")]
    about = {"name": str(row.get("index", "")), "group": str(row.get("category") or "")}
    if "".join(pieces[1::2]) == "ABCDEFGH"[: len(choices)] and len(choices) > 1 and all(choices):
        correct = by_letter(row["answer"], choices)
        return multiple_choice([*asks, text.strip()], choices, correct, wanted, **about)
    letters = ("A", "B", "C", "D")  # choices that cannot be told apart are asked as they are written
    grading = Grading((), letters, by_letter(row["answer"], letters), group=about["group"])
    asked = "\n".join([str(row["question"]).strip(), wanted.asked("Answer with the letter.")])
    return Question([*asks, asked], grading.letter, about["name"], grading)


def ai2d(wanted: Wanted) -> Sources:
    """data/test-*.parquet: "question", "options", "answer" (a place from 0), "image"."""
    return together(
        tables(wanted, _parquet(wanted, split), split, ("question", "options", "answer", "image"), _ai2d)
        for split in wanted.splits or ("test",)
    )


def _ai2d(row: Mapping[str, Any], wanted: Wanted) -> Question:
    choices, answer = _texts(row["options"]), str(row["answer"]).strip()
    if not answer.isdecimal():
        raise BadSample(f"answer is no place of a choice: {answer[:40]!r}")
    return multiple_choice([needed("image", row["image"], "image"), row["question"]], choices, int(answer), wanted)


def chartqa(wanted: Wanted) -> Sources:
    """SPLIT/SPLIT_human.json, SPLIT_augmented.json, png/; or Parquet, question and answer also "query" and "label"."""
    home, found = wanted.home("ChartQA Dataset"), {}
    for split in wanted.splits or ("test",):
        for path in [home / split / f"{split}_{kind}.json" for kind in ("human", "augmented")]:
            if path.is_file():
                about = {"kind": path.stem.rpartition("_")[2], "folder": wanted.path(path.parent / "png")}
                rows = [{**row, **about} for row in read_json(path)]
                found = together([found, listed(split, path, rows, _chart_file, wanted)])
        if split not in found:
            optional = ("question", "query", "answer", "label", "type", "human_or_machine")
            found |= tables(wanted, _parquet(wanted, split), split, ("image",), _chart_row, optional)
    return found


def _chart_file(row: Mapping[str, Any], wanted: Wanted) -> Question:
    asks = [File("image", f"{row['folder']}/{row['imgname']}"), row["query"]]
    return answered(asks, [row["label"]], wanted, name=Path(row["imgname"]).stem, group=row["kind"])


def _chart_row(row: Mapping[str, Any], wanted: Wanted) -> Question:
    answers = _texts(row["answer"] if "answer" in row else row["label"])
    group = row.get("type") or {0: "human", 1: "augmented"}.get(row.get("human_or_machine", -1), "")
    text = row["question"] if "question" in row else row["query"]
    group = str(group).removesuffix("_test").removesuffix("_val")
    return answered([needed("image", row["image"], "image"), text], answers, wanted, group=group)


def textvqa(wanted: Wanted) -> Sources:
    """TextVQA_0.5.1_SPLIT.json and train_images/, where those of val lie too; test_images/."""
    found: Sources = {}
    for split in wanted.splits or ("val",):
        path = wanted.folder / f"TextVQA_0.5.1_{split}.json"
        if path.is_file():
            folder = "test_images" if split == "test" else "train_images"
            rows = [
                {"path": f"{folder}/{row['image_id']}.jpg", "question": row["question"], "id": row["question_id"]}
                | {"answers": row.get("answers", [])}
                for row in read_json(path)["data"]
            ]
            found |= listed(split, path, rows, _vqa, wanted)
    return found


def vqav2(wanted: Wanted) -> Sources:
    """v2_OpenEnded_mscoco_SPLIT2014_questions.json, v2_mscoco_SPLIT2014_annotations.json, SPLIT2014/*.jpg."""
    found: Sources = {}
    for split in wanted.splits or ("val",):
        path = wanted.folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json"
        answers = wanted.folder / f"v2_mscoco_{split}2014_annotations.json"
        if path.is_file() and answers.is_file():
            found |= listed(split, path, _vqa_rows(path, answers, f"{split}2014"), _vqa, wanted)
    return found


def _vqa_rows(questions: Path, annotations: Path, folder: str) -> Iterator[dict[str, Any]]:
    notes = {note["question_id"]: note for note in read_json(annotations)["annotations"]}
    for row in read_json(questions)["questions"]:
        note = notes.get(row["question_id"], {})
        yield {
            "path": f"{folder}/COCO_{folder}_{int(row['image_id']):012d}.jpg",
            "question": row["question"],
            "id": row["question_id"],
            "answers": [each["answer"] for each in note.get("answers", [])],
            "kind": note.get("answer_type", ""),
        }


def _vqa(row: Mapping[str, Any], wanted: Wanted) -> Question:
    asks = [File("image", row["path"]), row["question"]]
    return answered(asks, row["answers"], wanted, name=str(row["id"]), group=row.get("kind", ""))


def mathvista(wanted: Wanted) -> Sources:
    """data/testmini-*.parquet."""
    columns = ("pid", "question", "decoded_image", "choices", "answer")
    return together(
        tables(wanted, _parquet(wanted, split), split, columns, _mathvista, ("unit",))
        for split in wanted.splits or ("testmini",)
    )


def _mathvista(row: Mapping[str, Any], wanted: Wanted) -> Question:
    text = f"{row['question']} (unit: {row['unit']})" if row.get("unit") else row["question"]
    asks, choices = [needed("image", row["decoded_image"], "decoded_image"), text], _texts(row["choices"])
    if choices:
        return multiple_choice(asks, choices, by_text(row["answer"], choices), wanted, name=str(row["pid"]))
    return answered(asks, [row["answer"] or ""], wanted, name=str(row["pid"]))


def mathvision(wanted: Wanted) -> Sources:
    """data/test-*.parquet, data/testmini-*.parquet; the picture stands for its text's <image1>."""
    columns = ("id", "question", "options", "decoded_image", "answer")
    return together(
        tables(wanted, _parquet(wanted, split), split, columns, _mathvision, ("subject",))
        for split in wanted.splits or ("test",)
    )


def _mathvision(row: Mapping[str, Any], wanted: Wanted) -> Question:
    text = re.sub(r"\s*<image\d+>\s*", " ", row["question"]).strip()
    asks, choices = [needed("image", row["decoded_image"], "decoded_image"), text], _texts(row["options"])
    about = {"name": str(row["id"]), "group": str(row.get("subject") or "")}
    if choices:
        return multiple_choice(asks, unlettered(choices), by_letter(row["answer"], choices), wanted, **about)
    return answered(asks, [row["answer"] or ""], wanted, **about)


def hallusion(wanted: Wanted) -> Sources:
    """HallusionBench.json and hallusion_bench/; questions without a picture are asked without."""
    path = wanted.folder / "HallusionBench.json"
    return listed("all", path, read_json(path), _hallusion, wanted) if path.is_file() else {}


def _hallusion(row: Mapping[str, Any], wanted: Wanted) -> Question:
    if str(row["gt_answer"]) not in ("0", "1"):
        raise BadSample(f"answer is neither 0 nor 1: {str(row['gt_answer'])[:40]!r}")
    asks: list[str | File] = []
    if str(row["visual_input"]) != "0":
        path = str(row["filename"]).removeprefix("./")
        inside = (wanted.folder / path).is_file()
        asks.append(File("image", path if inside else f"hallusion_bench/{path.removeprefix('hallusion_bench/')}"))
    text = "\n".join([row["question"], wanted.asked("Answer yes or no.")])
    answer = "Yes" if str(row["gt_answer"]) == "1" else "No"
    grading = Grading((), ("Yes", "No"), int(answer == "No"), group=str(row["subcategory"]))
    name = "-".join(str(row[key]) for key in ("category", "subcategory", "set_id", "figure_id", "question_id"))
    return Question([*asks, text], answer, name, grading, "en")


def coco(wanted: Wanted) -> Sources:
    """annotations/captions_SPLIT.json of val2014 or val2017, and SPLIT/*.jpg."""
    found: Sources = {}
    here = [split for split in ("val2014", "val2017") if (wanted.folder / split).is_dir()]
    for split in wanted.splits or here:
        path = wanted.folder / "annotations" / f"captions_{split}.json"
        if path.is_file():
            found |= listed(split, path, _coco_rows(path, split), _coco, wanted)
    return found


def _coco_rows(path: Path, split: str) -> list[dict[str, Any]]:
    content = read_json(path)
    rows = {
        image["id"]: {"path": f"{split}/{image['file_name']}", "id": image["id"], "captions": []}
        for image in content["images"]
    }
    for note in content["annotations"]:
        if note["image_id"] in rows:
            rows[note["image_id"]]["captions"].append(note["caption"])
    return list(rows.values())


def karpathy(wanted: Wanted) -> Sources:
    """dataset_coco.json: the split of Karpathy and Fei-Fei; val2014/*.jpg, train2014/*.jpg."""
    path = wanted.folder / "dataset_coco.json"
    if not path.is_file():
        return {}
    images = read_json(path)["images"]
    found: Sources = {}
    for split in wanted.splits or ("test",):
        rows = [
            {"path": f"{image['filepath']}/{image['filename']}", "id": image["cocoid"]}
            | {"captions": [sentence["raw"] for sentence in image["sentences"]]}
            for image in images
            if image["split"] == split
        ]
        found |= listed(split, path, rows, _coco, wanted) if rows else {}
    return found


def _coco(row: Mapping[str, Any], wanted: Wanted) -> Question:
    return captioned(File("image", row["path"]), row["captions"], wanted, str(row["id"]), INSTRUCTIONS["image"])
