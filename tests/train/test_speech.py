"""Thinker and Talker together and apart: what each way computes, and whom its gradient reaches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data.types import Batch
from models.init import init_weights
from models.omni import Omni
from models.say import media_states
from models.speak import user_positions
from models.talker_inputs import join, plan_document
from tests.models import random_model as r
from tests.models import random_speech as s
from tests.train.test_speech_loss import random_answer
from train.errors import RecipeError
from train.speech import SpeechObjective


def build(seed=3, kinds=("aiv", "a", "")):
    config = s.random_omni_config(seed)
    omni = Omni(config)
    r.randomize(omni, seed)
    drawn = [random_answer(seed + i, config, kind) for i, kind in enumerate(kinds)]
    samples = [sample for sample, _ in drawn]
    positions = [torch.arange(len(sample.ids)).float().expand(3, -1) for sample in samples]
    (ids_T, position_ids_3T, doc_lengths, mel_FM, mel_lengths), pictures = r.packed(samples, positions, config.thinker)
    labels_T = torch.where(ids_T >= r.FIRST_TEXT, ids_T, -100).roll(-1)
    keys = tuple(f"{i}" for i in range(len(samples)))
    batch = Batch(ids_T, labels_T, position_ids_3T, doc_lengths, mel_FM, mel_lengths, keys, **pictures)
    plans = []
    for sample, ids_3S, (_, codes_GT) in zip(samples, positions, drawn, strict=True):
        ids_S = torch.tensor(sample.ids)
        speaker = config.talker.speaker_id["ethan"]
        plans.append(plan_document(config, ids_S, user_positions(config, ids_S, ids_3S), speaker, codes_GT))
    return omni, batch, join(plans, config.talker.num_code_groups)


def run(omni, batch, plan, way):
    """Sums, and gradients by name, of one way; the model is left as it was."""
    objective = SpeechObjective(omni, way)
    batch = replace(batch, speech=plan)
    found, names = objective(batch), [term.name for term in objective.terms]
    losses = dict(zip(names, found.losses_K, strict=True))
    text = losses.pop("text", torch.tensor(0.0))
    sums = text, losses.pop("code 0"), torch.stack([*losses.values()])
    assert [len(objective.totals([batch]).targets), len(found.probs)] == [len(names), len(objective.routers)]
    omni.zero_grad(set_to_none=True)
    (sums[0] + sums[1] + sums[2].sum()).backward()
    grads = {name: p.grad for name, p in omni.named_parameters()}
    omni.requires_grad_(True).zero_grad(set_to_none=True)
    return sums, grads


def test_the_talker_learns_the_same_whatever_the_way():
    omni, batch, plan = build()
    media = {"mel_FM": batch.mel_FM[:0], "mel_lengths": (), "pixels_PX": batch.pixels_PX[:0], "grids": ()}
    cached = replace(batch, media_RH=media_states(omni, batch), **media)
    runs = {way: run(omni, batch, plan, way) for way in ("live", "detached", "frozen")}
    runs["cached"] = run(omni, cached, plan, "cached")
    want, grads = runs["live"]
    for way, (sums, of_way) in runs.items():
        torch.testing.assert_close(sums[1:], want[1:])
        for name in grads:
            if name.startswith("talker."):
                torch.testing.assert_close(of_way[name], grads[name], msg=f"{way} {name}")
            elif name.startswith("thinker.") and way in ("frozen", "cached"):
                assert of_way[name] is None
    for way in ("frozen", "cached"):
        assert runs[way][0][0] == 0 < runs["detached"][0][0] == want[0]


def test_detached_keeps_the_talker_out_of_the_thinker():
    """Its Thinker learns from text alone; the live one from speech too, down to the encoders."""
    omni, batch, plan = build()
    (text_sum, *_), detached = run(omni, batch, plan, "detached")
    _, live = run(omni, batch, plan, "live")
    hidden_TH, _ = omni.thinker(
        batch.token_ids_T,
        batch.position_ids_3T,
        batch.doc_lengths,
        batch.mel_FM,
        batch.mel_lengths,
        pixels_PX=batch.pixels_PX,
        grids=batch.grids,
    )
    loss = torch.nn.functional.cross_entropy(omni.thinker.lm_head(hidden_TH), batch.labels_T, reduction="sum")
    torch.testing.assert_close(text_sum, loss)
    loss.backward()
    for name, parameter in omni.thinker.named_parameters():
        torch.testing.assert_close(detached[f"thinker.{name}"], parameter.grad, msg=name, atol=1e-4, rtol=1e-4)
    for name in ("model.embed_tokens.weight", "audio_tower.conv2d1.weight", "visual.patch_embed.proj.weight"):
        assert not torch.allclose(live[f"thinker.{name}"], detached[f"thinker.{name}"])


def test_every_parameter_gets_a_gradient():
    """A full batch: finite, and not zero. Without media, without frames, with nothing at all: zero, never None."""
    omni, batch, plan = build()
    _, grads = run(omni, batch, plan, "live")
    for name, grad in grads.items():
        assert grad is not None and grad.isfinite().all(), name
        assert grad.any() or ".experts." in name or name.endswith("k_proj.bias"), name
    empty = Batch.empty(128)
    nothing = join([], omni.config.talker.num_code_groups)
    _, grads = run(omni, empty, nothing, "live")
    assert all(grad is not None and not grad.any() for grad in grads.values())
    omni, batch, plan = build(kinds=("",))
    _, grads = run(omni, batch, plan, "live")
    for name, grad in grads.items():
        absent = name.startswith(("thinker.audio_tower", "thinker.visual", "talker.hidden_projection"))
        assert grad is not None and (not absent or not grad.any()), name


def test_heads_start_at_a_uniform_guess():
    """ln of the vocabulary to 5 %: text, first codes, every residual codebook."""
    omni, batch, plan = build()
    init_weights(omni, seed=0)
    text_sum, first_sum, *residual_sums_R = SpeechObjective(omni, "live")(replace(batch, speech=plan)).losses_K
    targets, frames = int((batch.labels_T != -100).sum()), plan.codes_GF.shape[1]
    talker = omni.config.talker
    guess = torch.tensor(float(omni.config.thinker.text.vocab_size)).log()
    assert (text_sum / targets).item() == pytest.approx(guess.item(), rel=0.05)
    guess = torch.tensor(float(talker.text.vocab_size)).log()
    assert (first_sum / (frames + len(plan.doc_lengths))).item() == pytest.approx(guess.item(), rel=0.05)
    guess = torch.tensor(float(talker.code_predictor.vocab_size)).log()
    for residual in residual_sums_R:
        assert (residual / frames).item() == pytest.approx(guess.item(), rel=0.05)


def test_says_what_is_wrong():
    omni, batch, plan = build()
    with pytest.raises(RecipeError, match="off, live, detached, frozen, cached for the Talker, not 'thawed'"):
        SpeechObjective(omni, "thawed")
    with pytest.raises(ValueError, match="0 multimodal rows for the Talker, but its plan has places for"):
        SpeechObjective(omni, "cached")(replace(batch, speech=plan))
    omni.talker = None
    with pytest.raises(RecipeError, match="no talker"):
        SpeechObjective(omni, "live")
