"""What a token is and what media its document holds, for numbers that are told apart by it.

    token ids             --kinds_of--> of each token: text, audio, image or video        (KINDS)
    kinds, document sizes --media_of--> of each token: which media its document holds     (8 groups, `group_name`)
    losses of positions   --by_media--> sums and counts [2, G] of documents that hold the same media
    router logits         --by_kind---> assignments [4, L, E] by the kind of the routed token

A media token is a placeholder: the tokens that wrap media, such as the start and the end of a clip, are text. A film
with its sound is video and audio. Cost: a few passes over integers of a pack; `by_kind` a top-k a layer.

Letters: T tokens, G groups, L layers, E experts, S documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.config import ThinkerConfig

MEDIA = ("audio", "image", "video")
KINDS = ("text", *MEDIA)
GROUPS = 1 << len(MEDIA)
IGNORE = -100  # the label of a position without a target


def kinds_of(config: ThinkerConfig, ids_T: Tensor) -> Tensor:
    """Index into KINDS of each token, int64 [T]."""
    kinds_T = torch.zeros_like(ids_T)
    for kind, token in enumerate((config.audio_token_id, config.image_token_id, config.video_token_id), 1):
        if token is not None:
            kinds_T += kind * (ids_T == token)
    return kinds_T


def media_of(kinds_T: Tensor, doc_lengths: Sequence[int]) -> Tensor:
    """Which media the document of each token holds: bit n for MEDIA[n], int64 [T]."""
    lengths_S = torch.tensor(doc_lengths, dtype=torch.int64, device=kinds_T.device)
    doc_T = torch.repeat_interleave(lengths_S, output_size=len(kinds_T))
    has_SK = torch.zeros(len(doc_lengths), len(KINDS), dtype=torch.bool, device=kinds_T.device)
    has_SK[doc_T, kinds_T] = True
    bits_S = sum(((1 << n) * has_SK[:, n + 1].long() for n in range(len(MEDIA))), start=torch.zeros_like(lengths_S))
    return bits_S[doc_T]


def group_name(group: int) -> str:
    """What documents of a group hold: text alone, or their media, for instance audio+image."""
    return "+".join(name for n, name in enumerate(MEDIA) if group >> n & 1) or "text"


def by_media(losses_T: Tensor, labels_T: Tensor, media_T: Tensor) -> Tensor:
    """Sums of the positions' losses, and their targets, of each group: float64 [2, G]."""
    both_2T = torch.stack([losses_T.double(), (labels_T != IGNORE).double()])
    return both_2T.new_zeros(2, GROUPS).index_add_(1, media_T, both_2T)


@torch.no_grad()
def by_kind(router_logits: Sequence[Tensor], top_k: int, kinds_T: Tensor) -> Tensor:
    """Assignments of each expert by the kind of the routed token, float64 [kinds, L, E]."""
    found = []
    for logits_TE in router_logits:
        experts, chosen_TK = logits_TE.shape[1], logits_TE.topk(top_k, -1).indices
        cells_TK = chosen_TK + experts * kinds_T.unsqueeze(1)
        found.append(torch.bincount(cells_TK.flatten(), minlength=len(KINDS) * experts).view(len(KINDS), experts))
    return torch.stack(found, 1).double()
