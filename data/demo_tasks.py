"""The tasks of the demo's corpus: each makes up one sample, a conversation or a document, in a Studio.

    image, film, sound, speech, text  x  image, film, sound, speech, text  --> question and answer

A task's name is its samples' "source". TASKS says how many of 1,000 training samples each makes, and in which held-out
sets it is: `voices` hears voices, `sentences` statements and `scenes` sees and hears scenes that training does not.
Transcription of counted animals (data.demo_utterances) and text (data.demo_docs) are planned apart, and tasks with
spoken answers are data.demo_spoken's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from data.demo_language import DIRECTIONS, PLACES, SINGLE_SOUNDS, SOUNDS
from data.demo_scenes import Film, Picture
from data.demo_studio import Sounds, Statement, Studio, here, told, write
from data.demo_words import LANGUAGES

MINUTES = (1, 1, 2, 2, 3, 4, 5, 8, 12, 20, 30, 40)
_FILM_SOUNDS = ("1 beeps", *SOUNDS)


class Task(NamedTuple):
    """A kind of sample."""

    make: Callable[[Studio], list[dict]] | None  # messages, or the segments of a document
    share: int  # of 1,000 training samples
    heldout: tuple[str, ...]  # sets that it is in


def dictation(studio: Studio) -> list[dict]:
    """Speech about shapes to text."""
    text = studio.statement().said(studio.words)
    return studio.ask([studio.speak(text)], [write(studio.words.write)], text)


def translation(studio: Studio) -> list[dict]:
    """Speech in one language to text in another, which is asked for in that one."""
    statement = studio.statement()
    other = LANGUAGES[studio.rng.choice([code for code in studio.languages if code != studio.language])]
    material = [studio.speak(statement.said(studio.words))]
    return studio.ask(material, [write(other.translate)], statement.said(other))


def description(studio: Studio) -> list[dict]:
    """An image told in text."""
    picture = studio.picture()
    return studio.ask([studio.show(picture)], [write(studio.words.describe)], caption(studio, picture))


def written_question(studio: Studio) -> list[dict]:
    """An image and a question in text."""
    picture, question, answer = picture_question(studio)
    return studio.ask([studio.show(picture)], [write(question)], answer)


def spoken_question(studio: Studio) -> list[dict]:
    """An image and a question in speech."""
    picture, question, answer = picture_question(studio)
    return studio.ask([studio.show(picture)], [studio.speak(question)], answer)


def sound_question(studio: Studio) -> list[dict]:
    """Sounds and a question in text."""
    sounds = studio.sounds()
    question, answer = sound_question_of(studio, sounds.names)
    return studio.ask([studio.ring(sounds)], [write(question)], answer)


def spoken_sound_question(studio: Studio) -> list[dict]:
    """Sounds and a question in speech."""
    sounds = studio.sounds()
    question, answer = sound_question_of(studio, sounds.names)
    return studio.ask([studio.ring(sounds)], [studio.speak(question)], answer)


def film_question(studio: Studio) -> list[dict]:
    """A silent film and a question in text."""
    film = studio.film()
    return studio.ask([studio.play(film)], [write(studio.words.watch)], told(film).said(studio.words))


def film_sound_question(studio: Studio) -> list[dict]:
    """A film whose sound is heard, and a question about what is seen or heard, in speech or text."""
    film = studio.film(_FILM_SOUNDS)
    question, answer = studio.words.watch, told(film).said(studio.words)
    if film.sound in SOUNDS and studio.rng.random() < 0.6:
        question, answer = sound_question_of(studio, (film.sound,))
    return studio.ask([studio.play(film)], [studio.put(question, studio.rng.random() < 0.6)], answer)


def film_speech(studio: Studio) -> list[dict]:
    """A film over which someone speaks: what is said, or whether it is what one sees."""
    words = studio.words
    film = studio.until(lambda: _narratable(studio))
    statement = told(film)
    true = studio.rng.random() < 0.5
    if not true:
        statement = studio.until(lambda: _about_another(studio, film))
    text = statement.said(words)
    if studio.rng.random() < 0.5:
        return studio.ask([studio.play(film, text)], [write(words.write)], text)
    return studio.ask([studio.play(film, text)], [write(words.match)], words.yes if true else words.no)


def comparison(studio: Studio) -> list[dict]:
    """Two images: whether they are the same, where a thing is, where more things are."""
    words = studio.words
    kind = studio.rng.choice(("same", "which_more", "which_has"))
    if kind == "same":
        first = second = studio.picture()
        if studio.rng.random() < 0.5:
            first, second = studio.until(lambda: _nearly_same(studio))
        question, answer = words.same, words.yes if first == second else words.no
    elif kind == "which_more":
        first, second = studio.until(lambda: _two(studio, lambda one, two: len(one.things) != len(two.things)))
        question, answer = words.which_more, words.ordinal(int(len(second.things) > len(first.things)))
    else:
        first, second = studio.until(lambda: _two(studio, lambda one, two: not _things(one) & _things(two)))
        place = studio.rng.randrange(2)
        _, thing = studio.rng.choice((first, second)[place].things)
        question, answer = words.say("which_has", thing=thing), words.ordinal(place)
    return studio.ask([studio.show(first), studio.show(second)], [write(question)], answer)


def match(studio: Studio) -> list[dict]:
    """Two of image, film, speech and text, or of sound, film, speech and text: do they show or name the same?"""
    words = studio.words
    same = studio.rng.random() < 0.5
    material = studio.until(lambda: _pair(studio, same))
    return studio.ask(material, [write(words.match)], words.yes if same else words.no)


def choice(studio: Studio) -> list[dict]:
    """Two images and a spoken description of one of them."""
    words = studio.words
    first, second = studio.until(lambda: _two_told(studio))
    place = studio.rng.randrange(2)
    material = [studio.show(first), studio.show(second), studio.speak(caption(studio, (first, second)[place]))]
    return studio.ask(material, [write(words.which_told)], words.ordinal(place))


def conversation(studio: Studio) -> list[dict]:
    """Several questions about an image, spoken and written in turn, and then one about a sound."""
    picture = studio.picture(2)
    asked: dict[str, str] = {}
    for _ in range(studio.rng.randint(2, 4)):
        question, answer = studio.until(lambda: _question(studio, picture))
        asked.setdefault(question, answer)
    messages = []
    for question, answer in asked.items():
        part = studio.put(question, studio.rng.random() < 0.5)
        shown = [] if messages else [studio.show(picture)]
        messages += [{"role": "user", "content": [*shown, part]}, {"role": "assistant", "content": answer}]
    if studio.rng.random() < 0.4:
        sounds = studio.sounds()
        question, answer = sound_question_of(studio, sounds.names)
        content = [studio.ring(sounds), studio.put(question, studio.rng.random() < 0.5)]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def document(studio: Studio) -> list[dict]:
    """Text with images, sounds, films and speech in between, no one's turn."""
    words, segments = studio.words, []
    for kind in studio.rng.sample(("image", "image", "sound", "film", "film with sound", "speech"), k=3):
        if kind == "image":
            picture = studio.picture()
            heading, part, text = words.picture, studio.show(picture), caption(studio, picture)
        elif kind == "sound":
            sounds = studio.sounds()
            heading, part = words.sound, studio.ring(sounds)
            text = words.sequence([words.heard(name) for name in sounds.names])
        elif kind == "speech":
            text = studio.statement().said(words)
            heading, part = words.sound, studio.speak(text)
        else:
            film = studio.film(("",) if kind == "film" else _FILM_SOUNDS)
            heading, part, text = words.film, studio.play(film), told(film).said(words)
        before = studio.rng.random() < 0.5
        segments += [write(f"{heading}: {text}\n"), part] if before else [write(f"{heading}:\n"), part, write(text)]
        segments.append(write("\n\n"))
    return segments[:-1]


def long_recording(studio: Studio) -> list[dict]:
    """Minutes of sounds and sentences, and a question about one of them."""
    words = studio.words
    count = studio.rng.choice(MINUTES if studio.split == "train" else MINUTES[:5])
    recording, heard = studio.recording(count)
    minute = studio.rng.randrange(count)
    question = words.say("minute", minute=minute + 1)
    return studio.ask([studio.record(recording)], [write(question)], heard[minute])


TASKS = {
    "transcription": Task(None, 110, ("voices", "sentences")),
    "dictation": Task(dictation, 80, ("voices", "sentences")),
    "translation": Task(translation, 70, ("voices", "sentences")),
    "description": Task(description, 80, ("scenes",)),
    "written_question": Task(written_question, 80, ("scenes",)),
    "spoken_question": Task(spoken_question, 80, ("voices", "sentences", "scenes")),
    "sound_question": Task(sound_question, 60, ("scenes",)),
    "spoken_sound_question": Task(spoken_sound_question, 40, ("voices", "scenes")),
    "film_question": Task(film_question, 50, ("scenes",)),
    "film_sound_question": Task(film_sound_question, 60, ("scenes",)),
    "film_speech": Task(film_speech, 40, ("voices", "sentences", "scenes")),
    "comparison": Task(comparison, 40, ("scenes",)),
    "match": Task(match, 60, ("scenes",)),
    "choice": Task(choice, 40, ("voices", "sentences", "scenes")),
    "conversation": Task(conversation, 40, ("scenes",)),
    "document": Task(document, 50, ("scenes",)),
    "long_recording": Task(long_recording, 2, ("scenes",)),
    "text": Task(None, 58, ("sentences",)),
}


def caption(studio: Studio, picture: Picture) -> str:
    """Every thing of a picture and where it is."""
    return studio.words.gap.join(here(place, thing).said(studio.words) for place, thing in picture.things)


def _things(picture: Picture) -> set:
    return {thing for _, thing in picture.things}


def picture_question(studio: Studio) -> tuple[Picture, str, str]:
    """A picture, a question about it, and its answer."""

    def make() -> tuple[Picture, str, str] | None:
        picture = studio.picture()
        asked = _question(studio, picture)
        return (picture, *asked) if asked else None

    return studio.until(make)


def _question(studio: Studio, picture: Picture) -> tuple[str, str] | None:
    """A question about a picture, and its answer; for unheard sentences one that names a thing, if any may."""
    words = studio.words
    place, thing = studio.rng.choice(picture.things)
    answers = {
        "what_at": words.phrase(thing),
        "colour_at": words.colour(thing.colour),
        "shape_at": words.shape(thing.shape),
        "how_many": words.count(len(picture.things)),
        "is_there": "",
    }
    kind = "is_there" if studio.split == "sentences" else studio.rng.choice(list(answers))
    if kind != "is_there":
        return words.say(kind, place=place), answers[kind]
    asked = thing if studio.rng.random() < 0.5 else studio.like(thing)
    statement = Statement("is_there", (("thing", asked),))
    if not studio.fits(statement):
        return None
    return statement.said(words), words.yes if asked in _things(picture) else words.no


def sound_question_of(studio: Studio, names: tuple[str, ...]) -> tuple[str, str]:
    """A question about sounds, and its answer."""
    words = studio.words
    beeps = [name for name in names if name not in SINGLE_SOUNDS]
    kinds = ["hear", "is_there", "how_many_beeps"] if beeps else ["hear", "is_there"]
    kind = studio.rng.choice(kinds)
    if kind == "how_many_beeps":
        return words.how_many_beeps, words.count_beeps(int(beeps[0].split()[0]))
    if kind == "hear":
        return words.hear, words.sequence([words.heard(name) for name in names])
    asked = studio.rng.choice(SINGLE_SOUNDS)
    return words.say("is_there", thing=words.heard(asked)), words.yes if asked in names else words.no


def _pair(studio: Studio, same: bool) -> list[dict] | None:
    """Two parts about the same thing or sound, or about two; None where the split has no such."""
    studio.media.clear()
    if studio.rng.random() < 0.6:
        make, kinds = _thing_part, ("image", "film", "speech", "text")
        first = studio.thing()
        second = first if same else studio.like(first)
    else:
        make, kinds = _sound_part, ("sound", "film", "speech", "text")
        first, second = studio.rng.sample(SINGLE_SOUNDS, 2)
        second = first if same else second
    one, two = studio.rng.choice(kinds), studio.rng.choice(kinds[:3])
    parts = [make(studio, one, first), make(studio, two, second)]
    return [part for part in parts if part] if None not in parts else None


def _thing_part(studio: Studio, kind: str, thing: Any) -> dict | None:
    """A part that shows or names a thing; None where the split has no such."""
    named = Statement("named", (("thing", thing),))
    shown = {
        "image": [Picture(((place, thing),)) for place in PLACES],
        "film": [Film("appears", thing), *(Film("moves", thing, direction=way) for way in DIRECTIONS)],
        "speech": [named],
        "text": [],
    }
    fitting = [content for content in shown[kind] if studio.fits(content)]
    if shown[kind] and not fitting:
        return None
    content = studio.rng.choice(fitting) if fitting else None
    if isinstance(content, Picture):
        return studio.show(content)
    return studio.play(content) if isinstance(content, Film) else studio.put(studio.words.phrase(thing), bool(content))


def _sound_part(studio: Studio, kind: str, name: Any) -> dict:
    """A part in which a sound is heard or named."""
    if kind == "sound":
        return studio.ring(Sounds((name,)))
    if kind == "film":
        return studio.play(studio.until(lambda: _if_heard(studio.film((name,)), name)))
    return studio.put(studio.words.heard(name), kind == "speech")


def _two(studio: Studio, test: Callable[[Picture, Picture], bool]) -> tuple[Picture, Picture] | None:
    pictures = studio.picture(), studio.picture()
    return pictures if test(*pictures) else None


def _if_heard(film: Film, sound: str) -> Film | None:
    return film if film.sound == sound else None


def _narratable(studio: Studio) -> Film | None:
    """A film that someone may tell aloud."""
    film = studio.film()
    return film if studio.fits(told(film)) else None


def _about_another(studio: Studio, film: Film) -> Statement | None:
    """A statement that is not about a film's things."""
    statement = studio.statement()
    return statement if film.thing not in dict(statement.words).values() else None


def _nearly_same(studio: Studio) -> tuple[Picture, Picture] | None:
    """Two pictures that differ in one thing, and in that in one way."""
    picture = studio.picture()
    changed = studio.rng.randrange(len(picture.things))
    things = tuple(
        (place, studio.like(thing) if i == changed else thing) for i, (place, thing) in enumerate(picture.things)
    )
    other = Picture(things)
    return (picture, other) if len(_things(other)) == len(things) and studio.fits(other) else None


def _two_told(studio: Studio) -> tuple[Picture, Picture] | None:
    """Two pictures of one or two things that may be told aloud; what is told of one is not true of the other."""
    pictures = studio.picture(most=2), studio.picture(most=2)
    first, second = (set(picture.things) for picture in pictures)
    statements = [here(place, thing) for place, thing in first | second]
    return pictures if not first <= second and not second <= first and studio.fits(*statements) else None
