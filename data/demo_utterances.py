"""Transcription in the demo's corpus: counted animals, and their words alone, spoken.

    GRAMMARS --seed--> sentences, voice, rate, pitch of every clip of train, voices and sentences

`train` has neither the voices of `voices` nor the sentences of `sentences`, so the two say how well a model does on a
stranger and on unheard sentences.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.demo_studio import HELDOUT_VARIANTS, TRAIN_VARIANTS, Speech
from data.demo_words import GRAMMARS, LANGUAGES
from data.errors import DataError

MOST_UNHEARD = 4  # one sentence in so many, whatever the held-out clips: more clips are more voices
INSTRUCTIONS = ("Transcribe.", "Write down what you hear.", "What is said?")


@dataclass(frozen=True)
class Utterance:
    """One clip to be spoken."""

    key: str
    split: str
    language: str
    speech: Speech
    instruction: str


def plan_utterances(clips: int, heldout: int, languages: Sequence[str], seed: int) -> list[Utterance]:
    """`clips` for training and `heldout` of each language in `voices` and in `sentences`, languages mixed evenly."""
    if clips < len(languages) or heldout < 1:
        raise DataError("transcription needs a training clip of each language and at least 1 held-out clip")
    by_language = [
        _plan_language(clips // len(languages) + (place < clips % len(languages)), heldout, language, seed)
        for place, language in enumerate(languages)
    ]
    rows = itertools.chain.from_iterable(itertools.zip_longest(*by_language))
    return [utterance for utterance in rows if utterance is not None]


def _plan_language(clips: int, heldout: int, language: str, seed: int) -> list[Utterance]:
    rng = np.random.default_rng((seed, list(GRAMMARS).index(language)))
    grammar, voice = GRAMMARS[language], LANGUAGES[language].voice
    sentences = rng.permutation(grammar.sentences()).tolist()
    split = min(heldout, len(sentences) // MOST_UNHEARD)
    unheard, heard = sentences[:split], sentences[split:]
    short = rng.permutation(grammar.phrases()).tolist(), rng.permutation(grammar.words()).tolist()
    texts = {
        "train": (heard[::2], heard[1::2] or heard, *short),  # short ones let the model find which sound is which word
        "voices": (heard,),
        "sentences": (unheard,),
    }
    utterances = []
    for split, size in {"train": clips, "voices": heldout, "sentences": heldout}.items():
        variants = HELDOUT_VARIANTS if split == "voices" else TRAIN_VARIANTS
        for i in range(size):
            turn, kind = divmod(i, len(texts[split]))
            choices = texts[split][kind]
            variant = variants[int(rng.integers(len(variants)))]
            speech = Speech(
                text=choices[turn % len(choices)],
                speaker=f"{voice}+{variant}" if variant else voice,
                rate=int(rng.integers(140, 211)),
                pitch=int(rng.integers(30, 71)),
            )
            instruction = INSTRUCTIONS[int(rng.integers(len(INSTRUCTIONS)))]
            utterances.append(Utterance(f"{split}-{language}-{i:06d}", split, language, speech, instruction))
    return utterances
