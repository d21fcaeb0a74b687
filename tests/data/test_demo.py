"""The demo's corpus: held-out scenes, sentences and voices kept apart, the same bytes made twice, honest errors."""

from __future__ import annotations

import itertools
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import data.demo as demo
from data.audio import decode
from data.demo import CHUNK, TRANSCRIPTION, make_corpus
from data.demo_docs import LONGEST, SHORTEST, documents
from data.demo_plan import Planned, Settings, plan
from data.demo_scenes import Film, Picture
from data.demo_studio import (
    HELDOUT_VARIANTS,
    SHARE_HELDOUT,
    TRAIN_VARIANTS,
    Narrated,
    Recording,
    Sounds,
    Speech,
    heldout,
)
from data.demo_tasks import TASKS
from data.demo_words import LANGUAGES
from data.errors import DataError
from data.sample import SampleRecord, all_parts, media_of, parse_sample
from data.tokenizer import load_tokenizer
from data.video import load_sound, load_video
from data.vision import decode_image

QUICK = tuple(task for task in TASKS if task != "text")  # the library's docstrings take seconds to gather
SMALL = Settings(samples=110, heldout=9, languages=("en", "de", "ja"), vocab_size=700, tasks=QUICK)
SPLITS = ("train", "voices", "sentences", "scenes")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    counts = make_corpus(folder, SMALL, quiet=True)
    assert counts == {"train": 110, "voices": 27, "sentences": 27, "scenes": 27}
    return folder


@pytest.fixture(scope="module")
def planned() -> dict[str, list[Planned]]:
    return plan(Settings(samples=2500, heldout=30, tasks=QUICK))


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                found[info.name] = file.read()
    return found


def records(found: dict[str, bytes]) -> Iterator[SampleRecord]:
    for name, payload in found.items():
        if name.endswith(".json"):
            yield parse_sample(name.removesuffix(".json"), payload)


def speeches(samples: list[Planned]) -> Iterator[Speech]:
    for sample in samples:
        for medium in sample.media.values():
            content = medium.content
            if isinstance(content, Recording):
                yield from (item for item in content.minutes if isinstance(item, Speech))
            elif isinstance(content, Speech | Narrated):
                yield content if isinstance(content, Speech) else content.speech


def scenes(samples: list[Planned]) -> Iterator[str]:
    """Names of pictures, films, sequences of sounds and recordings; a sound alone is no scene."""
    for medium in itertools.chain.from_iterable(sample.media.values() for sample in samples):
        content = medium.content.film if isinstance(medium.content, Narrated) else medium.content
        if isinstance(content, Picture | Film | Recording) or (isinstance(content, Sounds) and len(content.names) > 1):
            yield content.name


def questions() -> set[str]:
    """What is asked aloud of any scene and names no thing; every split may say it."""
    asked = set()
    for words in LANGUAGES.values():
        asked |= {words.say(name) for name in ("how_many", "watch", "hear", "how_many_beeps")}
        places = ("left", "right", "top", "bottom", "middle")
        asked |= {words.say(name, place=place) for name in ("what_at", "colour_at", "shape_at") for place in places}
        sounds = ("rising", "falling", "noise", "bell", "knock", "siren")
        asked |= {words.say("is_there", thing=words.heard(sound)) for sound in sounds}
        asked |= {words.heard(sound) for sound in sounds}
    return asked


def test_held_out_sets_are_disjoint(planned: dict[str, list[Planned]]) -> None:
    variants = {split: {speech.speaker.partition("+")[2] for speech in speeches(planned[split])} for split in SPLITS}
    assert variants["voices"] == set(HELDOUT_VARIANTS) and not set(TRAIN_VARIANTS) & set(HELDOUT_VARIANTS)
    assert variants["train"] == set(TRAIN_VARIANTS) >= variants["sentences"] | variants["scenes"]
    said = {split: {speech.text for speech in speeches(planned[split])} for split in SPLITS}
    assert len(said["sentences"]) > 200 and not said["sentences"] & said["train"]
    assert not said["sentences"] & questions() and said["scenes"] & questions()
    seen = {split: set(scenes(planned[split])) for split in SPLITS}
    assert len(seen["scenes"]) > 200 and not seen["scenes"] & (seen["train"] | seen["voices"] | seen["sentences"])


def test_written_shards_are_disjoint(corpus: Path) -> None:
    found = {split: list(records(members(corpus / split))) for split in SPLITS}
    speakers = {split: {record.speaker for record in found[split] if record.speaker} for split in SPLITS}
    assert speakers["voices"] and not speakers["voices"] & speakers["train"]
    spoken = ("transcription", "dictation")
    answers = {split: {(r.language, _answer(r)) for r in found[split] if r.source in spoken} for split in SPLITS}
    assert len(answers["sentences"]) > 5 and not answers["sentences"] & answers["train"]
    told = {split: {(r.language, _answer(r)) for r in found[split] if r.source == "description"} for split in SPLITS}
    assert told["scenes"] and not told["scenes"] & told["train"]


def _answer(record: SampleRecord) -> str:
    content = record.messages[-1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def test_split_depends_on_names_alone() -> None:
    names = [f"picture: left circle {i} big" for i in range(4000)]
    assert abs(sum(map(heldout, names)) * SHARE_HELDOUT / len(names) - 1) < 0.15
    first, second = (plan(Settings(300, 4, ("en", "fr"), seed, tasks=QUICK)) for seed in (0, 1))
    assert set(scenes(first["train"])) != set(scenes(second["train"]))
    assert not set(scenes(first["train"])) & set(scenes(second["scenes"]))


def test_plan_is_a_pure_function_of_its_settings() -> None:
    assert plan(SMALL) == plan(SMALL)
    assert plan(SMALL) != plan(replace(SMALL, seed=1))


def test_shares_languages_and_keys(planned: dict[str, list[Planned]]) -> None:
    train = planned["train"]
    assert len(train) == 2500 and len({sample.record.key for rows in planned.values() for sample in rows}) == 3760
    counts = Counter(sample.record.source for sample in train)
    total = sum(TASKS[task].share for task in QUICK)
    assert all(abs(counts[task] - 2500 * TASKS[task].share / total) < 1 for task in QUICK)
    by_language = Counter(sample.record.language for sample in train)
    assert set(by_language) == set(LANGUAGES) and max(by_language.values()) - min(by_language.values()) <= 2
    for split in SPLITS[1:]:
        assert {sample.record.source for sample in planned[split]} == {t for t in QUICK if split in TASKS[t].heldout}
        assert set(Counter(sample.record.language for sample in planned[split]).values()) == {30}


def test_every_pairing_of_modalities(planned: dict[str, list[Planned]]) -> None:
    """Each kind together with each other, and with another of its own, in one sample; in the user's turn and out."""
    pairs, roles = set(), set()
    for sample in planned["train"]:
        kinds = ["text"] * any(part["type"] == "text" for part in all_parts(sample.record))
        for medium in sample.media.values():
            kinds += {Picture: ["image"], Film: ["film"], Speech: ["speech"], Narrated: ["film", "speech"]}.get(
                type(medium.content), ["sound"]
            )
        pairs |= {frozenset(pair) for pair in itertools.combinations(kinds, 2)}
        for message in sample.record.messages:
            if not isinstance(message["content"], str):
                roles |= {(message["role"], part["type"]) for part in message["content"]}
        roles |= {("document", part["type"]) for part in sample.record.segments}
    kinds = ("text", "speech", "sound", "image", "film")
    wanted = {frozenset(pair) for pair in itertools.combinations_with_replacement(kinds, 2)} - {frozenset(["text"])}
    assert wanted <= pairs
    for role in ("user", "system", "document"):
        assert {(role, kind) for kind in ("text", "audio", "image", "video")} <= roles


def test_corpus_can_be_decoded(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    longest = 0.0
    for split in SPLITS:
        found = members(corpus / split)
        for record in records(found):
            assert record.language in SMALL.languages and record.source in TASKS
            for part in all_parts(record):
                if part["type"] == "text":
                    assert tokenizer.decode(tokenizer.encode(part["text"])) == part["text"]
            for medium in media_of(record):
                payload = found[f"{record.key}.{medium.extension}"]
                if medium.kind == "image":
                    assert 80 <= min(decode_image(payload).shape[:2]) <= 128
                elif medium.kind == "video":
                    sound, seconds = load_sound(payload), load_video(payload).seconds_per_grid
                    assert (sound is not None) == medium.sound and seconds > 0.3
                    assert sound is None or 1.5 < len(sound) / 16_000 < 8 and abs(sound).max() > 0.02
                else:
                    wave = decode(payload)
                    assert 0.1 < abs(wave).max() <= 1.01
                    longest = max(longest, len(wave) / 16_000)
                    assert record.source == "long_recording" or len(wave) / 16_000 < 10
    assert longest >= 60


def test_workers_and_a_second_time_give_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    tasks = ("dictation", "film_speech", "spoken_question", "spoken_sound_question", "match")
    settings = replace(SMALL, samples=CHUNK + 16, heldout=3, tasks=tasks)
    for workers in (1, 2):
        make_corpus(tmp_path / str(workers), settings, workers, quiet=True)
    first, second = tmp_path / "1", tmp_path / "2"
    files = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert len(files) == 11
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_made_once(corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert make_corpus(corpus, SMALL, quiet=True)["train"] == 110
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before
    assert json.loads((corpus / "corpus.json").read_text())["samples"]["train"] == 110
    with pytest.raises(DataError, match="exists and holds something else"):
        make_corpus(corpus, replace(SMALL, samples=111), quiet=True)


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, OSError])
def test_interrupted_it_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: type) -> None:
    rendered = iter(range(40))

    def broken(*_: object) -> bytes:
        if next(rendered, None) is None:
            raise trouble
        return b"x"

    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    monkeypatch.setattr(demo, "render", broken)
    assert demo.main([str(tmp_path / "demo"), "--tasks", "match,choice", "--samples", "80"]) == (
        130 if trouble is KeyboardInterrupt else 2
    )
    assert not list(tmp_path.iterdir())


def test_transcription_alone_is_the_recipes_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = plan(replace(TRANSCRIPTION, samples=2000, heldout=24))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2000, "voices": 120, "sentences": 120}
    texts = {split: {(s.record.language, _answer(s.record)) for s in rows} for split, rows in splits.items()}
    assert not texts["train"] & texts["sentences"]
    for language in TRANSCRIPTION.languages:
        own, tested = (
            {w for code, text in texts[split] if code == language for w in (text if code == "zh" else text.split())}
            for split in ("train", "sentences")
        )
        assert tested <= own and len(own) <= 14
    assert {sample.record.language for sample in splits["train"][:10]} == set(TRANSCRIPTION.languages)
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    command = [str(tmp_path / "demo"), "--tasks", "transcription", "--samples", "30", "--heldout", "2"]
    assert demo.main(command) == 0
    assert "30 samples in train, 10 samples in voices, 10 samples in sentences\n5 languages" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "demo" / "tokenizer").vocab_size <= 640
    for record in records(members(tmp_path / "demo" / "train")):
        assert [medium.extension for medium in media_of(record)] == ["flac"]


def test_documents_of_the_interpreter() -> None:
    found = documents()
    assert len(found) > 1000 and len(dict(found)) == len(found)
    assert all(SHORTEST <= len(text) <= LONGEST for _, text in found)
    splits = plan(Settings(60, 20, ("en",), tasks=("text",)))
    texts = {split: {part["text"] for s in rows for part in s.record.segments} for split, rows in splits.items()}
    assert len(texts["train"]) == 60 and len(texts["sentences"]) == 20 and not texts["train"] & texts["sentences"]


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--languages", "en,xx"],
        ["--languages", "en,en"],
        ["--languages", "de"],  # text is in English
        ["--languages", "de", "--tasks", "translation"],
        ["--tasks", "transcription,nothing"],
        ["--tasks", ""],
        ["--samples", "0"],
        ["--heldout", "0"],
        ["--tasks", "transcription", "--samples", "3"],
        ["--tasks", "match", "--vocab-size", "9"],
    ):
        assert demo.main([str(tmp_path / "demo"), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "least", "why"),
    [
        ({}, 31, "transcription takes one for each of 14 languages, each other task one"),
        ({"tasks": ("match", "transcription")}, 15, "transcription takes one for each of 14 languages"),
        ({"tasks": ("transcription",)}, 14, "one for each of 14 languages"),
        ({"tasks": ("match", "choice")}, 14, "one for each of 14 languages"),
        ({"tasks": ("match", "choice"), "languages": ("en",)}, 2, "one for each task"),
    ],
)
def test_too_few_samples_are_told_how_many_it_takes(changed: dict, least: int, why: str) -> None:
    settings = replace(Settings(heldout=1), **changed)
    with pytest.raises(DataError, match=f"^--samples {least - 1}: must be at least {least}: {why}"):
        plan(replace(settings, samples=least - 1))
    made = plan(replace(settings, samples=least))["train"]
    assert len(made) == least
    assert {sample.record.source for sample in made} == set(settings.tasks)
    assert {sample.record.language for sample in made} == set(settings.languages)


def test_where_nothing_can_be_written_is_known_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "plan", lambda *_: pytest.fail("the corpus was planned"))
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "link")
    for folder, line in (
        ("file", "file: exists and holds something else"),
        ("file/demo", ".demo.partial: Not a directory"),
        ("link", "link: "),
    ):
        assert demo.main([str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and line in error and error.count("\n") == 1
    assert demo.main([str(tmp_path / "demo"), "--workers", "0"]) == 2
    assert capsys.readouterr().err == "error: --workers 0: must be at least 1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_without_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(DataError, match=r'pip install "omniloom\[demo\]"'):
        make_corpus(tmp_path / "demo", replace(SMALL, tasks=("dictation",)), quiet=True)
    assert not list(tmp_path.iterdir())


def test_answers_are_true() -> None:
    words, checked = LANGUAGES["en"], Counter()
    tasks = ("written_question", "comparison", "match", "choice", "film_speech", "sound_question", "long_recording")
    for sample in plan(Settings(900, 1, ("en",), tasks=tasks))["train"]:
        task, answer = sample.record.source, _answer(sample.record)
        written = [part["text"] for part in all_parts(sample.record) if part["type"] == "text"][:-1]
        content = [medium.content for medium in sample.media.values()]
        pictures = [item for item in content if isinstance(item, Picture)]
        things = [{words.phrase(thing) for _, thing in picture.things} for picture in pictures]
        truth = None
        if task == "written_question" and written[0].startswith("Is there"):
            truth = "yes" if written[0].removeprefix("Is there ")[:-1] in things[0] else "no"
        elif task == "written_question" and written[0] == words.say("how_many"):
            truth = words.count(len(things[0]))
        elif task == "comparison" and written[0] == words.same:
            truth = "yes" if pictures[0] == pictures[1] else "no"
        elif task == "comparison" and written[0] == words.which_more:
            truth = words.ordinal(0 if len(things[0]) > len(things[1]) else 1)
        elif task == "comparison":
            truth = words.ordinal(0 if written[0].removeprefix("In which picture is ")[:-1] in things[0] else 1)
        elif task == "choice":
            told = next(item.text for item in content if isinstance(item, Speech))
            captions = [
                {words.say("here", place=place, thing=thing) for place, thing in picture.things} for picture in pictures
            ]
            truth = words.ordinal(0 if all(sentence in told for sentence in captions[0]) else 1)
        elif task == "film_speech" and words.match in written:
            narrated = content[0]
            assert isinstance(narrated, Narrated)
            truth = "yes" if words.phrase(narrated.film.thing) in narrated.speech.text.lower() else "no"
        elif task == "sound_question" and written[0] == words.how_many_beeps:
            truth = words.count_beeps(next(int(name[0]) for name in content[0].names if "beeps" in name))
        elif task == "long_recording":
            heard = content[0].minutes[int(re.sub(r"\D", "", written[0])) - 1]
            truth = words.heard(heard) if isinstance(heard, str) else heard.text
        if truth is not None:
            assert answer == truth, sample
            checked[task, answer if answer in ("yes", "no") else ""] += 1
    assert len(checked) == 11 and min(checked.values()) >= 3
