"""What a recogniser writes of a sound: a Thinker of another run, asked as its own evaluation sets ask.

    eval sets of its run --most frequent request around one clip, by language--> requests
    waveform at 16 kHz + request --data.document--> prompts --engine.generate--> text

It must not have learnt from the Talker under test, else the two may agree on what nobody else understands.
Cost: one decode of the prompts and one step a token, several clips at once. Letters: S samples.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.audio import MIN_SAMPLES
from data.chat import Run, render
from data.corpus import Corpus
from data.costs import AUDIO
from data.document import Desk, Document, MediaLimits, join, whole
from data.errors import BadSample
from data.sample import Medium, SampleRecord, parse_sample, parts_of
from data.tokenizer import Tokenizer
from train.engines import Engine
from train.errors import RecipeError
from train.evaluate import ANSWER_END, some_of
from train.layout import ModelLayout

CLIP = Medium("audio", "wav")
LOOKED_AT = 2000  # samples of each set
ANY = ""  # language of the request for all others

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Recogniser:
    """Answers with what it hears."""

    engine: Engine
    tokenizer: Tokenizer
    layout: ModelLayout
    requests: Mapping[str, Messages]  # by language, and for `ANY`
    max_new_tokens: int
    batch_tokens: int

    def hear(self, waves: Sequence[np.ndarray], languages: Sequence[str]) -> list[str]:
        """Text of each clip, float32 [S] at 16 kHz; none of a clip that is shorter than 25 ms."""
        documents = {
            place: self._document(wave_S, language)
            for place, (wave_S, language) in enumerate(zip(waves, languages, strict=True))
            if len(wave_S) >= MIN_SAMPLES
        }
        groups: list[list[int]] = []
        room = 0
        for place in sorted(documents, key=lambda place: (len(documents[place].ids_T), place)):
            tokens = len(documents[place].ids_T)
            if not groups or tokens > room:
                groups.append([])
                room = self.batch_tokens
            groups[-1].append(place)
            room -= tokens
        texts = [""] * len(waves)
        for group in groups:
            batch = join([documents[place] for place in group])
            answers = self.engine.generate(batch, self.max_new_tokens, self.tokenizer.id(ANSWER_END))
            for place, ids in zip(group, answers, strict=True):
                texts[place] = self.tokenizer.decode(ids).strip()
        return texts

    def _document(self, wave_S: np.ndarray, language: str) -> Document:
        messages = self.requests.get(language) or self.requests[ANY]
        rendered = render(SampleRecord("clip", messages), self.tokenizer, prompt_only=True)
        desk = Desk(self.layout, MediaLimits(), {CLIP.extension: b""})
        desk.waves[CLIP] = wave_S
        return desk.document("clip", [item if isinstance(item, Run) else desk.take(item) for item in whole(rendered)])


def plain_request(instruction: str) -> dict[str, Messages]:
    """One request for all languages: the clip, then the instruction."""
    content = [{"type": "audio", "audio": CLIP.extension}, {"type": "text", "text": instruction}]
    return {ANY: [{"role": "user", "content": content}]}


def usual_requests(corpora: Sequence[Corpus]) -> dict[str, Messages]:
    """How evaluation sets ask for what is said: by language the most frequent request around one clip.

    Raises RecipeError where no sample asks about one clip alone.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for corpus in corpora:
        for sample in some_of(corpus.num_samples, LOOKED_AT):
            shard, row = corpus.locate(sample)
            costs = corpus.costs(sample)
            if costs.kind_M.tolist() != [AUDIO]:
                continue
            try:
                payload = corpus.index(shard).read_speech(row)["json"]  # the JSON member, and not what is heard
                record = parse_sample(corpus.name(sample), payload)
            except (BadSample, KeyError):
                continue
            if request := _request(record):
                counts[record.language or "unknown"][request] += 1
                counts[ANY][request] += 1
    if not counts:
        raise RecipeError("no sample of its eval.sets asks about one clip of sound: give instruction=TEXT")
    return {language: json.loads(found.most_common(1)[0][0]) for language, found in counts.items()}


def _request(record: SampleRecord) -> str | None:
    """The turns before the answer, with the clip as `CLIP`, as JSON; None where there are several of the user's."""
    *asked, answer = record.messages or [{}]
    if [message["role"] for message in asked if message["role"] != "system"] != ["user"]:
        return None
    if answer.get("role") != "assistant":
        return None
    turns = []
    for message in asked:
        parts = [
            {**part, "audio": CLIP.extension} if part["type"] == "audio" else part
            for part in parts_of(message["content"])
        ]
        turns.append({"role": message["role"], "content": parts})
    return json.dumps(turns, ensure_ascii=False)
