"""The Talker's inputs: which text, multimodal and codec rows are summed at each position.

    conversation ids, codes --plan_document, join (integers; data workers)--> TalkerPlan
    Thinker's token embeddings of plan.text_ids -------.
    Thinker's hidden states at user placeholders -------+-- talker_inputs (one gather, one sum; device)--> [P, D]
    plan.codes -----------------------------------------'

A document is the user segments of its conversation, then nine positions, then one position per frame:

    position   0            1         2   3       4         5         6       7         8         frame t
    text       <|im_start|> assistant \\n  pad     pad       pad       pad     bos       text[0]   text[t + 1]
    codec      -            -         -   nothink think_bos think_eos speaker codec_pad codec_bos codes of t

where pad and bos are tts_pad and tts_bos, and the text is followed by tts_eos, then by tts_pad. Position 8 predicts
frame 0, the position of frame t frame t + 1, and that of the last frame the end. System prompts and earlier answers
are left out; in user segments placeholders take hidden states and all else plain embeddings.

The ids are the Talker's own: they may be another system prompt, rewritten text or retrieved context than the Thinker
read, as long as the user segments hold as many placeholders. The Thinker's hidden states of text never come here.

Cost: plans are O(P) integers; on the device one projection per distinct source row, so padding costs one row a
document. Letters: S ids of a conversation, U of them the user's, P positions, X text rows, M multimodal rows, C control
rows, F frames, T frames of a document, G codes of a frame, H hidden of the Thinker, D hidden of the Talker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from models.omni_config import OmniConfig, TalkerConfig
from models.talker import Talker

IGNORE = -100
PAD, BOS, EOS = 0, 1, 2  # first text rows of each document
HEAD, PREFIX = 3, 9  # positions without codec channel, and positions before the first frame


@dataclass(frozen=True, slots=True)
class TalkerPlan:
    """Where the rows of one document, or of a pack, come from and what each position must predict. No padding."""

    text_ids_X: Tensor  # int64: ids to be embedded by the Thinker's embed_tokens
    text_rows_P: Tensor  # int64: which of them each position reads; any one where a multimodal row takes its place
    multimodal_places_M: Tensor  # int64: positions of the multimodal rows, in order
    control_ids_C: Tensor  # int64: codec control ids of the prefix
    control_places_C: Tensor  # int64
    codes_GF: Tensor  # int64: codes of all frames
    frame_places_F: Tensor  # int64: positions that hear the frames; the position before each predicts it
    targets_P: Tensor  # int64: first code that position p must predict (already shifted), -100 = no loss
    position_ids_3P: Tensor  # float32
    doc_lengths: tuple[int, ...]  # positions of each document; they sum to P

    @classmethod
    def empty(cls, num_code_groups: int) -> TalkerPlan:
        """A plan without documents."""
        none = torch.empty(0, dtype=torch.int64)
        codes_GF = none.view(num_code_groups, 0)
        return cls(none, none, none, none, none, codes_GF, none, none, torch.empty(3, 0), ())

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> TalkerPlan:
        """The same plan with every tensor replaced by `change(tensor)`."""
        names = [field.name for field in fields(self) if field.name != "doc_lengths"]
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def pin_memory(self) -> TalkerPlan:
        """Page-locked copies, for asynchronous copies to a GPU."""
        return self.map_tensors(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> TalkerPlan:
        """The same plan on `device`; asynchronous where it is pinned."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))


def user_rows(config: OmniConfig, token_ids_S: Tensor) -> Tensor:
    """Rows of a conversation that the Talker reads: its user segments before the last assistant turn, int64 [U].

    A segment runs from its <|im_start|> to the next. TM-RoPE ids of `token_ids[user_rows]` are what `plan_document`
    takes.
    """
    steps_S = torch.arange(len(token_ids_S), device=token_ids_S.device)
    latest_S = torch.where(token_ids_S == config.im_start_token_id, steps_S, -1).cummax(0).values
    role_S = token_ids_S[(latest_S + 1).clamp(max=len(token_ids_S) - 1)]
    users_S = (latest_S >= 0) & (role_S == config.user_token_id)
    last = steps_S[(latest_S == steps_S) & (role_S == config.assistant_token_id)][-1:]
    return (users_S & (steps_S < last if len(last) else True)).nonzero().squeeze(1)


def multimodal_rows(config: OmniConfig, token_ids_T: Tensor, doc_lengths: Sequence[int]) -> Tensor:
    """Rows of the Thinker's pack whose hidden states the Talker reads: placeholders of user segments, int64 [M]."""
    rows, start = [token_ids_T.new_empty(0)], 0
    for ids_S in token_ids_T.split(list(doc_lengths)):
        user_U = user_rows(config, ids_S)
        rows.append(start + user_U[_placeholders(config, ids_S[user_U])])
        start += len(ids_S)
    return torch.cat(rows)


def plan_document(
    config: OmniConfig, token_ids_S: Tensor, user_position_ids_3U: Tensor, speaker_id: int, codes_GT: Tensor
) -> TalkerPlan:
    """Plan one document: the last assistant turn of a conversation, spoken.

    Args:
        config: of the whole model, Talker included.
        token_ids_S: int64, the Talker's conversation in ChatML; the text to speak ends at <|im_end|> or with the ids.
        user_position_ids_3U: float32 [3, U], TM-RoPE ids of the ids at `user_rows`; the rest count on from them.
        speaker_id: codec control id of the voice.
        codes_GT: int64 [G, T]. T = 0 gives the prefill of generation, for which one token of text is enough.

    Raises:
        ValueError: there is no assistant turn, or shapes or ids do not fit.
    """
    talker = _checked(config, speaker_id, codes_GT)
    im_start_S = token_ids_S[:-1] == config.im_start_token_id
    turns = (im_start_S & (token_ids_S[1:] == config.assistant_token_id)).nonzero().flatten().tolist()
    if not turns or turns[-1] + HEAD > len(token_ids_S):
        raise ValueError("the Talker's conversation has no assistant turn: <|im_start|>, assistant, line break, text")
    head_3, text = token_ids_S[turns[-1] :][:HEAD], token_ids_S[turns[-1] + HEAD :]
    ends = (text == config.im_end_token_id).nonzero().flatten().tolist()
    text = text[: ends[0] if ends else None]

    frames, user_U = codes_GT.shape[1], token_ids_S[user_rows(config, token_ids_S)]
    text = text[: frames + 1]  # there is no position for more
    if user_position_ids_3U.shape != (3, len(user_U)):
        raise ValueError(
            f"user_position_ids have shape {tuple(user_position_ids_3U.shape)}, but the conversation has "
            f"{len(user_U)} user tokens before its last assistant turn: (3, {len(user_U)})"
        )
    multimodal_U = _placeholders(config, user_U)
    own = torch.tensor([config.tts_pad_token_id, config.tts_bos_token_id, config.tts_eos_token_id])
    text_ids_X = torch.cat([own, user_U[~multimodal_U], head_3, text])
    user_rows_U = torch.where(multimodal_U, PAD, len(own) - 1 + (~multimodal_U).cumsum(0))
    head_row = len(text_ids_X) - len(text) - HEAD
    head_rows = torch.arange(head_row, head_row + HEAD)
    spoken = torch.full((max(frames + 1, len(text) + 1),), PAD)
    spoken[: len(text)] = torch.arange(head_row + HEAD, len(text_ids_X))
    spoken[len(text)] = EOS
    between = torch.tensor([PAD, PAD, PAD, PAD, BOS])

    start = len(user_U) + PREFIX
    length = start + frames
    targets_P = torch.full((length,), IGNORE)
    targets_P[start - 1 : -1] = codes_GT[0]
    targets_P[-1] = talker.codec_eos_token_id
    first = user_position_ids_3U.max() + 1 if len(user_U) else torch.tensor(0.0)
    control = (talker.codec_nothink_id, talker.codec_think_bos_id, talker.codec_think_eos_id)
    control += speaker_id, talker.codec_pad_id, talker.codec_bos_id
    return TalkerPlan(
        text_ids_X=text_ids_X,
        text_rows_P=torch.cat([user_rows_U, head_rows, between, spoken[: frames + 1]]),
        multimodal_places_M=multimodal_U.nonzero().squeeze(1),
        control_ids_C=torch.tensor(control),
        control_places_C=torch.arange(start - len(control), start),
        codes_GF=codes_GT,
        frame_places_F=torch.arange(start, length),
        targets_P=targets_P,
        position_ids_3P=torch.cat(
            [user_position_ids_3U, (first + torch.arange(length - len(user_U))).expand(3, -1)], 1
        ),
        doc_lengths=(length,),
    )


def join(plans: Sequence[TalkerPlan], num_code_groups: int) -> TalkerPlan:
    """One plan for documents end to end; none are fine. Multimodal rows and frames follow in the same order."""
    parts = [TalkerPlan.empty(num_code_groups)]
    row = place = 0
    for plan in plans:
        parts.append(
            replace(
                plan,
                text_rows_P=plan.text_rows_P + row,
                multimodal_places_M=plan.multimodal_places_M + place,
                control_places_C=plan.control_places_C + place,
                frame_places_F=plan.frame_places_F + place,
            )
        )
        row, place = row + len(plan.text_ids_X), place + len(plan.text_rows_P)
    names = [field.name for field in fields(TalkerPlan) if field.name != "doc_lengths"]
    joined = {name: torch.cat([getattr(part, name) for part in parts], dim=-1) for name in names}
    return TalkerPlan(**joined, doc_lengths=tuple(length for part in parts for length in part.doc_lengths))


def talker_inputs(talker: Talker, plan: TalkerPlan, text_XH: Tensor, multimodal_MH: Tensor) -> Tensor:
    """Inputs [P, D] of a plan, for Talker.forward.

    text [X, H]: the Thinker's plain embeddings of `plan.text_ids_X`. multimodal [M, H]: its hidden states after
    `accept_hidden_layer` layers at the placeholders of user segments (`multimodal_rows`), in order. Both float, both
    may be empty. Raises ValueError where counts disagree.
    """
    for name, rows, places in (
        ("text", text_XH, plan.text_ids_X),
        ("multimodal", multimodal_MH, plan.multimodal_places_M),
    ):
        if len(rows) != len(places):
            raise ValueError(f"{len(rows)} {name} rows for the Talker, but its plan has places for {len(places)}")
    x_PD = talker.text_projection(text_XH).index_select(0, plan.text_rows_P)
    x_PD = x_PD.index_copy(0, plan.multimodal_places_M, talker.hidden_projection(multimodal_MH))
    control_CD, frames_FD = talker.model.codec_embedding(plan.control_ids_C), talker.embed_frames(plan.codes_GF)
    places = torch.cat([plan.control_places_C, plan.frame_places_F])
    return x_PD.index_add(0, places, torch.cat([control_CD, frames_FD]))


def _placeholders(config: OmniConfig, token_ids_S: Tensor) -> Tensor:
    """Where tokens stand for audio, image or video: bool [S]."""
    thinker = config.thinker
    ids = [thinker.audio_token_id, thinker.image_token_id, thinker.video_token_id]
    return torch.isin(token_ids_S, token_ids_S.new_tensor([token for token in ids if token is not None]))


def _checked(config: OmniConfig, speaker_id: int, codes_GT: Tensor) -> TalkerConfig:
    talker = config.talker
    if talker is None:
        raise ValueError("the configuration has no talker: there is nobody to plan for")
    groups, size = talker.num_code_groups, talker.code_predictor.vocab_size
    if codes_GT.ndim != 2 or len(codes_GT) != groups:
        raise ValueError(f"codes have shape {tuple(codes_GT.shape)}, but the Talker takes ({groups}, frames)")
    if codes_GT.numel() and not 0 <= int(codes_GT.min()) <= int(codes_GT.max()) < size:
        raise ValueError(
            f"codes run from {int(codes_GT.min())} to {int(codes_GT.max())}; they must lie in 0..{size - 1}"
        )
    if not size <= speaker_id < talker.text.vocab_size:
        raise ValueError(
            f"speaker_id {speaker_id} is no control id; they lie in {size}..{talker.text.vocab_size - 1}, and the "
            f"configuration names {talker.speaker_id}"
        )
    return talker
