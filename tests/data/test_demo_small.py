"""The small world of `make demo`: its answers are true, its held-out sets are held out, and its words are known."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from data.demo_plan import Planned, Settings, plan
from data.demo_scenes import Film, Picture
from data.demo_small import SMALL, THINGS
from data.demo_studio import HELDOUT_VARIANTS, Answer, Sounds, Speech, here, told
from data.demo_words import LANGUAGES
from data.errors import DataError
from data.sample import speech_of, text_of

TASKS = ("transcription", *SMALL)
CODES = ("en", "de", "fr", "ru", "zh")


@pytest.fixture(scope="module")
def planned() -> dict[str, list[Planned]]:
    return plan(Settings(9000, 20, CODES, tasks=TASKS))


def contents(sample: Planned, kind: type) -> list:
    return [medium.content for medium in sample.media.values() if isinstance(medium.content, kind)]


def answer(sample: Planned) -> str:
    return text_of(sample.record.messages[-1]["content"])


def question(sample: Planned) -> str:
    """What is asked, in text or speech."""
    (user,) = [message for message in sample.record.messages if message["role"] == "user"]
    return text_of(user["content"]) or contents(sample, Speech)[0].text


def test_every_task_in_its_share(planned: dict[str, list[Planned]]) -> None:
    found = Counter(sample.record.source for sample in planned["train"])
    total = 110 + sum(task.share for task in SMALL.values())
    assert set(found) == set(TASKS) and sum(found.values()) == 9000
    assert all(abs(found[name] - 9000 * task.share / total) <= 2 for name, task in SMALL.items())
    for split in ("voices", "sentences", "scenes"):
        assert len(planned[split]) == 20 * len(CODES)
        assert {s.record.source for s in planned[split]} == {
            name for name in TASKS if split in (("voices", "sentences") if name == TASKS[0] else SMALL[name].heldout)
        }


def test_answers_are_true(planned: dict[str, list[Planned]]) -> None:
    for sample in (sample for rows in planned.values() for sample in rows):
        words, source = LANGUAGES[sample.record.language], sample.record.source
        if source.startswith("picture"):
            (picture,) = contents(sample, Picture)
            assert {thing for _, thing in picture.things} <= set(THINGS) and len(picture.things) <= 2
            if source == "picture_told":
                said = [here(place, thing).said(words) for place, thing in picture.things]
                assert answer(sample) == words.gap.join(said)
                continue
            true = {words.say("colour_at", place=place): words.colour(thing.colour) for place, thing in picture.things}
            true |= {words.say("shape_at", place=place): words.shape(thing.shape) for place, thing in picture.things}
            assert answer(sample) == true[question(sample)]
        elif source.startswith("sound"):
            (sounds,) = contents(sample, Sounds)
            assert answer(sample) == words.sequence([words.heard(name) for name in sounds.names])
        elif source.startswith("film"):
            (film,) = contents(sample, Film)
            assert answer(sample) == told(film).said(words) and not film.sound
        elif source == "words":
            assert [speech.text for speech in contents(sample, Speech)] == [answer(sample)]


def test_a_question_needs_its_place(planned: dict[str, list[Planned]]) -> None:
    """Where one thing alone is on show, nobody has to know left from right."""
    shown = [picture for sample in planned["train"] for picture in contents(sample, Picture)]
    two = [picture for picture in shown if len(picture.things) == 2]
    assert 0.2 < len(two) / len(shown) < 0.4
    assert {place for picture in shown if len(picture.things) == 1 for place, _ in picture.things} == {"left", "right"}


def test_nothing_held_out_is_trained_on(planned: dict[str, list[Planned]]) -> None:
    seeds = {s: {m.seed for row in planned[s] for m in row.media.values()} - {0} for s in ("train", "scenes")}
    assert len(seeds["scenes"]) > 50 and not seeds["scenes"] & seeds["train"], "drawn anew"
    texts = defaultdict(set)
    for split, rows in planned.items():
        for sample in rows:
            if sample.record.source in ("transcription", "animals_aloud"):
                texts[split].add((sample.record.language, answer(sample)))
    for language, text in texts["sentences"]:
        pad = "" if language == "zh" else " "  # a word may end as another one
        known = [f"{pad}{other}{pad}" for code, other in texts["train"] | texts["voices"] if code == language]
        assert not any(f"{pad}{text}{pad}" in other for other in known), text
    assert {s.record.speaker.partition("+")[2] for s in planned["voices"]} == set(HELDOUT_VARIANTS)


def test_what_is_said_aloud_can_be_written_down(planned: dict[str, list[Planned]]) -> None:
    """The recogniser learns every word that the Talker may say."""
    heard, said = defaultdict(set), defaultdict(set)
    for sample in planned["train"]:
        if sample.record.source in ("transcription", "words"):
            heard[sample.record.language] |= set(answer(sample).split())
        if contents(sample, Answer):
            assert speech_of(sample.record) is not None
            said[sample.record.language] |= set(answer(sample).split())
    assert set(said) == set(CODES) and all(said[code] <= heard[code] for code in ("en", "de", "fr", "ru"))


def test_reading_aloud_gives_the_text_where_the_talker_does_not_look(planned: dict[str, list[Planned]]) -> None:
    rows = [sample for sample in planned["train"] if sample.record.source == "animals_aloud"]
    assert rows
    for sample in rows:
        roles = [message["role"] for message in sample.record.messages]
        assert roles == ["system", "user", "assistant"]
        assert (
            text_of(sample.record.messages[0]["content"]) == answer(sample) == contents(sample, Answer)[0].speech.text
        )


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(DataError, match="transcription and animals_aloud take one for each of 5 languages"):
        plan(Settings(6, 1, CODES, tasks=TASKS))
