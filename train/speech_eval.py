"""Whether the speech says what the text says, in the voice asked for: the numbers of `suite=tts`.

    SpeechSet --a few utterances at a time-->
      Talker says the text --codec--> speech       --recogniser--> words --jiwer--> error rate by language
      recorded codes       --codec--> codec        --recogniser-->  the same: what the codec loses
      the recording itself ---------> recording    --recogniser-->  the same: what the recogniser misses
      recorded codes --Talker, teacher forcing--> accuracy and negative log-likelihood of each codebook
      all three --train/speaker_similarity.py--> likeness to the speaker asked for

With rewritten texts the Talker says those, and its error rate is against them; the recordings say what they say.
Cost: per utterance one synthesis, two decodes and three recognitions. Memory: a few utterances, and 2 KB for each.
Letters: S samples, F frames, G codes of a frame.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import soxr
from torch import Tensor
from tqdm import tqdm

from data.audio import SAMPLE_RATE
from data.codec import Codec
from data.document import join
from data.errors import BadSample, DataError
from data.prompts import Prompt
from data.tokenizer import Tokenizer
from models.omni_config import OmniConfig
from train.evaluate import some_of
from train.speaker_similarity import Likeness, Voices, embed
from train.speech_set import SpeechSet, Utterance, keys_of, talker_ids
from train.synthesis import Guesses, Speaking
from train.word_errors import Row, error_rows

KINDS = ("speech", "codec", "recording")  # the Talker's; the codec's of the recording; the recording
GROUP = 16  # utterances that are spoken together


class Listening(Protocol):
    """A recogniser: train.recogniser.Recogniser."""

    def hear(self, waves: Sequence[np.ndarray], languages: Sequence[str]) -> list[str]:
        """What each clip, float32 [S] at 16 kHz, says."""
        ...


@dataclass(frozen=True)
class Asked:
    """What is to be said how."""

    speaker: str = ""  # "": the recording's
    system: str = ""  # of the Talker's conversation, "": the Thinker's
    rewrites: Mapping[str, str] | None = None  # by key, "shard.tar:key" or "key"; only these are said then
    max_samples: int = 0  # always the same random ones; 0: all


@dataclass(frozen=True)
class Heard:
    """One utterance, all of it."""

    sample: int
    utterance: Utterance
    asked: str  # the speaker
    text: str  # that the Talker was to say
    frames: int  # that it said
    ended: bool  # by itself
    waves: Mapping[str, np.ndarray]  # float32 at the codec's rate, by KINDS
    words: Mapping[str, str]  # as recognised


@dataclass(frozen=True)
class SpeechReport:
    """The result on one set."""

    set_name: str
    step: int
    rows: Mapping[str, Sequence[Row]]  # by KINDS: languages, then "all"
    original: float | None  # word error rate of rewritten speech against the texts that were replaced
    guesses: Guesses
    voices: Mapping[str, Likeness]  # by KINDS
    examples: Sequence[Mapping[str, object]]
    skipped: Sequence[str]
    num_silent: int  # of the Talker's: no frames, or codes that the codec does not have
    num_endless: int  # reached the limit of frames
    num_unscored: int  # recordings of a speaker that the Talker does not have

    @property
    def wer(self) -> float:
        """Of the Talker's speech, all languages together."""
        return self.rows[KINDS[0]][-1].wer


@dataclass
class _Tally:
    """What is kept of utterances."""

    guesses: Guesses
    pairs: dict[str, list[tuple[Prompt, str]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    original: list[tuple[Prompt, str]] = field(default_factory=list)
    embeddings: dict[str, list[Tensor | None]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    asked: list[str] = field(default_factory=list)
    speakers: list[str] = field(default_factory=list)
    examples: list[tuple[int, dict[str, object]]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    silent: int = 0
    endless: int = 0
    unscored: int = 0


@dataclass(frozen=True)
class SpeechEvaluator:
    """Runs the suite over one set."""

    speech: SpeechSet
    speaking: Speaking
    codec: Codec
    listening: Listening
    tokenizer: Tokenizer
    config: OmniConfig
    asked: Asked = Asked()

    def report(self, name: str, step: int, sink: Callable[[Heard], object] = bool) -> SpeechReport:
        """Evaluate; `sink` hears every utterance. Raises DataError where no sample can be used."""
        speaker, known = self.asked.speaker, self.speaking.speakers
        if speaker and speaker not in known:
            raise DataError(f"speaker={speaker}: this model has {', '.join(known)}")
        chosen = sorted(self.chosen(), key=lambda sample: (self.speech.length(sample), sample))
        tally = _Tally(Guesses.none(self.codec.num_codebooks))
        for first in tqdm(range(0, len(chosen), GROUP), desc=name, unit="group", disable=not sys.stderr.isatty()):
            self._take(chosen[first : first + GROUP], tally, sink)
        if not tally.asked:
            raise DataError(f"{name}: no sample can be used (speaker=NAME is one voice for all): {tally.skipped[0]}")
        return self._report(name, step, tally)

    def chosen(self) -> list[int]:
        """Samples that are said."""
        samples = self.speech.samples
        if self.asked.rewrites is not None:
            samples = [sample for sample in samples if self._rewritten(self.speech.corpus.name(sample))]
        return [samples[place] for place in some_of(len(samples), self.asked.max_samples)]

    def _rewritten(self, name: str) -> str | None:
        """What a sample says instead."""
        rewrites = self.asked.rewrites or {}
        return next((rewrites[key] for key in keys_of(name) if key in rewrites), None)

    def _take(self, samples: Sequence[int], tally: _Tally, sink: Callable[[Heard], object]) -> None:
        read, known = [], self.speaking.speakers
        for sample in samples:
            try:
                utterance = self.speech.read(sample)
                speaker = self.asked.speaker or utterance.speaker
                if speaker not in known:
                    who = repr(speaker) if speaker else "nobody that is named"
                    raise BadSample(
                        f"its answer is spoken by {who}, and the model has {', '.join(known) or 'no voices'}"
                    )
                read.append((sample, utterance, speaker))
            except BadSample as error:
                tally.skipped.append(f"{self.speech.corpus.name(sample)}: {error.reason}")
        if not read:
            return
        tally.guesses = tally.guesses + self._score([utterance for _, utterance, _ in read], tally)
        for heard in self._hear(read):
            sink(heard)
            self._keep(heard, tally)

    def _score(self, utterances: Sequence[Utterance], tally: _Tally) -> Guesses:
        known = [each for each in utterances if each.speaker in self.speaking.speakers]
        tally.unscored += len(utterances) - len(known)
        if not known:
            return Guesses.none(self.codec.num_codebooks)
        ids = [talker_ids(each.prompt.ids_T, each.text, self.tokenizer, self.config) for each in known]
        prompts = join([each.prompt for each in known])
        return self.speaking.score(prompts, ids, [each.speaker for each in known], [each.codes_GF for each in known])

    def _hear(self, read: Sequence[tuple[int, Utterance, str]]) -> list[Heard]:
        """Say, decode and recognise a group."""
        texts, ids, waves = [], [], {kind: [] for kind in KINDS}
        for _, utterance, _ in read:
            texts.append(self._rewritten(utterance.key) or utterance.text)
            prompt_T = utterance.prompt.ids_T
            ids.append(talker_ids(prompt_T, texts[-1], self.tokenizer, self.config, self.asked.system))
        prompts = join([utterance.prompt for _, utterance, _ in read])
        spoken = self.speaking.say(prompts, ids, [speaker for _, _, speaker in read])
        for (_, utterance, _), codes_GF in zip(read, spoken, strict=True):
            waves["speech"].append(self._decode(codes_GF))
            waves["codec"].append(self._decode(utterance.codes_GF))
            waves["recording"].append(utterance.wave_S)
        languages = [utterance.language for _, utterance, _ in read]
        words = {kind: self.listening.hear([self._at_16k(w) for w in waves[kind]], languages) for kind in KINDS}
        return [
            Heard(
                sample,
                utterance,
                speaker,
                texts[place],
                spoken[place].shape[1],
                spoken[place].shape[1] < self.speaking.max_frames,
                {kind: waves[kind][place] for kind in KINDS},
                {kind: words[kind][place] for kind in KINDS},
            )
            for place, (sample, utterance, speaker) in enumerate(read)
        ]

    def _decode(self, codes_GF: Tensor) -> np.ndarray:
        """float32 [S]; nothing of no codes, or of codes that the codec does not have, which a Talker may say."""
        try:
            return self.codec.decode(codes_GF).numpy() if codes_GF.shape[1] else np.empty(0, np.float32)
        except BadSample:
            return np.empty(0, np.float32)

    def _at_16k(self, wave_S: np.ndarray) -> np.ndarray:
        return soxr.resample(wave_S, self.codec.sample_rate, SAMPLE_RATE) if len(wave_S) else wave_S

    def _keep(self, heard: Heard, tally: _Tally) -> None:
        utterance = heard.utterance
        for kind in KINDS:
            text = heard.text if kind == "speech" else utterance.text
            tally.pairs[kind].append((Prompt(utterance.key, utterance.language, text), heard.words[kind]))
            wave_S = self._at_16k(heard.waves[kind])
            tally.embeddings[kind].append(embed(wave_S) if len(wave_S) else None)
        tally.original.append((Prompt(utterance.key, utterance.language, utterance.text), heard.words["speech"]))
        tally.asked.append(heard.asked)
        tally.speakers.append(utterance.speaker)
        tally.silent += not len(heard.waves["speech"])
        tally.endless += not heard.ended
        about = {"key": utterance.key, "language": utterance.language, "speaker": heard.asked, "text": heard.text}
        seconds = heard.frames / self.codec.frame_rate
        tally.examples.append((heard.sample, {**about, "seconds": seconds, "heard": dict(heard.words)}))

    def _report(self, name: str, step: int, tally: _Tally) -> SpeechReport:
        references = [x_X for x_X in tally.embeddings["recording"] if x_X is not None]
        voices = Voices(references, tally.speakers)
        own = {"speech": tally.asked, "codec": tally.speakers, "recording": tally.speakers}
        return SpeechReport(
            set_name=name,
            step=step,
            rows={kind: error_rows(tally.pairs[kind]) for kind in KINDS},
            original=error_rows(tally.original)[-1].wer if self.asked.rewrites is not None else None,
            guesses=tally.guesses,
            voices={kind: voices.likeness(tally.embeddings[kind], own[kind]) for kind in KINDS},
            examples=[example for _, example in sorted(tally.examples, key=lambda pair: pair[0])],
            skipped=sorted(tally.skipped),
            num_silent=tally.silent,
            num_endless=tally.endless,
            num_unscored=tally.unscored,
        )
