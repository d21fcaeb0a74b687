"""Greedy decoding of a pack of prompts, with keys and values kept.

    packed prompts --one forward--> a token each --one forward, all documents at once--> a token each --> ... all done

It calls modules only, so a sharded engine's hooks gather what they need. There every rank must make the same number
of forward calls: `all_done` tells a rank whether all the others are done too, and a rank without prompts goes
through the same motions with empty tensors. Cost: one forward of the prompts, then O(documents * past) per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from models.layers.cache import KVCache
from models.thinker import Thinker


class Prompts(Protocol):
    """What decoding reads of a batch: the arguments of Thinker.forward."""

    @property
    def token_ids_T(self) -> Tensor:
        """int64 [T]."""
        ...

    @property
    def position_ids_3T(self) -> Tensor:
        """float32 [3, T]."""
        ...

    @property
    def doc_lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        ...

    @property
    def mel_FM(self) -> Tensor:
        """float [F, M], clips end to end."""
        ...

    @property
    def mel_lengths(self) -> tuple[int, ...]:
        """Frames of each clip."""
        ...


@torch.no_grad()
def greedy(
    thinker: Thinker,
    prompts: Prompts,
    max_new_tokens: int,
    stop_id: int,
    all_done: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Continue each document of the pack by its likeliest tokens, up to and without `stop_id`.

    `all_done(done)` is called once before every forward after the first, with whether this rank is done, and says
    whether every rank is. Returns at most `max_new_tokens` ids per document.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    token_ids_T, position_ids_3T, doc_lengths = prompts.token_ids_T, prompts.position_ids_3T, prompts.doc_lengths
    mel_FM, mel_lengths = prompts.mel_FM, prompts.mel_lengths
    num_docs, device = len(doc_lengths), token_ids_T.device
    cache = KVCache(len(thinker.model.layers), doc_lengths, max_new_tokens, device)
    hidden_TD, _ = thinker(token_ids_T, position_ids_3T, doc_lengths, mel_FM, mel_lengths, cache)
    last_N = torch.tensor(doc_lengths, dtype=torch.int64, device=device).cumsum(0) - 1
    next_position_N = position_ids_3T[:, last_N].amax(0) + 1
    hidden_ND = hidden_TD[last_N]
    out: list[list[int]] = [[] for _ in doc_lengths]
    stopped = [False] * num_docs
    for count in range(1, max_new_tokens + 1):
        ids_N = _likeliest(thinker, hidden_ND)
        for index, token in enumerate(ids_N.tolist()):
            stopped[index] = stopped[index] or token == stop_id
            if not stopped[index]:
                out[index].append(token)
        if count == max_new_tokens or all_done(all(stopped)):
            break
        cache.advance()
        positions_3N = next_position_N.expand(3, -1)
        hidden_ND, _ = thinker(ids_N, positions_3N, (1,) * num_docs, mel_FM[:0], (), cache)
        next_position_N = next_position_N + 1
    return out


def _likeliest(thinker: Thinker, hidden_ND: Tensor) -> Tensor:
    """Never the audio placeholder, which no text can hold and the next forward would take for a clip."""
    logits_NV = thinker.lm_head(hidden_ND)
    logits_NV[:, thinker.config.audio_token_id] = -torch.inf
    return logits_NV.argmax(-1)
