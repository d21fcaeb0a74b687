"""Text from a pack of prompts, with keys and values kept.

    packed prompts --one forward--> a token each --one forward, all documents at once--> a token each --> ... all done

It calls modules only, so a sharded engine's hooks gather what they need. There every rank must make the same number
of forward calls: `all_done` tells a rank whether all the others are done too, and a rank without prompts goes
through the same motions with empty tensors. Cost: one forward of the prompts, then O(documents * past) per step.

Speech on top of it: models/speak.py. Letters: T tokens, N documents, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from models.layers.cache import KVCache
from models.sampling import Sampling
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

    @property
    def pixels_PX(self) -> Tensor:
        """float [P, X], images and videos end to end; empty where there are none."""
        ...

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """Frames, rows and columns of patches of each image or video."""
        ...


class TextDecoding:
    """A pack of prompts being continued, one token per document and step."""

    @torch.no_grad()
    def __init__(self, thinker: Thinker, prompts: Prompts, room: int, tap: int | None = None) -> None:
        """Read the prompts; `room` tokens may follow each. With `tap`, `tapped_TD` is as Thinker.forward says."""
        self.thinker, self.num_docs = thinker, len(prompts.doc_lengths)
        device = prompts.token_ids_T.device
        self.no_mel = prompts.mel_FM[:0]
        self.cache = KVCache(len(thinker.model.layers), prompts.doc_lengths, room, device)
        out = thinker(
            prompts.token_ids_T,
            prompts.position_ids_3T,
            prompts.doc_lengths,
            prompts.mel_FM,
            prompts.mel_lengths,
            self.cache,
            pixels_PX=prompts.pixels_PX,
            grids=prompts.grids,
            tap=tap,
        )
        self.tapped_TD: Tensor | None = out[2] if tap is not None else None
        last_N = torch.tensor(prompts.doc_lengths, dtype=torch.int64, device=device).cumsum(0) - 1
        starts = [0, *(last_N + 1).tolist()]
        tops = [prompts.position_ids_3T[:, a:b].max() for a, b in zip(starts, starts[1:], strict=False)]
        self.next_position_N = torch.stack(tops) + 1 if tops else prompts.position_ids_3T.new_empty(0)
        self.hidden_ND = out[0][last_N]

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of each document's next token, [N, V].

        Never a placeholder, which no answer can hold and the next forward would take for a clip or an image.
        """
        config, logits_NV = self.thinker.config, self.thinker.lm_head(self.hidden_ND)
        for token in (config.audio_token_id, config.image_token_id, config.video_token_id):
            if token is not None:
                logits_NV[:, token] = -torch.inf
        return logits_NV

    @torch.no_grad()
    def feed(self, ids_N: Tensor) -> None:
        """Append a token to each document."""
        self.cache.advance()
        positions_3N = self.next_position_N.expand(3, -1)
        ones = (1,) * self.num_docs
        self.hidden_ND, _ = self.thinker(ids_N, positions_3N, ones, self.no_mel, (), self.cache)
        self.next_position_N = self.next_position_N + 1


@torch.no_grad()
def generate(
    thinker: Thinker,
    prompts: Prompts,
    max_new_tokens: int,
    stop_id: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    all_done: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Continue each document of the pack by chosen tokens, up to and without `stop_id`.

    `all_done(done)` is called once before every forward after the first, with whether this rank is done, and says
    whether every rank is. Returns at most `max_new_tokens` ids per document.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    decoding = TextDecoding(thinker, prompts, max_new_tokens)
    out: list[list[int]] = [[] for _ in prompts.doc_lengths]
    stopped = [False] * len(out)
    seen_NV = _seen(prompts, thinker.config.text.vocab_size) if sampling.repetition_penalty != 1 else None
    for count in range(1, max_new_tokens + 1):
        ids_N = sampling.choose(decoding.logits(), seen_NV, generator)
        for index, token in enumerate(ids_N.tolist()):
            stopped[index] = stopped[index] or token == stop_id
            if not stopped[index]:
                out[index].append(token)
        if count == max_new_tokens or all_done(all(stopped)):
            break
        if seen_NV is not None:
            seen_NV[torch.arange(len(out), device=ids_N.device), ids_N] = True
        decoding.feed(ids_N)
    return out


def greedy(
    thinker: Thinker,
    prompts: Prompts,
    max_new_tokens: int,
    stop_id: int,
    all_done: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """`generate` by the likeliest token at each step."""
    return generate(thinker, prompts, max_new_tokens, stop_id, Sampling(), None, all_done)


def _seen(prompts: Prompts, vocab_size: int) -> Tensor:
    """Which ids each document holds already, bool [N, V]."""
    parts = prompts.token_ids_T.split(list(prompts.doc_lengths))
    seen_NV = prompts.token_ids_T.new_zeros(len(parts), vocab_size, dtype=torch.bool)
    for index, ids_S in enumerate(parts):
        seen_NV[index, ids_S] = True
    return seen_NV
