"""Given text in a given voice: the Talker's half of an answer, which models/speak.py streams beside the Thinker.

    conversations, media --Thinker up to the Talker's layer, only where there are media--> hidden states --.
    conversations, which end with the text to say ---------- plans of models/talker_inputs.py -------------+--> Voice
      Voice: prefill --> frame 0 --token 1--> frame 1 --token 2--> frame 2 --> ... --> end of speech

The Talker may read another conversation than the Thinker: rewritten text, another system prompt, the same media. Its
layout leaves system prompts and earlier answers out, so those change nothing that it says.

Cost: per frame one step of the Talker and G - 1 of the code predictor for all documents at once, as long as the longest
of them speaks. Letters: T tokens of a pack, S ids of a conversation, U of them the user's, N documents, M multimodal
rows, H hidden of the Thinker, D hidden of the Talker, P positions, F frames, G codes of a frame, V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import ConfigError, require
from models.generate import Prompts
from models.layers.cache import KVCache
from models.omni import Omni
from models.omni_config import OmniConfig, TalkerConfig
from models.sampling import Sampling
from models.talker_inputs import HEAD, join, multimodal_rows, plan_document, talker_inputs, user_rows
from models.thinker import Features


@dataclass(frozen=True)
class SaySettings:
    """How to speak. Sampling defaults are the released model's; temperatures of 0 make the speech deterministic."""

    max_frames: int = 4096
    first_code: Sampling = Sampling(temperature=0.9, top_k=50, repetition_penalty=1.05)
    residual_codes: Sampling = Sampling(temperature=1.0, top_k=50, top_p=0.8)

    def __post_init__(self) -> None:
        """Reject a limit below one."""
        require(self.max_frames >= 1, f"max_frames must be at least 1, not {self.max_frames}")


def say(
    omni: Omni,
    conversations: Prompts,
    speakers: Sequence[str],
    settings: SaySettings,
    *,
    talker_ids: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Speak the last assistant turn of each conversation: codes int64 [G, F] of each, F from 0 to `max_frames`.

    `talker_ids` are the Talker's conversations, int64 [S] each, where it should not read the Thinker's; they have the
    same placeholders in their user segments, and as many ids there. A document ends by the Talker's end code or at the
    limit. Raises ConfigError for an unknown speaker or a model without a Talker, ValueError where there is no text.
    """
    if omni.talker is None:
        raise ConfigError("this model has no talker to say anything")
    lengths = list(conversations.doc_lengths)
    own = conversations.token_ids_T.split(lengths)
    ids = own if talker_ids is None else talker_ids
    if not len(lengths) == len(ids) == len(speakers):
        raise ValueError(f"{len(lengths)} conversations, {len(ids)} for the Talker, {len(speakers)} speakers")
    if not lengths:
        return []
    places = conversations.position_ids_3T.split(lengths, dim=1)
    places = [user_positions(omni.config, *pair) for pair in zip(own, places, strict=True)]
    texts = [answer_ids(omni.config, ids_S) for ids_S in ids]
    if not all(texts):
        raise ValueError("a conversation ends with nothing to say")
    media_MH = media_states(omni, conversations)
    voice = Voice(omni, media_MH, list(zip(ids, places, strict=True)), speakers, settings, generator)
    waiting = [iter(text[1:]) for text in texts]  # the first token is in the prefill
    frames, counts = [], [0] * len(texts)
    for piece in voice.talk(lambda: [next(tokens, None) for tokens in waiting]):
        if isinstance(piece, Tensor):
            frames.append(piece)
            counts = [count + (not done) for count, done in zip(counts, voice.done_N.tolist(), strict=True)]
    if not frames:
        return [own[0].new_empty(omni.talker.config.num_code_groups, 0) for _ in counts]
    codes_NGF = torch.stack(frames, dim=2)
    return [codes_GF[:, :count] for codes_GF, count in zip(codes_NGF, counts, strict=True)]


class Voice:
    """The Talker's frames of some documents, one of each at a time."""

    @torch.no_grad()
    def __init__(
        self,
        omni: Omni,
        media_MH: Tensor,
        conversations: Sequence[tuple[Tensor, Tensor]],
        speakers: Sequence[str],
        settings: SaySettings,
        generator: torch.Generator | None,
    ) -> None:
        """Read the conversations: ids [S], of which the first token of text is the last that counts, and positions
        [3, U] of `user_rows`. media [M, H] are the Thinker's hidden states at all their placeholders, in order."""
        assert omni.talker is not None
        self.talker, self.embed, config = omni.talker, omni.thinker.model.embed_tokens, omni.talker.config
        self.settings, self.generator, self.config = settings, generator, config
        device, no_codes = conversations[0][0].device, torch.empty(config.num_code_groups, 0, dtype=torch.int64)
        plans = [
            plan_document(omni.config, ids_S.cpu(), places_3U.cpu(), speaker_id(config, name), no_codes)
            for (ids_S, places_3U), name in zip(conversations, speakers, strict=True)
        ]
        plan = join(plans, config.num_code_groups).to(device)
        x_PD = talker_inputs(self.talker, plan, self.embed(plan.text_ids_X), media_MH)
        self.cache = KVCache(config.text.num_hidden_layers, plan.doc_lengths, settings.max_frames, device)
        hidden_PD, _ = self.talker(x_PD, plan.position_ids_3P, plan.doc_lengths, self.cache)
        last_N = torch.tensor(plan.doc_lengths, device=device).cumsum(0) - 1
        self.hidden_ND, self.position_3N = hidden_PD[last_N], plan.position_ids_3P[:, last_N]
        self.ending, self.padding = omni.config.tts_eos_token_id, omni.config.tts_pad_token_id
        self.ended = [False] * len(plans)  # the text: its end has been heard
        self.done_N = torch.zeros(len(plans), dtype=torch.bool, device=device)  # the speech
        self.seen_NV = torch.zeros(len(plans), config.text.vocab_size, dtype=torch.bool, device=device)

    def talk(self, tokens: Callable[[], Sequence[int | None]]) -> Iterator[Tensor | Sequence[int | None]]:
        """Frames of codes [N, G] until all documents end or the limit is reached, and the tokens heard between them.

        `tokens()` gives the next token of each document's text, None where that has ended.
        """
        for count in range(1, self.settings.max_frames + 1):
            codes_NG = self.frame()
            if codes_NG is None:
                return
            yield codes_NG
            if count == self.settings.max_frames:
                return
            heard = tokens()
            yield heard
            self.hear(codes_NG, heard)

    @torch.no_grad()
    def frame(self) -> Tensor | None:
        """Codes [N, G] of the next frame, zeros in documents that are `done`; None where all are."""
        config, settings = self.config, self.settings
        logits_NV = self.talker.codec_head(self.hidden_ND).float()
        end_N = logits_NV[:, config.codec_eos_token_id].clone()
        logits_NV[:, config.code_predictor.vocab_size :] = -torch.inf  # control ids are no sound
        logits_NV[:, config.codec_eos_token_id] = end_N
        code_N = settings.first_code.choose(logits_NV, self.seen_NV, self.generator)
        self.done_N = self.done_N | (code_N == config.codec_eos_token_id)
        if self.done_N.all():
            return None
        code_N = code_N.masked_fill(self.done_N, 0)
        self.seen_NV[torch.arange(len(code_N), device=code_N.device), code_N] = True
        choose = settings.residual_codes.choose
        codes_NG = self.talker.predict(
            self.hidden_ND, code_N, lambda logits_NV: choose(logits_NV, None, self.generator)
        )
        return codes_NG.masked_fill(self.done_N.unsqueeze(1), 0)

    @torch.no_grad()
    def hear(self, codes_NG: Tensor, tokens: Sequence[int | None]) -> None:
        """Step on: the frame just made, and the next token of each text where there is one."""
        silent = [self.padding if ended else self.ending for ended in self.ended]  # the end once, then padding
        ids = [other if token is None else token for token, other in zip(tokens, silent, strict=True)]
        self.ended = [ended or token is None for token, ended in zip(tokens, self.ended, strict=True)]
        text_ND = self.talker.text_projection(self.embed(codes_NG.new_tensor(ids)))
        x_ND = self.talker.embed_frames(codes_NG.t()) + text_ND
        self.cache.advance()
        self.position_3N = self.position_3N + 1
        self.hidden_ND, _ = self.talker(x_ND, self.position_3N, (1,) * len(ids), self.cache)


@torch.no_grad()
def media_states(
    omni: Omni, conversations: Prompts, features: Features | None = None, *, always: bool = False
) -> Tensor:
    """What the Talker reads of the Thinker: hidden states [M, H] at the placeholders of user segments, in order.

    Layers beyond its own do not run, and none where there are no placeholders; `always` runs them all the same, for
    processes that share their weights. `features` are those of the media where they are encoded already.
    """
    assert omni.config.talker is not None
    ids_T, lengths = conversations.token_ids_T, conversations.doc_lengths
    rows_M = multimodal_rows(omni.config, ids_T, lengths)
    if not len(rows_M) and not always:
        return omni.thinker.model.embed_tokens.weight[:0]
    tapped_TH = omni.thinker(
        ids_T,
        conversations.position_ids_3T,
        lengths,
        conversations.mel_FM,
        conversations.mel_lengths,
        pixels_PX=conversations.pixels_PX,
        grids=conversations.grids,
        features=features,
        tap=omni.config.talker.accept_hidden_layer,
        stop=True,
    )[2]
    return tapped_TH[rows_M]


def speaker_id(config: TalkerConfig, name: str) -> int:
    """Codec control id of a voice. Raises ConfigError, naming those that there are."""
    if name not in config.speaker_id:
        raise ConfigError(f"speaker {name!r} is unknown: this model has {', '.join(sorted(config.speaker_id))}")
    return config.speaker_id[name]


def answer_ids(config: OmniConfig, token_ids_S: Tensor) -> list[int]:
    """The text of the last assistant turn, without what ends it; empty where there is none."""
    ids = token_ids_S.tolist()
    head = [config.im_start_token_id, config.assistant_token_id]
    start = next((place for place in range(len(ids) - HEAD, -1, -1) if ids[place : place + 2] == head), None)
    text = [] if start is None else ids[start + HEAD :]
    return text[: text.index(config.im_end_token_id)] if config.im_end_token_id in text else text


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
