"""Documents by what media they hold, tokens by their kind, towers by name."""

from __future__ import annotations

import torch
from torch import nn

from tests.train import engine_cases as cases
from train.config import OptimConfig
from train.loss import IGNORE, expert_count, text_loss
from train.media import GROUPS, KINDS, by_kind, group_name, kinds_of, media_of
from train.watch import Towers, tower_of


def test_groups_and_kinds() -> None:
    """Document 0 and 1 have sound, 3 an image, 6 a video; an empty one has nothing."""
    batch = cases.pack(0, (3, 0, 2, 6))
    kinds_T = kinds_of(cases.setup("local").thinker, batch.token_ids_T)
    media_T = media_of(kinds_T, batch.doc_lengths)
    found = [group_name(int(part[0])) for part in media_T.split(list(batch.doc_lengths))]
    assert found == ["image", "audio", "text", "video"]
    assert [group_name(group) for group in (0, 3, 5, 7)] == ["text", "audio+image", "audio+video", "audio+image+video"]
    assert int((kinds_T == KINDS.index("video")).sum()) == int((batch.token_ids_T == cases.VIDEO).sum()) > 0
    empty = cases.pack(0, ())
    assert media_of(kinds_of(cases.setup("local").thinker, empty.token_ids_T), empty.doc_lengths).shape == (0,)


def test_losses_by_media_are_those_of_the_documents_alone() -> None:
    objective = cases.setup("local").build_objective()
    hidden = {}
    for indices in ((0, 3, 4, 6), (0,), (3,), (4,), (6,), (5,)):
        batch = cases.pack(0, indices)
        hidden_TD, _ = objective.thinker(
            batch.token_ids_T, batch.position_ids_3T, batch.doc_lengths, batch.mel_FM, batch.mel_lengths,
            pixels_PX=batch.pixels_PX, grids=batch.grids,
        )  # fmt: skip
        hidden[indices] = total, media = text_loss(objective.thinker, hidden_TD, batch, 800)
        torch.testing.assert_close(media[0].sum(), total.double())
        assert int(media[1].sum()) == int((batch.labels_T != IGNORE).sum())
    together = hidden[0, 3, 4, 6][1]
    torch.testing.assert_close(together, sum(hidden[(index,)][1] for index in (0, 3, 4, 6)), rtol=1e-5, atol=1e-5)
    assert together.shape == (2, GROUPS) and int((together[1] > 0).sum()) == 4
    assert not hidden[(5,)][1].any()  # it has no target


def test_experts_by_kind_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(50, 8, generator=generator) for _ in range(3)]
    kinds_T = torch.randint(0, len(KINDS), (50,), generator=generator)
    found = by_kind(logits, 2, kinds_T)
    for layer, logits_TE in enumerate(logits):
        torch.testing.assert_close(found[:, layer].sum(0).float(), expert_count(logits_TE, 2))
        for kind in range(len(KINDS)):
            assert found[kind, layer].equal(expert_count(logits_TE[kinds_T == kind], 2).double())


def test_towers() -> None:
    names = {
        "thinker.audio_tower.conv1.bias": "audio", "visual.blocks.0.weight": "vision", "model.norm.weight": "language",
        "thinker.lm_head.weight": "language", "talker.model.norm.weight": "talker", "code2wav.x": "code2wav",
        "talker.code_predictor.model.norm.weight": "code_predictor", "adversary.y": "adversary",
    }  # fmt: skip
    assert {name: tower_of(name) for name in names} == names
    model = nn.Module()
    model.audio_tower, model.lm_head = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    towers = Towers(model, OptimConfig(lr_scale={"audio*": 0.5}))
    assert towers.scales == {"audio": 0.5, "language": 1.0}
    gradients = [("audio_tower.weight", torch.full((4,), 2.0)), ("lm_head.weight", torch.ones(9))]
    assert towers.norms(towers.squares(gradients)) == {"audio": 4.0, "language": 3.0}
    assert towers.norms(towers.squares(gradients[1:])) == {"audio": 0.0, "language": 3.0}
    model.lm_head.requires_grad_(False)
    assert Towers(model, OptimConfig()).names == ["audio"]
