"""Greedy decoding with the cache equals decoding by whole forwards."""

from __future__ import annotations

import torch

from models.generate import greedy
from models.positions import text_audio_positions
from tests.models import helpers as h

STOP = 2


def by_whole_forwards(thinker, doc, mel_FM, max_new_tokens):
    ids, out = list(doc.ids), []
    for _ in range(max_new_tokens):
        hidden_TD, _ = thinker(torch.tensor(ids), text_audio_positions([len(ids)]), (len(ids),), mel_FM, doc.clips)
        logits_V = thinker.lm_head(hidden_TD[-1:])[0]
        logits_V[h.AUDIO_TOKEN] = -torch.inf
        token = int(logits_V.argmax())
        if token == STOP:
            break
        out.append(token)
        ids.append(token)
    return out


def prompts(seed):
    generator = torch.Generator().manual_seed(seed)
    documents = [h.document(generator, n, clips) for n, clips in ((3, (120,)), (9, ()), (1, (35, 210)), (17, ()))]
    return documents, h.pack(generator, documents)


@torch.no_grad()
def test_equal_to_whole_forwards():
    lengths = set()
    for seed in range(4):
        thinker = h.tiny_thinker(seed)
        thinker.lm_head.weight[STOP] *= 2.5  # some documents stop early, others do not
        documents, arguments = prompts(seed)
        got = greedy(thinker, arguments, 12, STOP)
        starts = [0, *torch.tensor([sum(d.clips) for d in documents]).cumsum(0).tolist()]
        for doc, start, tokens in zip(documents, starts, got, strict=False):
            assert tokens == by_whole_forwards(thinker, doc, arguments.mel_FM[start : start + sum(doc.clips)], 12)
            lengths.add(len(tokens))
    assert 12 in lengths and min(lengths) < 12


def test_ranks_make_the_same_number_of_forwards():
    """A rank that is done, or has no prompts at all, goes on until all are."""
    thinker = h.tiny_thinker()
    calls = []
    thinker.audio_tower.register_forward_hook(lambda *_: calls.append(1))
    _, busy = prompts(0)
    empty = h.pack(torch.Generator(), [])
    for arguments, num_docs in ((busy, 4), (empty, 0)):
        calls.clear()
        rounds = iter([False] * 5 + [True])
        out = greedy(thinker, arguments, 50, STOP, all_done=lambda done, r=rounds: next(r))
        assert len(out) == num_docs and len(calls) == 6


def test_stops_by_itself():
    thinker = h.tiny_thinker()
    assert greedy(thinker, h.pack(torch.Generator(), []), 50, STOP) == []
