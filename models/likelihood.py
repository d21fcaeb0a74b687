"""How likely continuations of a pack of prompts are: the prompts are read once, each choice after them from the cache.

    packed prompts --one forward--> cache --for each choice: rewind, a token a step, all documents at once--> sums

So media are encoded once and a prompt's layers run once, however many choices there are. Every rank of a sharded engine
must make the same number of forward calls: `most` agrees on the numbers of choices and tokens.
Cost: one forward of the prompts, then one step for each token of the longest i-th choices but its last.

Letters: N documents, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from models.generate import Prompts, TextDecoding
from models.thinker import Thinker

Choices = Sequence[Sequence[Sequence[int]]]  # token ids of each choice of each document


@torch.no_grad()
def likelihoods(
    thinker: Thinker,
    prompts: Prompts,
    choices: Choices,
    most: Callable[[list[int]], list[int]] = list,
) -> list[list[tuple[float, bool]]]:
    """Summed log-probability (nats) of each choice of each document, and whether it is what greedy decoding gives.

    `most` says of numbers what the largest of all ranks are. Raises ValueError for a choice without tokens.
    """
    if any(not ids for document in choices for ids in document):
        raise ValueError("a choice has no tokens")
    (rounds,) = most([max(map(len, choices), default=0)])
    if not rounds:
        return [[] for _ in choices]
    turns = [[document[c] if c < len(document) else [0] for document in choices] for c in range(rounds)]
    lengths = most([max(map(len, turn), default=1) for turn in turns])
    decoding = TextDecoding(thinker, prompts, max(lengths, default=1))
    start = decoding.hidden_ND, decoding.next_position_N, decoding.cache.lengths_N
    found: list[list[tuple[float, bool]]] = [[] for _ in choices]
    for c, (turn, length) in enumerate(zip(turns, lengths, strict=True)):
        decoding.hidden_ND, decoding.next_position_N = start[:2]
        decoding.cache.rewind(start[2])
        sums, greedy = [0.0] * len(turn), [True] * len(turn)
        for step in range(length):
            ids_N = start[2].new_tensor([ids[step] if step < len(ids) else 0 for ids in turn])
            logprobs_NV = thinker.lm_head(decoding.hidden_ND).float().log_softmax(-1)
            chosen_N = logprobs_NV.gather(1, ids_N.unsqueeze(1)).squeeze(1).tolist()
            likeliest_N = logprobs_NV.argmax(-1).tolist()
            for n, ids in enumerate(turn):
                if step < len(ids):
                    sums[n] += chosen_N[n]
                    greedy[n] &= likeliest_N[n] == ids[step]
            if step + 1 < length:
                decoding.feed(ids_N)
        for n, document in enumerate(choices):
            if c < len(document):
                found[n].append((sums[n], greedy[n]))
    return found
