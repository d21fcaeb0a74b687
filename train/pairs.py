"""Preference pairs from a Talker's own speech: what a recogniser understands is better than what it does not.

    answers with speech --Talker says each several times--> candidates --codec, recogniser--> word error rate of each
      best, worst --> chosen, rejected --the same Talker, teacher forcing--> log-probabilities: the reference of DPO

Candidates rank by word error rate, then by whether they ended by themselves, then by number. With `recorded` the
recording's own codes are chosen unless a candidate is better. Answers whose chosen and rejected speech score alike
teach nothing and get no pair.

Pairs are a pure function of the shard, the models, the settings and the seed: the draws of a group of answers are its
own. Cost for each answer: its candidates' frames, one decode of each by codec and recogniser, and one forward of the
Talker over two of them. Letters: N sequences, G codebooks, F frames, S samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import soxr
import torch
from torch import Tensor, nn

from data.audio import SAMPLE_RATE
from data.codec import Codec
from data.document import Maker, join
from data.errors import BadSample
from data.pair_store import ALIKE, Pair
from data.prompts import Prompt
from data.reader import open_sample
from data.types import SpeechPairs
from models.omni import Omni
from models.say import SaySettings
from train.layout import ModelLayout
from train.preference import PreferenceConfig, PreferenceObjective
from train.speech_eval import Listening
from train.speech_set import SpeechSet, Utterance, talker_ids
from train.synthesis import OmniSpeaking
from train.word_errors import error_rows

RECORDING = -1
Score = tuple[float, bool]  # word error rate, and whether the speech had to be ended: less is better


@dataclass(frozen=True)
class Sampled:
    """How candidates are drawn, and what is chosen."""

    say: SaySettings
    candidates: int = 4
    seed: int = 0
    recorded: bool = False


@dataclass(frozen=True)
class PairMaker:
    """Makes the pairs of groups of answers."""

    speech: SpeechSet
    omni: Omni
    listening: Listening
    maker: Maker  # of the documents that training reads
    layout: ModelLayout
    sampled: Sampled
    device: torch.device

    def pairs(self, samples: Sequence[int], group: str) -> Iterator[tuple[int, tuple[Pair, str] | BadSample]]:
        """Each of `samples`, in order: its pair and its speaker, or why it has none. `group` keys the draws."""
        read: dict[int, Utterance] = {}
        found: dict[int, tuple[Pair, str] | BadSample] = {}
        for sample in samples:
            try:
                read[sample] = self._read(sample)
            except BadSample as error:
                found[sample] = error
        chosen: dict[int, Pair] = {}
        for sample, pair in zip(read, self._choose(list(read.values()), group), strict=True):
            if isinstance(pair, Pair):
                chosen[sample] = pair
            else:
                found[sample] = pair
        for sample, pair in zip(chosen, self._with_reference(chosen, read), strict=True):
            found[sample] = pair, read[sample].speaker
        return ((sample, found[sample]) for sample in samples)

    def _read(self, sample: int) -> Utterance:
        utterance, voices = self.speech.read(sample), self.layout.omni.talker.speaker_id  # type: ignore[union-attr]
        if utterance.speaker not in voices:
            raise BadSample(f"its answer is spoken by {utterance.speaker!r}, and the model has {', '.join(voices)}")
        if not utterance.text:
            raise BadSample("its answer has no text to say")
        return utterance

    def _choose(self, utterances: Sequence[Utterance], group: str) -> list[Pair | BadSample]:
        """A pair for each, its reference still zero."""
        count, config = self.sampled.candidates, self.omni.config
        each = [utterance for utterance in utterances for _ in range(count)]
        ids = [talker_ids(one.prompt.ids_T, one.text, self.maker.tokenizer, config) for one in each]
        speaking = OmniSpeaking(self.omni, self.sampled.say, seed_of(self.sampled.seed, group), self.device)
        spoken = speaking.say(join([one.prompt for one in each]), ids, [one.speaker for one in each])
        scores = self._scores(each, spoken)
        recorded = [(0.0, False)] * len(utterances)
        if self.sampled.recorded:
            recorded = self._scores(utterances, [one.codes_GF for one in utterances])
        pairs = []
        for number, utterance in enumerate(utterances):
            here = slice(number * count, (number + 1) * count)
            picked = choose(scores[here], recorded[number] if self.sampled.recorded else None)
            if picked is None:
                error = scores[here][0][0]
                pairs.append(BadSample(f"{ALIKE}: word error rate {error:.1%}"))
                continue
            (good, bad), codes = picked, spoken[here]
            chosen_GF = utterance.codes_GF if good == RECORDING else codes[good]
            better = recorded[number] if good == RECORDING else scores[here][good]
            errors = better[0], scores[here][bad][0]
            pairs.append(Pair(chosen_GF, codes[bad], torch.zeros(2, 2), errors, good == RECORDING))
        return pairs

    def _scores(self, utterances: Sequence[Utterance], codes: Sequence[Tensor]) -> list[Score]:
        waves = [sound_of(self.speech.codec, codes_GF) for codes_GF in codes]
        words = self.listening.hear(waves, [one.language for one in utterances])
        return [
            (word_error_rate(one.text, heard), codes_GF.shape[1] >= self.sampled.say.max_frames)
            for one, heard, codes_GF in zip(utterances, words, codes, strict=True)
        ]

    def _with_reference(self, chosen: dict[int, Pair], read: dict[int, Utterance]) -> list[Pair]:
        """The pairs with the log-probabilities that training will compare with, of the documents that it will read."""
        if not chosen:
            return []
        documents = []
        for sample, pair in chosen.items():
            record, _ = open_sample(self.speech.corpus, sample, self.speech.limits.max_bytes)
            document = self.maker.document(record)
            say = partial(self.layout.speech, document.ids_T, document.position_ids_3T, read[sample].speaker)
            ways = say(pair.chosen_GF), say(pair.rejected_GF)
            documents.append(replace(document, speech=SpeechPairs(ways, pair.logprobs_22)))
        batch = join(documents, (), partial(SpeechPairs.join, self.layout.join_speech))
        parts_N2 = PreferenceObjective(self.omni, PreferenceConfig()).reference(batch.to(self.device)).cpu()
        return [
            replace(pair, logprobs_22=parts_22)
            for pair, parts_22 in zip(chosen.values(), parts_N2.split(2), strict=True)
        ]


def sound_of(codec: Codec, codes_GF: Tensor) -> np.ndarray:
    """float32 [S] at 16 kHz; nothing of no codes, or of codes that the codec does not have."""
    try:
        wave_S = codec.decode(codes_GF).numpy() if codes_GF.shape[1] else np.empty(0, np.float32)
    except BadSample:
        return np.empty(0, np.float32)
    return soxr.resample(wave_S, codec.sample_rate, SAMPLE_RATE) if len(wave_S) else wave_S


def choose(scores: Sequence[Score], recording: Score | None = None) -> tuple[int, int] | None:
    """Numbers of the chosen candidate, RECORDING where none is better than that, and of the rejected one; None where
    both score alike."""
    order = sorted(range(len(scores)), key=lambda number: (scores[number], number))
    good, bad = order[0], order[-1]
    best = scores[good]
    if recording is not None and recording <= best:
        good, best = RECORDING, recording
    return (good, bad) if best < scores[bad] else None


def word_error_rate(text: str, heard: str) -> float:
    """Errors for each word of `text`; above 1 where much was added."""
    return error_rows([(Prompt("", "", text), heard)])[-1].wer


def seed_of(seed: int, group: str) -> int:
    """The seed of a group's draws."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{group}".encode()).digest()[:8]) >> 1


@torch.no_grad()
def weights_identity(module: nn.Module) -> str:
    """Which weights: SHA-256 over names, shapes and about a thousand elements of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        flat = parameter.reshape(-1)
        digest.update(repr((name, tuple(parameter.shape))).encode())
        digest.update(flat[:: max(1, len(flat) // 1000)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
