"""An answer in text and voice, as it comes: Thinker, Talker and waveform decoder take turns.

    Thinker: prompt --> token 0 --> token 1 --> token 2 --> ...  (a token for each frame that needs one)
                           |           |           |
    Talker:  prefill --> frame 0 --> frame 1 --> frame 2 --> ... --> end of speech
                           '-- code predictor: residual codes -- Code2WavStream --> packets of sound

A frame is 80 ms and needs one more token of text, so the first packet leaves after one token and `packet_frames`
frames, long before the answer is complete. The Talker reads its own conversation: by default the Thinker's, or
`talker_ids`, with another system prompt or other text around the same media.

Cost: per frame one step of the Talker and G - 1 of the code predictor; per token one of the Thinker. One conversation
at a time. Letters: S ids of a conversation, U of them the user's, N = 1 document, G codes of a frame, V codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.code2wav import Code2WavStream
from models.config import ConfigError, require
from models.generate import Prompts, TextDecoding
from models.layers.cache import KVCache
from models.omni import Omni
from models.omni_config import OmniConfig
from models.sampling import Sampling
from models.talker_inputs import multimodal_rows, plan_document, talker_inputs, user_rows


@dataclass(frozen=True)
class SpeakSettings:
    """How to answer. Sampling defaults are the released model's; temperatures of 0 make the answer deterministic."""

    speaker: str
    max_new_tokens: int = 1024
    max_frames: int = 4096
    packet_frames: int = 4  # 320 ms of sound in a packet
    text: Sampling = Sampling()
    first_code: Sampling = Sampling(temperature=0.9, top_k=50, repetition_penalty=1.05)
    residual_codes: Sampling = Sampling(temperature=1.0, top_k=50, top_p=0.8)

    def __post_init__(self) -> None:
        """Reject limits below one."""
        for name in ("max_new_tokens", "max_frames", "packet_frames"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")


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
    known = omni.talker.config.speaker_id
    if settings.speaker not in known:
        raise ConfigError(f"speaker {settings.speaker!r} is unknown: this model has {', '.join(sorted(known))}")
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
    voice = _Voice(omni, text.media_MH, talker_ids_S, talker_positions_3U, first, settings, generator)
    frames: list[Tensor] = []
    stream = Code2WavStream(omni.code2wav) if omni.code2wav is not None else None
    for count in range(1, settings.max_frames + 1):
        codes_1G = voice.frame()
        if codes_1G is None:
            break
        frames.append(codes_1G)
        if len(frames) == settings.packet_frames:
            yield _packet(frames, stream)
            frames = []
        if count == settings.max_frames:
            break
        token = text.next()
        if token is not None:
            yield Spoken(token=token)
        voice.hear(codes_1G, token)
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


class _Voice:
    """The Talker's frames, one at a time."""

    @torch.no_grad()
    def __init__(
        self,
        omni: Omni,
        media_MH: Tensor,
        ids_S: Tensor,
        positions_3U: Tensor,
        first_token: int,
        settings: SpeakSettings,
        generator: torch.Generator | None,
    ) -> None:
        assert omni.talker is not None
        self.talker, self.embed, config = omni.talker, omni.thinker.model.embed_tokens, omni.talker.config
        self.settings, self.generator, self.config = settings, generator, config
        no_codes = ids_S.new_empty(config.num_code_groups, 0)
        ids_S = torch.cat([ids_S, ids_S.new_tensor([first_token])])
        speaker_id = config.speaker_id[settings.speaker]
        plan = plan_document(omni.config, ids_S.cpu(), positions_3U.cpu(), speaker_id, no_codes.cpu()).to(ids_S.device)
        x_PD = talker_inputs(self.talker, plan, self.embed(plan.text_ids_X), media_MH)
        self.cache = KVCache(config.text.num_hidden_layers, plan.doc_lengths, settings.max_frames, ids_S.device)
        hidden_PD, _ = self.talker(x_PD, plan.position_ids_3P, plan.doc_lengths, self.cache)
        self.hidden_1D, self.position = hidden_PD[-1:], plan.position_ids_3P[:, -1:]
        self.ending = ids_S.new_tensor([omni.config.tts_eos_token_id])  # then padding, for ever
        self.padding = ids_S.new_tensor([omni.config.tts_pad_token_id])
        self.seen_1V = torch.zeros(1, config.text.vocab_size, dtype=torch.bool, device=ids_S.device)

    @torch.no_grad()
    def frame(self) -> Tensor | None:
        """Codes [1, G] of the next frame, None at the end of speech."""
        config, settings = self.config, self.settings
        logits_1V = self.talker.codec_head(self.hidden_1D).float()
        end_1 = logits_1V[:, config.codec_eos_token_id].clone()
        logits_1V[:, config.code_predictor.vocab_size :] = -torch.inf  # control ids are no sound
        logits_1V[:, config.codec_eos_token_id] = end_1
        code_1 = settings.first_code.choose(logits_1V, self.seen_1V, self.generator)
        if int(code_1) == config.codec_eos_token_id:
            return None
        self.seen_1V[0, code_1] = True
        choose = settings.residual_codes.choose
        return self.talker.predict(self.hidden_1D, code_1, lambda logits_NV: choose(logits_NV, None, self.generator))

    @torch.no_grad()
    def hear(self, codes_1G: Tensor, token: int | None) -> None:
        """Step on: the frame just made, and the next token of text where there is one."""
        ids_1 = self.ending.new_tensor([token]) if token is not None else self.ending
        if token is None:
            self.ending = self.padding
        x_1D = self.talker.embed_frames(codes_1G.t()) + self.talker.text_projection(self.embed(ids_1))
        self.cache.advance()
        self.position = self.position + 1
        self.hidden_1D, _ = self.talker(x_1D, self.position, (1,), self.cache)


def _packet(frames: list[Tensor], stream: Code2WavStream | None) -> Spoken:
    codes_GT = torch.cat(frames).t()
    return Spoken(codes_GT=codes_GT, wave_S=stream.push(codes_GT.unsqueeze(0))[0] if stream is not None else None)


def user_positions(config: OmniConfig, token_ids_S: Tensor, position_ids_3S: Tensor) -> Tensor:
    """TM-RoPE ids of a conversation's user segments alone, float32 [3, U], from those of the whole of it.

    Segments begin with text, whose three ids are equal, so each moves up by what was left out before it.
    """
    rows_U = user_rows(config, token_ids_S)
    if not len(rows_U):
        return position_ids_3S[:, :0]
    starts_S = token_ids_S == config.im_start_token_id
    begin = starts_S.nonzero().squeeze(1)
    end_of_all = (position_ids_3S.max() + 1).unsqueeze(0)
    extent = torch.cat([position_ids_3S[0, begin[1:]], end_of_all]) - position_ids_3S[0, begin]
    kept = torch.isin(begin, rows_U)
    offset = torch.where(kept, extent, 0.0).cumsum(0) - torch.where(kept, extent, 0.0)
    shift = offset - position_ids_3S[0, begin]
    segment_U = starts_S.cumsum(0)[rows_U] - 1
    return position_ids_3S[:, rows_U] + shift[segment_U]
