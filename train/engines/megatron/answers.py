"""What evaluation asks: sums over a batch, and greedy answers.

    batch   --stages, forward--> last stage: sums           --pipeline group--> every rank
    batch   --stages, forward--> last stage: sums of each document --> every rank
    prompts --stages, forward--> a token a document --> the whole pack again, a token longer --> ...
    prompts --with the first choice, with the second, ...--> sums of each document

There are no caches of keys and values across stages: an answer of N tokens costs N forwards of its whole prompt, media
encoded once. That is meant for the short answers of evaluation inside training; export the weights, or go on under
another engine, to decode long ones.

Letters: T tokens, N documents, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from data.types import Batch
from models.config import ThinkerConfig
from models.thinker import Features
from train.engines.megatron.passes import Passes
from train.loss import IGNORE


@torch.no_grad()
def sums_of(passes: Passes, batch: Batch) -> dict[str, float]:
    """`loss_sum`, `targets`, `correct` of a batch on the device. Collective."""
    (pack,) = passes.think(passes.packs([batch], "sums"), None)
    found = torch.zeros(2, dtype=torch.float64, device=batch.token_ids_T.device)
    if pack.found is not None:
        found = pack.found
        if passes.peers.cp.size() > 1:
            dist.all_reduce(found, group=passes.peers.cp)
    loss, right = passes.share_last(found).tolist()
    return {"loss_sum": loss, "targets": float((batch.labels_T != IGNORE).sum()), "correct": right}


@torch.no_grad()
def losses_of(passes: Passes, batch: Batch, features: Features | None = None) -> tuple[list[float], Features | None]:
    """Cross-entropy of each document's targets, nats; and what was made of the media. Collective."""
    (pack,) = passes.packs([batch], "documents")
    pack.features = features
    passes.think([pack], None)
    sums = torch.zeros(len(batch.doc_lengths), dtype=torch.float64, device=batch.token_ids_T.device)
    if pack.found is not None:
        sums = pack.found
        if passes.peers.cp.size() > 1:
            dist.all_reduce(sums, group=passes.peers.cp)
    return passes.share_last(sums).tolist(), pack.features


@torch.no_grad()
def likelihoods_of(
    passes: Passes, batch: Batch, choices: Sequence[Sequence[Sequence[int]]], rounds: int
) -> list[list[float]]:
    """Log-probability of each choice of each document, in as many passes as every rank makes. Collective."""
    found: list[list[float]] = [[] for _ in choices]
    features = None
    for turn in range(rounds):
        these = [document[turn] if turn < len(document) else document[-1] for document in choices]
        sums, features = losses_of(passes, _asking(batch, these), features)
        for own, document, nats in zip(found, choices, sums, strict=True):
            own.extend([-nats] * (turn < len(document)))
    return found


def _asking(batch: Batch, these: Sequence[Sequence[int]]) -> Batch:
    """The prompts with a choice behind each, whose tokens are the only targets."""
    extended = _extended(batch, these)
    labels_T = torch.full_like(extended.token_ids_T, IGNORE)
    end = 0
    for length, choice in zip(extended.doc_lengths, these, strict=True):
        end += length
        labels_T[end - len(choice) - 1 : end - 1] = extended.token_ids_T[end - len(choice) : end]
    return replace(extended, labels_T=labels_T)


@torch.no_grad()
def continue_greedily(
    passes: Passes,
    thinker: ThinkerConfig,
    batch: Batch,
    max_new_tokens: int,
    stop_id: int,
    all_done: Callable[[bool], bool],
) -> list[list[int]]:
    """Greedy answers to a batch of prompts on the device, one a document; as models.generate.greedy. Collective."""
    answers: list[list[int]] = [[] for _ in batch.doc_lengths]
    stopped, features = [False] * len(answers), None
    for count in range(1, max_new_tokens + 1):
        ids, features = _next(passes, thinker, _extended(batch, answers), features)
        for index, token in enumerate(ids):
            stopped[index] = stopped[index] or token == stop_id
            answers[index].append(token)
        if count == max_new_tokens or all_done(all(stopped)):
            break
    return [answer[: answer.index(stop_id)] if stop_id in answer else answer for answer in answers]


def _next(
    passes: Passes, thinker: ThinkerConfig, batch: Batch, features: Features | None
) -> tuple[list[int], Features | None]:
    """The likeliest next token of each document; and what was made of the media."""
    (pack,) = passes.packs([batch], "last")
    pack.features = features
    passes.think([pack], None)
    ids_N = torch.zeros(len(batch.doc_lengths), dtype=torch.int64, device=batch.token_ids_T.device)
    if passes.peers.is_last:
        assert pack.found is not None
        logits_NV = passes.parts.thinker[-1].module.head.logits(pack.found).clone()
        for token in (thinker.audio_token_id, thinker.image_token_id, thinker.video_token_id):
            if token is not None:  # never a placeholder, which the next forward would take for a clip or an image
                logits_NV[:, token] = -torch.inf
        ids_N = logits_NV.argmax(-1)
    return passes.share_last(ids_N).tolist(), pack.features


def _extended(batch: Batch, answers: Sequence[Sequence[int]]) -> Batch:
    """The prompts with what was answered so far behind each; positions count on."""
    if not any(answers):
        return batch
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    parts = zip(
        batch.token_ids_T.split(list(batch.doc_lengths)),
        batch.position_ids_3T.split(list(batch.doc_lengths), dim=1),
        answers,
        strict=True,
    )
    for ids_S, positions_3S, answer in parts:
        steps = torch.arange(1, len(answer) + 1, device=ids_S.device, dtype=positions_3S.dtype)
        ids += [ids_S, ids_S.new_tensor(answer)]
        positions += [positions_3S, (positions_3S.max() + steps).expand(3, -1)]
    lengths = tuple(length + len(answer) for length, answer in zip(batch.doc_lengths, answers, strict=True))
    ids_T = torch.cat(ids)
    return replace(
        batch,
        token_ids_T=ids_T,
        labels_T=torch.full_like(ids_T, IGNORE),
        position_ids_3T=torch.cat(positions, dim=1),
        doc_lengths=lengths,
    )
