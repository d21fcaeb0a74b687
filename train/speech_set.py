"""Held-out samples whose answer is to be spoken: what is asked, what the recording says, its codes and its sound.

    shards --samples with a speech part--> SpeechSet --read--> Utterance: prompt, text, codes, waveform
      codes: those beside the shard (data/codes.py) where they are of the codec at hand, else made now

Cost: decoding the sample's media and its recording, and the codec's encoding where there are no codes.
Letters: S samples, U ids of user turns, G codebooks, F frames, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.audio import decode
from data.chat import answer_text
from data.code_store import ShardCodes, codes_location
from data.codec import Codec
from data.codes import encode_row
from data.corpus import Corpus
from data.document import Document, Maker, MediaLimits
from data.errors import BadSample, DataError
from data.interrupts import uninterrupted
from data.layout import Layout
from data.reader import open_sample
from data.sample import speech_of
from data.store import Missing
from data.tokenizer import IM_END, Tokenizer
from models.omni_config import OmniConfig

MAX_SECONDS = 60.0  # of a recording whose codes are made here, as data.codes has it


@dataclass(frozen=True)
class Utterance:
    """One spoken answer."""

    key: str  # "shard.tar:key"
    language: str
    speaker: str  # of the recording; "" where that is unknown
    text: str  # what the recording says
    prompt: Document  # up to where the answer begins
    codes_GF: Tensor  # int64, of the recording
    wave_S: np.ndarray  # float32 at the codec's rate: the recording


class SpeechSet:
    """The samples of a corpus that have a spoken answer."""

    def __init__(self, corpus: Corpus, codec: Codec, tokenizer: Tokenizer, layout: Layout, limits: MediaLimits) -> None:
        """Raises DataError for codes of another codec than `codec` beside a shard."""
        self.corpus, self.codec, self.limits = corpus, codec, limits
        self._maker = Maker(tokenizer, layout, limits)
        shards = range(len(corpus.paths))
        self._codes = [_codes_of(corpus, shard, codec) for shard in shards]
        rows = [corpus.index(shard).speech_rows() + int(corpus.offsets[shard]) for shard in shards]
        self.samples: list[int] = np.concatenate(rows).tolist()

    def length(self, sample: int) -> int:
        """Text tokens of a sample, by which samples of a like length are put together."""
        shard, row = self.corpus.locate(sample)
        return int(self.corpus.index(shard).columns["text_tokens"][row])

    def read(self, sample: int) -> Utterance:
        """One of `samples`. Raises BadSample where it is damaged or its recording has no codes."""
        record, _ = open_sample(self.corpus, sample, self.limits.max_bytes)
        shard, row = self.corpus.locate(sample)
        index, speech = self.corpus.index(shard), speech_of(record)
        members = index.read_speech(row, self.limits.max_bytes)
        if speech is None or speech.extension not in members:
            raise BadSample("its .json names no speech that is there")
        stored = self._codes[shard]
        codes_GF = stored.codes(row) if stored else encode_row(index, row, self.codec, MAX_SECONDS)[0]
        if codes_GF is None:
            raise BadSample("its speech has no codes: data.codes left it out")
        with uninterrupted():
            wave_S = decode(members[speech.extension], self.limits.audio, self.codec.sample_rate)
        prompt = self._maker.document(record, prompt_only=True)
        text, language = answer_text(record).strip(), record.language or "unknown"
        return Utterance(record.key, language, speech.speaker, text, prompt, codes_GF, wave_S)


def keys_of(name: str) -> tuple[str, str]:
    """Keys by which a sample may be named: "shard.tar:key" and "key"."""
    return name, name.partition(":")[2]


def talker_ids(prompt_ids_T: Tensor, text: str, tokenizer: Tokenizer, config: OmniConfig, system: str = "") -> Tensor:
    """The Talker's conversation: the prompt, then `text` as the assistant's; int64.

    With `system` that is its system prompt instead of the Thinker's. Raises DataError where text has no tokens.
    """
    said = tokenizer.encode(text)
    if not said:
        raise DataError(f"there is nothing to say in {text!r}")
    ids_T = prompt_ids_T
    if system:
        starts_T = ids_T == config.im_start_token_id
        roles_N = ids_T[1:][starts_T[:-1]]
        own_T = roles_N[starts_T.cumsum(0) - 1] == config.system_token_id
        turn = [config.im_start_token_id, *tokenizer.encode(f"system\n{system}"), config.im_end_token_id]
        ids_T = torch.cat([ids_T.new_tensor([*turn, *tokenizer.encode("\n")]), ids_T[~own_T]])
    return torch.cat([ids_T, ids_T.new_tensor([*said, tokenizer.id(IM_END)])])


def _codes_of(corpus: Corpus, shard: int, codec: Codec) -> ShardCodes | None:
    tar = corpus.paths[shard]
    try:
        corpus.store.size(codes_location(tar))
    except (Missing, FileNotFoundError):
        return None  # they are made as they are needed
    return ShardCodes.open(tar, corpus.index(shard), codec.identity, store=corpus.store)
