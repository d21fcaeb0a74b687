"""An answer in text and voice, as it comes: Thinker, Talker and waveform decoder take turns.

    Thinker: prompt --> token 0 --> token 1 --> token 2 --> ...  (a token for each frame that needs one)
                           |           |           |
    Talker:  prefill --> frame 0 --> frame 1 --> frame 2 --> ... --> end of speech
                           '-- code predictor: residual codes -- Code2WavStream --> packets of sound

A frame is 80 ms and needs one more token of text, so the first packet leaves after one token and `packet_frames`
frames, long before the answer is complete. The Talker reads its own conversation: by default the Thinker's, or
`talker_ids`, with another system prompt or other text around the same media. models/say.py is its half.

Cost: per frame one step of the Talker and G - 1 of the code predictor; per token one of the Thinker. One conversation
at a time. Letters: S ids of a conversation, U of them the user's, N = 1 document, G codes of a frame, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.code2wav import Code2WavStream
from models.config import ConfigError, require
from models.generate import Prompts, TextDecoding
from models.omni import Omni
from models.sampling import Sampling
from models.say import SaySettings, Voice, speaker_id, user_positions
from models.talker_inputs import multimodal_rows


@dataclass(frozen=True)
class SpeakSettings:
    """How to answer. Sampling defaults are the released model's; temperatures of 0 make the answer deterministic."""

    speaker: str
    max_new_tokens: int = 1024
    max_frames: int = 4096
    packet_frames: int = 4  # 320 ms of sound in a packet
    text: Sampling = Sampling()
    first_code: Sampling = SaySettings.first_code
    residual_codes: Sampling = SaySettings.residual_codes

    def __post_init__(self) -> None:
        """Reject limits below one."""
        for name in ("max_new_tokens", "max_frames", "packet_frames"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def voice(self) -> SaySettings:
        """What of it is the Talker's."""
        return SaySettings(self.max_frames, self.first_code, self.residual_codes)


@dataclass(frozen=True)
class Spoken:
    """One piece of the answer: a token of text, or a packet of sound."""

    token: int | None = None
    codes_GT: Tensor | None = None  # int64
    wave_S: Tensor | None = None  # float in [-1, 1], 24 kHz; None where the model has no waveform decoder


def speak(
    omni: Omni,
    prompt: Prompts,
    settings: SpeakSettings,
    *,
    generator: torch.Generator | None = None,
    talker_ids_S: Tensor | None = None,
    talker_positions_3U: Tensor | None = None,
) -> Iterator[Spoken]:
    """Answer one conversation, which ends where the assistant's text begins.

    `talker_ids` is the Talker's conversation where it should not read the Thinker's; it has the same placeholders in
    its user segments, and `talker_positions` [3, U] are the TM-RoPE ids of its `user_rows`. Yields tokens and packets
    in the order in which they are made. Raises ConfigError for an unknown speaker, ValueError for other prompts.
    """
    if omni.talker is None:
        raise ConfigError("this model has no talker: generate text alone, by models.generate.generate")
    speaker_id(omni.talker.config, settings.speaker)
    if len(prompt.doc_lengths) != 1:
        raise ValueError(f"one conversation at a time, not {len(prompt.doc_lengths)}")
    text = _Text(omni, prompt, settings, generator)
    first = text.next()
    if first is None:
        return
    yield Spoken(token=first)
    if talker_ids_S is None:
        talker_ids_S = prompt.token_ids_T
        talker_positions_3U = user_positions(omni.config, talker_ids_S, prompt.position_ids_3T)
    if talker_positions_3U is None:
        raise ValueError("talker_ids need talker_positions, the TM-RoPE ids of their user rows")
    ids_S = torch.cat([talker_ids_S, talker_ids_S.new_tensor([first])])
    conversations = [(ids_S, talker_positions_3U)]
    voice = Voice(omni, text.media_MH, conversations, [settings.speaker], settings.voice, generator)
    frames: list[Tensor] = []
    stream = Code2WavStream(omni.code2wav) if omni.code2wav is not None else None
    for piece in voice.talk(lambda: [text.next()]):
        if not isinstance(piece, Tensor):
            yield from (Spoken(token=token) for token in piece if token is not None)
            continue
        frames.append(piece)
        if len(frames) == settings.packet_frames:
            yield _packet(frames, stream)
            frames = []
    if frames:
        yield _packet(frames, stream)
    while (token := text.next()) is not None:  # the voice ended before the text
        yield Spoken(token=token)


class _Text:
    """The Thinker's answer, a token at a time."""

    @torch.no_grad()
    def __init__(self, omni: Omni, prompt: Prompts, settings: SpeakSettings, generator: torch.Generator | None) -> None:
        assert omni.config.talker is not None
        self.stop, self.left = omni.config.im_end_token_id, settings.max_new_tokens
        self.sampling, self.generator = settings.text, generator
        self.decoding = TextDecoding(omni.thinker, prompt, self.left, tap=omni.config.talker.accept_hidden_layer)
        assert self.decoding.tapped_TD is not None
        rows_M = multimodal_rows(omni.config, prompt.token_ids_T, prompt.doc_lengths)
        self.media_MH = self.decoding.tapped_TD[rows_M]
        self.seen_NV = torch.zeros(1, omni.config.thinker.text.vocab_size, dtype=torch.bool, device=rows_M.device)
        self.seen_NV[0, prompt.token_ids_T] = True
        self.fed: Tensor | None = None

    def next(self) -> int | None:
        """One more token, None once the answer has ended."""
        if self.left == 0:
            return None
        if self.fed is not None:
            self.decoding.feed(self.fed)
        self.fed = self.sampling.choose(self.decoding.logits(), self.seen_NV, self.generator)
        token = int(self.fed)
        self.seen_NV[0, token] = True
        self.left = 0 if token == self.stop else self.left - 1
        return None if token == self.stop else token


def _packet(frames: list[Tensor], stream: Code2WavStream | None) -> Spoken:
    codes_GT = torch.cat(frames).t()
    return Spoken(codes_GT=codes_GT, wave_S=stream.push(codes_GT.unsqueeze(0))[0] if stream is not None else None)
