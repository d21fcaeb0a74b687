"""The Talker's loss against transformers' modules, assembled by hand as its generate() feeds them."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from models.talker import Talker
from models.talker_inputs import IGNORE, join, multimodal_rows, plan_document, talker_inputs, user_rows
from tests.models import random_model as r
from tests.models import random_speech as s
from train.speech_loss import RESIDUAL_WEIGHT, code_counts, code_loss_sums

TOLERANCE = 1e-5


def relative(ours, theirs, scale=None):
    return ((ours - theirs).norm() / (theirs if scale is None else scale).norm().clamp(min=1e-6)).item()


def random_answer(seed, config, kinds):
    """One user's turn and an answer, spoken at random."""
    rng = random.Random(seed)
    sample = r.random_sample(seed, config.thinker, kinds) if kinds else r.Sample(ids=s.random_text(rng))
    text = s.random_text(rng)
    sample.ids = [*s.turn(s.USER, *sample.ids), s.IM_START, s.ASSISTANT, s.NEW_LINE, *text]
    groups, size = config.talker.num_code_groups, config.talker.code_predictor.vocab_size
    codes_GT = torch.randint(0, size, (groups, rng.randint(1, 9)), generator=torch.Generator().manual_seed(seed))
    return sample, codes_GT


def reference_sums(reference, config, arguments, codes_GT):
    """Sums of cross-entropies by transformers' own pieces, one document."""
    thinker, talker, tc = reference.thinker, reference.talker, reference.config.talker_config
    ids, codes = arguments["input_ids"], codes_GT.unsqueeze(0)
    with torch.no_grad():
        out = thinker(**arguments, output_hidden_states=True, use_cache=False)
        special = thinker.get_input_embeddings()(torch.tensor([[s.TTS_BOS, s.TTS_EOS, s.TTS_PAD]]))
    embeds, hidden = out.hidden_states[0], out.hidden_states[config.talker.accept_hidden_layer]
    answer = ids[0].tolist().index(s.ASSISTANT) - 1
    heard = (ids == r.AUDIO) | (ids == r.IMAGE) | (ids == r.VIDEO)
    user = reference._get_talker_user_parts(0, answer, heard, hidden, embeds)
    bos, eos, pad = talker.text_projection(special).chunk(3, 1)
    speaker = tc.speaker_id["ethan"]
    prefix, prefix_ids, trailing = reference._get_talker_assistant_parts(
        answer, ids.shape[1], speaker, embeds, pad, bos, eos
    )
    frames = codes.shape[-1]
    embeddings = [talker.model.codec_embedding, *talker.code_predictor.model.codec_embedding]
    frame = sum(embed(codes[:, g]) for g, embed in enumerate(embeddings))
    text = torch.cat([trailing, pad.expand(1, max(0, frames - trailing.shape[1]), -1)], 1)[:, :frames]
    inputs = torch.cat([user, prefix, frame + text], 1)
    tail = {"input_ids": torch.cat([ids[:, :answer], prefix_ids], 1)}
    tail["attention_mask"] = torch.ones_like(tail["input_ids"])
    positions = r.reference_positions(thinker, {**arguments, **tail})
    positions = torch.cat([positions, (positions.max() + 1 + torch.arange(frames)).expand(3, -1)], 1)
    states = talker.model(inputs_embeds=inputs, position_ids=positions.unsqueeze(1), use_cache=False).last_hidden_state
    first = inputs.shape[1] - frames - 1
    targets = torch.cat([codes[0, 0], torch.tensor([tc.codec_eos_token_id])])
    first_sum = F.cross_entropy(talker.codec_head(states[0, first:]), targets, reduction="sum")
    fed = [embed(codes[0, g]) for g, embed in enumerate(embeddings[:-1])]
    predicted = talker.code_predictor.model(
        inputs_embeds=torch.stack([states[0, first:-1], *fed], 1), use_cache=False
    ).last_hidden_state
    heads = enumerate(talker.code_predictor.lm_head)
    residual = [F.cross_entropy(head(predicted[:, g + 1]), codes[0, g + 1], reduction="sum") for g, head in heads]
    return first_sum, torch.stack(residual), (embeds[0], hidden[0], positions)


@pytest.mark.parametrize("seed", range(20))
def test_sums_and_gradients_equal_transformers(seed):
    pytest.importorskip("transformers")
    config = s.random_omni_config(seed)
    reference = s.reference_omni(config, seed)
    talker = s.talker_like(reference.talker, config.talker)
    plans, texts, heard, first_sums, residual_sums = [], [], [], [], []
    for i, kinds in enumerate((("", "a", "i", "v", "aiv")[seed % 5], "a")):
        sample, codes_GT = random_answer(10 * seed + i, config, kinds)
        first_sum, sums, (embeds_TH, hidden_TH, positions_3P) = reference_sums(
            reference, config, r.reference_inputs(sample), codes_GT
        )
        ids_T = torch.tensor(sample.ids)
        users = len(user_rows(config, ids_T))
        speaker = config.talker.speaker_id["ethan"]
        plans.append(plan_document(config, ids_T, positions_3P[:, :users], speaker, codes_GT))
        torch.testing.assert_close(plans[-1].position_ids_3P, positions_3P)
        texts.append(reference.thinker.get_input_embeddings()(plans[-1].text_ids_X).detach())
        heard.append(hidden_TH[multimodal_rows(config, ids_T, [len(ids_T)])])
        first_sums.append(first_sum)
        residual_sums.append(sums)

    plan = join(plans, config.talker.num_code_groups)
    inputs_PD = talker_inputs(talker, plan, torch.cat(texts), torch.cat(heard))
    hidden_PD, _ = talker(inputs_PD, plan.position_ids_3P, plan.doc_lengths)
    got = code_loss_sums(talker, hidden_PD, plan)
    frames = plan.codes_GF.shape[1]
    assert (got[1], got[3]) == code_counts(plan) == (int((plan.targets_P != IGNORE).sum()), frames)
    want_first, want_residual = sum(first_sums), sum(residual_sums)
    assert relative(got[0], want_first) < TOLERANCE and relative(got[2], want_residual) < TOLERANCE

    loss = got[0] / got[1] + RESIDUAL_WEIGHT * got[2].mean() / got[3]
    mean = want_first / (frames + 2) + 0.3 * want_residual.sum() / (frames * len(want_residual))
    assert relative(loss, mean) < TOLERANCE
    loss.backward()
    mean.backward()
    wanted = {name: parameter.grad for name, parameter in reference.talker.named_parameters()}
    for name, parameter in talker.named_parameters():
        scale = wanted[name]
        if config.talker.text.num_experts_per_tok == 1 and name.endswith("mlp.gate.weight"):
            scale = wanted[name.replace("gate.weight", "experts.down_proj")]  # a weight of one, whatever the gate says
        if name.endswith("shared_expert_gate.weight"):  # sums of products that cancel: the error is rounding
            scale = wanted[name.replace("expert_gate.weight", "expert.down_proj.weight")]
        assert relative(parameter.grad, wanted[name], scale) < TOLERANCE, name
    assert all(parameter.grad is None for parameter in reference.thinker.parameters())


def tiny(seed):
    config = s.random_omni_config(seed)
    talker = Talker(config.talker)
    r.randomize(talker, seed)
    table_VH = torch.randn(r.VOCAB, config.thinker.text.hidden_size, generator=torch.Generator().manual_seed(seed))
    plans = []
    for i in range(3):
        sample, codes_GT = random_answer(i, config, "")
        ids_T = torch.tensor(sample.ids)
        positions_3U = torch.arange(float(len(user_rows(config, ids_T)))).expand(3, -1)
        plans.append(plan_document(config, ids_T, positions_3U, config.talker.speaker_id["ethan"], codes_GT))
    return config.talker.num_code_groups, talker, table_VH, plans


def share(talker, table_VH, plan, counts):
    inputs_PD = talker_inputs(talker, plan, table_VH[plan.text_ids_X], table_VH[:0])
    hidden_PD, _ = talker(inputs_PD, plan.position_ids_3P, plan.doc_lengths)
    first_sum, _, residual_sums_R, _ = code_loss_sums(talker, hidden_PD, plan, max_logits=5000)
    first_count, frames = (max(1, count) for count in counts)
    return first_sum / first_count + RESIDUAL_WEIGHT * residual_sums_R.mean() / frames


def test_shares_of_any_split_add_up():
    """A pack without documents takes its part and changes nothing."""
    groups, talker, table_VH, plans = tiny(0)
    whole = join(plans, groups)
    counts = code_counts(whole)
    losses, gradients = [], []
    for split in ([whole], [join(plans[:2], groups), join([], groups), plans[2]]):
        talker.zero_grad()
        parts = [share(talker, table_VH, plan, counts) for plan in split]
        sum(parts).backward()
        losses.append(sum(parts).detach())
        gradients.append({name: parameter.grad for name, parameter in talker.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0])
    for name, gradient in gradients[0].items():
        assert relative(gradients[1][name], gradient) < TOLERANCE, name


def test_no_documents_give_zero_gradients():
    groups, talker, table_VH, _ = tiny(1)
    loss = share(talker, table_VH, join([], groups), (0, 0))
    loss.backward()
    assert loss.item() == 0
    for name, parameter in talker.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
