"""DPO of the Talker: log-probabilities against plain logits, the loss's formula and direction, and that it learns.

Media rows, batches and the whole objective are in test_preference_run.py.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from models.init import init_weights
from models.talker import Talker
from models.talker_inputs import IGNORE, join, plan_document, talker_inputs, user_rows
from tests.models import random_model as r
from tests.models import random_speech as s
from tests.train.test_speech_loss import random_answer, relative
from train.errors import RecipeError
from train.preference import (
    PreferenceConfig,
    code_weights,
    dpo_sums,
    media_counts,
    pair,
    sequence_logprobs,
    twice,
)

TOLERANCE = 1e-5


def build(seed=0, pairs=3, kinds=""):
    """A tiny Talker, a table of text embeddings, media rows a document, plans of chosen and of rejected codes."""
    config = s.random_omni_config(seed)
    talker = Talker(config.talker)
    r.randomize(talker, seed)
    generator = torch.Generator().manual_seed(seed)
    table_VH = torch.randn(r.VOCAB, config.thinker.text.hidden_size, generator=generator)
    plans = []
    for i in range(pairs):
        sample, codes_GT = random_answer(10 * seed + i, config, kinds)
        ids_S = torch.tensor(sample.ids)
        positions_3U = torch.arange(float(len(user_rows(config, ids_S)))).expand(3, -1)
        _, other_GT = random_answer(10 * seed + i + 500, config, "")
        speaker = config.talker.speaker_id["ethan"]
        plans.append([plan_document(config, ids_S, positions_3U, speaker, codes) for codes in (codes_GT, other_GT)])
    chosen, rejected = zip(*plans, strict=True)
    return config, talker, table_VH, list(chosen), list(rejected)


def inputs(plan, table_VH, seed=7):
    """Text rows and as many media rows as the plan has places for."""
    generator = torch.Generator().manual_seed(seed)
    media_MH = torch.randn(len(plan.multimodal_places_M), table_VH.shape[1], generator=generator)
    return table_VH[plan.text_ids_X], media_MH


def talker_logprobs(talker, plan, text_XH, media_MH, **settings):
    """Log-probability of each document, fp32 [N]."""
    inputs_PD = talker_inputs(talker, plan, text_XH, media_MH)
    hidden_PD, _ = talker(inputs_PD, plan.position_ids_3P, plan.doc_lengths)
    return sequence_logprobs(talker, hidden_PD, plan, **settings)


def sums_of(talker, plan, given, reference_N, settings):
    """The loss's sums for a plan of pairs."""
    weight = settings.residual_weight
    logprobs_N = talker_logprobs(talker, plan, *given, residual_weight=weight)
    return dpo_sums(logprobs_N, reference_N, code_weights(plan, weight), settings)


def loss_of(sums, pairs, settings):
    """This share of the loss, as an engine weighs the terms."""
    return (sums["preference"] + settings.sft_weight * sums["sft"]) / max(1, pairs)


def plain_logprobs(talker, hidden_PD, plan, residual_weight):
    """From all logits at once, document by document."""
    logp_PV = F.log_softmax(talker.codec_head(hidden_PD), -1)
    states_FRD = talker.residual_states(hidden_PD[plan.frame_places_F - 1], plan.codes_GF)
    logp_FRV = F.log_softmax(talker.code_predictor.logits(states_FRD), -1)
    totals, start = [], 0
    for length in plan.doc_lengths:
        here = range(start, start + length)
        total = sum(logp_PV[p, plan.targets_P[p]] for p in here if plan.targets_P[p] != IGNORE)
        for f, place in enumerate(plan.frame_places_F.tolist()):
            if place in here:
                codes = plan.codes_GF[1:, f]
                total = total + residual_weight * sum(logp_FRV[f, i, code] for i, code in enumerate(codes))
        totals.append(total)
        start += length
    return torch.stack(totals)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("residual_weight", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("max_logits", [1, 5000, 40_000_000])
def test_logprobs_and_gradients_equal_plain_ones(seed, residual_weight, max_logits):
    """Documents weighted differently, as DPO does: values, and the gradient of every parameter."""
    config, talker, table_VH, chosen, rejected = build(seed, 2, ("", "a")[seed % 2])
    plan = pair(chosen, rejected, config.talker.num_code_groups)
    inputs_PD = talker_inputs(talker, plan, *inputs(plan, table_VH))
    weight_N = torch.randn(4, generator=torch.Generator().manual_seed(seed))
    hidden_PD, _ = talker(inputs_PD, plan.position_ids_3P, plan.doc_lengths)
    results = []
    for way in ("chunked", "plain"):
        if way == "chunked":
            logprobs_N = sequence_logprobs(
                talker, hidden_PD, plan, residual_weight=residual_weight, max_logits=max_logits
            )
        else:
            logprobs_N = plain_logprobs(talker, hidden_PD, plan, residual_weight)
        talker.zero_grad()
        (logprobs_N * weight_N).sum().backward(retain_graph=True)
        results.append((logprobs_N.detach(), {name: p.grad for name, p in talker.named_parameters()}))
    (got, got_grads), (want, want_grads) = results
    assert got.dtype == torch.float32 and relative(got, want) < TOLERANCE
    scale = max(grad.norm() for grad in want_grads.values() if grad is not None)
    for name, want_grad in want_grads.items():
        grad = got_grads[name]
        assert grad is not None, name  # zero, never none
        assert (grad - want_grad).norm() < TOLERANCE * max(want_grad.norm(), 1e-2 * scale), name


def test_no_more_logits_than_allowed(monkeypatch):
    """Largest product of the head, forward and backward."""
    config, talker, table_VH, chosen, rejected = build(1)
    plan = pair(chosen, rejected, config.talker.num_code_groups)
    sizes, linear = [], F.linear

    def watched(x, weight, bias=None):
        out = linear(x, weight, bias)
        if weight.shape == talker.codec_head.weight.shape:
            sizes.append(out.numel())
        return out

    monkeypatch.setattr(F, "linear", watched)
    logprobs_N = talker_logprobs(talker, plan, *inputs(plan, table_VH), max_logits=3000)
    forward = len(sizes)
    logprobs_N.sum().backward()
    assert 1 < forward and len(sizes) == 2 * forward and max(sizes) <= 3000


def test_packing_changes_nothing():
    """Documents alone have the logprobs that they have among others; weights of codes count them."""
    config, talker, table_VH, chosen, rejected = build(2)
    groups = config.talker.num_code_groups
    plan = pair(chosen, rejected, groups)
    with torch.no_grad():
        together_N = talker_logprobs(talker, plan, *inputs(plan, table_VH), residual_weight=0.5)
        for i, one in enumerate(document for two in zip(chosen, rejected, strict=True) for document in two):
            alone_N = talker_logprobs(talker, one, *inputs(one, table_VH), residual_weight=0.5)
            torch.testing.assert_close(alone_N, together_N[i : i + 1])
            frames = one.codes_GF.shape[1]
            assert code_weights(one).tolist() == [frames + 1]
            assert code_weights(one, 0.5).tolist() == [frames + 1 + 0.5 * (groups - 1) * frames]


def test_sums_are_those_of_the_paper():
    """By hand, two pairs; length normalisation divides rewards, the SFT term is per code of the chosen ones."""
    logprobs = torch.tensor([-10.0, -12.0, -7.0, -3.0], requires_grad=True)
    reference, codes = torch.tensor([-11.0, -10.0, -6.0, -3.5]), torch.tensor([4.0, 2.0, 8.0, 5.0])
    sums = dpo_sums(logprobs, reference, codes, PreferenceConfig(beta=0.5))
    margins = [0.5 * (1.0 - -2.0), 0.5 * (-1.0 - 0.5)]
    sigmoid = [1 / (1 + math.exp(-m)) for m in margins]
    assert sums["preference"].item() == pytest.approx(-sum(math.log(p) for p in sigmoid))
    assert sums["margin"].item() == pytest.approx(sum(margins)) and sums["right"].item() == 1
    assert sums["sft"].item() == pytest.approx(10 / 4 + 7 / 8)
    (gradient,) = torch.autograd.grad(sums["preference"], logprobs)
    want = [-0.5 * (1 - sigmoid[0]), 0.5 * (1 - sigmoid[0]), -0.5 * (1 - sigmoid[1]), 0.5 * (1 - sigmoid[1])]
    assert gradient.tolist() == pytest.approx(want)

    config = PreferenceConfig(beta=0.5, length_normalised=True, sft_weight=0.2)
    sums = dpo_sums(logprobs, reference, codes, config)
    margins = [0.5 * (1 / 4 - -2 / 2), 0.5 * (-1 / 8 - 0.5 / 5)]
    assert sums["margin"].item() == pytest.approx(sum(margins))
    want = -sum(math.log(1 / (1 + math.exp(-m))) for m in margins) + 0.2 * (10 / 4 + 7 / 8)
    assert loss_of(sums, 2, config).item() == pytest.approx(want / 2)
    with pytest.raises(ValueError, match="two documents a pair"):
        dpo_sums(logprobs[:3], reference[:3], codes[:3], config)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_starts_at_ln_2_where_the_reference_is_the_talker_itself(weight):
    config, talker, table_VH, chosen, rejected = build(3)
    plan = pair(chosen, rejected, config.talker.num_code_groups)
    given, settings = inputs(plan, table_VH), PreferenceConfig(residual_weight=weight)
    reference_N = talker_logprobs(talker, plan, *given, residual_weight=weight)
    sums = sums_of(talker, plan, given, reference_N, settings)
    assert sums["preference"].item() == pytest.approx(3 * math.log(2)) and sums["right"] == 0 == sums["margin"]


def test_a_step_raises_chosen_and_lowers_rejected():
    for seed in range(3):
        config, talker, table_VH, chosen, rejected = build(seed, 1)
        plan = pair(chosen, rejected, config.talker.num_code_groups)
        given = inputs(plan, table_VH)
        before_N = talker_logprobs(talker, plan, *given).detach()
        sums_of(talker, plan, given, before_N, PreferenceConfig())["preference"].backward()
        gradients = [p.grad for p in talker.parameters()]
        scale = 1e-3 / torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(talker.parameters(), gradients, strict=True):
                parameter -= scale * gradient
            change_N = talker_logprobs(talker, plan, *given) - before_N
        assert change_N[0] > 0 > change_N[1], change_N


@pytest.mark.parametrize("settings", [{}, {"residual_weight": 1.0, "length_normalised": True, "beta": 5.0}])
def test_a_few_steps_put_every_pair_right(settings):
    config, talker, table_VH, chosen, rejected = build(4, 4)
    init_weights(talker, seed=0)
    plan, settings = pair(chosen, rejected, config.talker.num_code_groups), PreferenceConfig(**settings)
    given = inputs(plan, table_VH)
    reference_N = talker_logprobs(talker, plan, *given, residual_weight=settings.residual_weight).detach()
    optimizer = torch.optim.AdamW(talker.parameters(), lr=3e-3)
    for _ in range(12):
        loss = loss_of(sums_of(talker, plan, given, reference_N, settings), 4, settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sums = sums_of(talker, plan, given, reference_N, settings)
    assert sums["right"] == 4 and sums["margin"] > 0 and sums["preference"] / 4 < 0.8 * math.log(2), sums


def test_shares_of_any_split_add_up():
    """A pack without pairs takes its part and changes nothing, gradients of zeros and not none."""
    config, talker, table_VH, chosen, rejected = build(5)
    groups, settings = config.talker.num_code_groups, PreferenceConfig(residual_weight=1.0, sft_weight=0.2)
    reference_N = -30.0 - torch.arange(6.0)
    losses, grads = [], []
    for split in (((0, 3),), ((0, 2), (2, 2), (2, 3))):
        talker.zero_grad()
        total = 0.0
        for a, b in split:
            plan = pair(chosen[a:b], rejected[a:b], groups)
            sums = sums_of(talker, plan, inputs(plan, table_VH), reference_N[2 * a : 2 * b], settings)
            share = loss_of(sums, 3, settings)
            share.backward()
            total += share.item()
        losses.append(total)
        grads.append({name: p.grad for name, p in talker.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, grad in grads[0].items():
        assert relative(grads[1][name], grad) < 1e-4, name
    talker.zero_grad(set_to_none=True)
    empty = join([], groups)
    loss_of(sums_of(talker, empty, inputs(empty, table_VH), reference_N[:0], settings), 0, settings).backward()
    assert all(p.grad is not None and not p.grad.any() for p in talker.parameters())


def test_media_rows_of_pairs():
    rows = torch.arange(5.0)[:, None]
    assert twice(rows, [2, 0, 3]).flatten().tolist() == [0, 1, 0, 1, 2, 3, 4, 2, 3, 4]
    assert twice(rows[:0], []).shape == (0, 1)
    config, _, _, chosen, rejected = build(1, 3, "a")
    plan = pair(chosen, rejected, config.talker.num_code_groups)
    assert media_counts(plan) == [len(one.multimodal_places_M) for one in chosen] and sum(media_counts(plan)) > 0
    assert media_counts(join([], config.talker.num_code_groups)) == []


def test_says_what_is_wrong():
    config, _, _, chosen, rejected = build(0, 2)
    with pytest.raises(ValueError, match="2 chosen documents for 1 rejected"):
        pair(chosen, rejected[:1], config.talker.num_code_groups)
    for settings, message in (
        ({"beta": 0.0}, "beta must be above 0"),
        ({"residual_weight": -1.0}, "residual_weight must not be below 0"),
        ({"sft_weight": -0.1}, "sft_weight must not be below 0"),
        ({"beta": math.nan}, "beta must be above 0"),
        ({"sft_weight": math.inf}, "sft_weight must not be below 0, not inf"),
    ):
        with pytest.raises(RecipeError, match=message):
            PreferenceConfig(**settings)
