"""The Talker's inputs: transformers' own under generation and teacher forcing, and what may not influence them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from models.talker import Talker
from models.talker_inputs import IGNORE, TalkerPlan, join, multimodal_rows, plan_document, talker_inputs, user_rows
from tests.models import random_model as r
from tests.models import random_speech as s

TOLERANCE = 1e-5
KINDS = ("", "a", "aa", "i", "v", "aiv")


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-6)).item()


def counting(number):
    return torch.arange(float(number)).expand(3, -1)


class Spoken:
    """Transformers answers a prompt: its tokens, its codes, and all that went into its Talker on the way."""

    def __init__(self, reference, config, sample, frames=6, words=4):
        self.arguments = r.reference_inputs(sample)
        inputs, codes = [], []
        hook = reference.talker.model.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append((kwargs["inputs_embeds"], kwargs["position_ids"])),
            with_kwargs=True,
        )
        reference.code2wav.chunked_decode = lambda codes_1GT, **_: (codes.append(codes_1GT), torch.zeros(1, 1, 1))[1]
        ids_1T, _ = reference.generate(
            **self.arguments,
            thinker_max_new_tokens=words,
            thinker_eos_token_id=None,
            thinker_do_sample=False,
            thinker_suppress_tokens=list(range(r.FIRST_TEXT)),
            talker_do_sample=False,
            talker_repetition_penalty=1.0,
            talker_max_new_tokens=frames,
            talker_suppress_tokens=list(range(config.talker.code_predictor.vocab_size, config.talker.text.vocab_size)),
        )
        hook.remove()
        self.ids_T = ids_1T[0, :-1]  # the last token is chosen and never fed: no hidden state of it exists
        self.codes_GT = codes[0][0]
        self.inputs_PD = torch.cat([x[0] for x, _ in inputs])
        self.position_ids_3P = torch.cat([ids[-3:, 0].float() for _, ids in inputs], 1)
        whole = self.arguments | {"input_ids": self.ids_T[None], "attention_mask": torch.ones_like(self.ids_T)[None]}
        with torch.no_grad():
            out = reference.thinker(**whole, output_hidden_states=True, use_cache=False)
        self.hidden_TH = out.hidden_states[config.talker.accept_hidden_layer][0]
        user_U = user_rows(config, self.ids_T)
        users = whole | {"input_ids": self.ids_T[user_U][None], "attention_mask": torch.ones(1, len(user_U))}
        self.user_position_ids_3U = r.reference_positions(reference.thinker, users)

    def plan(self, config, speaker="ethan"):
        return plan_document(
            config, self.ids_T, self.user_position_ids_3U, config.talker.speaker_id[speaker], self.codes_GT
        )


def inputs_of(talker, reference, config, plan, hidden_TH, ids_T, doc_lengths):
    text_XH = reference.thinker.get_input_embeddings()(plan.text_ids_X)
    return talker_inputs(talker, plan, text_XH, hidden_TH[multimodal_rows(config, ids_T, doc_lengths)])


@pytest.mark.parametrize("seed", range(20))
def test_teacher_forcing_replays_generation(seed):
    """Inputs, positions, first codes and residual codes of transformers' generate(), alone and in a pack."""
    pytest.importorskip("transformers")
    config = s.random_omni_config(seed)
    reference = s.reference_omni(config, seed)
    talker = s.talker_like(reference.talker, config.talker)
    rng = random.Random(seed)
    spoken = [
        Spoken(reference, config, s.random_conversation(100 * seed + i, config, kinds), rng.randint(2, 9), words)
        for i, (kinds, words) in enumerate([(KINDS[seed % 6], rng.randint(2, 5)), (rng.choice(KINDS), 12)])
    ]
    plan = join([one.plan(config) for one in spoken], config.talker.num_code_groups)
    hidden_TH, ids_T = torch.cat([one.hidden_TH for one in spoken]), torch.cat([one.ids_T for one in spoken])
    with torch.no_grad():
        inputs_PD = inputs_of(talker, reference, config, plan, hidden_TH, ids_T, [len(one.ids_T) for one in spoken])
        hidden_PD, _ = talker(inputs_PD, plan.position_ids_3P, plan.doc_lengths)
        logits_PV = talker.codec_head(hidden_PD)
        before_F = plan.frame_places_F - 1
        logits_NRV = talker.code_predictor.logits(talker.residual_states(hidden_PD[before_F], plan.codes_GF))
    assert torch.equal(plan.targets_P[before_F], plan.codes_GF[0])
    logits_PV[:, config.talker.code_predictor.vocab_size :] = -torch.inf  # random weights would end at once
    for one, x_PD, ids_3P, logits, targets_P in zip(
        spoken,
        inputs_PD.split(plan.doc_lengths),
        plan.position_ids_3P.split(plan.doc_lengths, 1),
        logits_PV.split(plan.doc_lengths),
        plan.targets_P.split(plan.doc_lengths),
        strict=True,
    ):
        seen = len(one.inputs_PD)  # it ends before it hears its last frame, or the frames after the limit
        assert relative(x_PD[:seen], one.inputs_PD) < TOLERANCE
        torch.testing.assert_close(ids_3P[:, :seen], one.position_ids_3P)
        asked = targets_P != IGNORE
        assert torch.equal(logits[asked].argmax(-1)[:-1], one.codes_GT[0])
        assert targets_P[asked].tolist() == [*one.codes_GT[0].tolist(), config.talker.codec_eos_token_id]
    assert torch.equal(logits_NRV.argmax(-1).T, plan.codes_GF[1:])


def omni(seed):
    """Our own Talker and a table in place of the Thinker's embeddings."""
    config = s.random_omni_config(seed)
    assert config.talker is not None
    talker = Talker(config.talker)
    r.randomize(talker, seed)
    table_VH = torch.randn(r.VOCAB, config.thinker.text.hidden_size, generator=torch.Generator().manual_seed(seed))
    return config, talker, table_VH


def document(config, user, answer, frames, system=(), earlier=(), seed=0):
    ids = (s.turn(s.SYSTEM, *system) if system else []) + list(earlier)
    ids += s.turn(s.USER, *user) + s.turn(s.ASSISTANT, *answer)
    ids_S = torch.tensor(ids)
    groups, size = config.talker.num_code_groups, config.talker.code_predictor.vocab_size
    codes_GT = torch.randint(0, size, (groups, frames), generator=torch.Generator().manual_seed(seed))
    positions_3U = counting(len(user_rows(config, ids_S)))
    return ids_S, plan_document(config, ids_S, positions_3U, config.talker.speaker_id["ethan"], codes_GT)


def same(a, b):
    return a.doc_lengths == b.doc_lengths and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in TalkerPlan.__dataclass_fields__ if name[-1] != "s"
    )


def test_the_nine_positions():
    config, _, _ = omni(0)
    c = config.talker
    user, answer = [30, r.AUDIO, r.AUDIO, 31], [40, 41, 42]
    ids_S, plan = document(config, user, answer, frames=5)
    start = len(s.turn(s.USER, *user))
    assert plan.doc_lengths == (start + 9 + 5,)
    read = plan.text_ids_X[plan.text_rows_P].tolist()
    pad, bos, eos = s.TTS_PAD, s.TTS_BOS, s.TTS_EOS
    assert read[start:] == [
        s.IM_START, s.ASSISTANT, s.NEW_LINE, pad, pad, pad, pad, bos, 40, 41, 42, eos, pad, pad
    ]  # fmt: skip
    assert plan.multimodal_places_M.tolist() == [4, 5]
    heard = [place for place in range(start) if place not in (4, 5)]
    assert [read[place] for place in heard] == [s.turn(s.USER, *user)[place] for place in heard]
    assert plan.control_ids_C.tolist() == [
        c.codec_nothink_id, c.codec_think_bos_id, c.codec_think_eos_id, c.speaker_id["ethan"], c.codec_pad_id,
        c.codec_bos_id,
    ]  # fmt: skip
    assert plan.control_places_C.tolist() == list(range(start + 3, start + 9))
    assert plan.frame_places_F.tolist() == list(range(start + 9, start + 14))
    assert plan.targets_P.tolist() == [IGNORE] * (start + 8) + plan.codes_GF[0].tolist() + [c.codec_eos_token_id]
    assert plan.position_ids_3P.tolist() == counting(start + 14).tolist()


def test_positions_go_on_from_the_furthest_user_axis():
    config, _, _ = omni(0)
    ids_S, _ = document(config, [30, r.AUDIO], [40], frames=2)
    positions_3U = torch.tensor([[0, 1, 2, 3.5, 3.5, 1, 2]] * 3) * torch.tensor([[1.0], [3.0], [2.0]])
    codes_GT = torch.zeros(config.talker.num_code_groups, 2, dtype=torch.int64)
    plan = plan_document(config, ids_S, positions_3U, config.talker.speaker_id["ethan"], codes_GT)
    assert torch.equal(plan.position_ids_3P[:, :7], positions_3U)
    assert torch.equal(plan.position_ids_3P[:, 7:], (torch.arange(11.0) + 11.5).expand(3, -1))


def test_longer_and_shorter_speech_than_text():
    """Text beyond the last position is not embedded at all; no text is tts_eos at once; no frames are a prefill."""
    config, _, _ = omni(0)
    for answer, frames, spoken in (
        ([40, 41, 42, 43], 1, [40, 41]),
        ([40, 41, 42, 43], 3, [40, 41, 42, 43]),
        ([], 2, [s.TTS_EOS, s.TTS_PAD, s.TTS_PAD]),
        ([40, 41], 0, [40]),
    ):
        ids_S, plan = document(config, [30], answer, frames)
        assert plan.text_ids_X[plan.text_rows_P][-frames - 1 :].tolist() == spoken
        assert not set(answer[frames + 1 :]) & set(plan.text_ids_X.tolist())
    prompt_S = ids_S[: ids_S.tolist().index(40) + 1]  # generation: the first token of text has just come
    none = torch.empty(config.talker.num_code_groups, 0, dtype=torch.int64)
    speaker = config.talker.speaker_id["ethan"]
    assert same(plan_document(config, prompt_S, plan.position_ids_3P[:, :6], speaker, none), plan)


def test_system_prompts_and_earlier_answers_do_not_count():
    config, _, _ = omni(1)
    _, plain = document(config, [30, r.AUDIO], [40, 41], 3)
    for system in ([50], [60, 61, r.AUDIO]):
        assert same(document(config, [30, r.AUDIO], [40, 41], 3, system=system)[1], plain)
    earlier = s.turn(s.USER, 70, r.AUDIO)
    _, without = document(config, [30], [40], 3, earlier=earlier)
    assert same(document(config, [30], [40], 3, earlier=earlier + s.turn(s.ASSISTANT, 71, 72))[1], without)
    assert without.multimodal_places_M.tolist() == [4]
    # a later user turn is after the answer: nothing that the Talker could have heard
    ids_S, _ = document(config, [30], [40], 3)
    assert user_rows(config, torch.cat([ids_S, torch.tensor(s.turn(s.USER, 80))])).tolist() == list(range(6))


def test_the_talker_can_be_given_other_text():
    """Rewritten answer, retrieved context and another system prompt change their own rows and nothing else."""
    config, talker, table_VH = omni(2)
    generator = torch.Generator().manual_seed(0)
    hidden_MH = torch.randn(2, config.thinker.text.hidden_size, generator=generator)

    def inputs(*arguments, **options):
        _, plan = document(config, *arguments, **options)
        with torch.no_grad():
            return talker_inputs(talker, plan, table_VH[plan.text_ids_X], hidden_MH)

    def moved(a_PD, b_PD):
        return ((a_PD - b_PD).abs() > 1e-4).any(1).nonzero().flatten().tolist()

    user, answer = [30, r.AUDIO, r.AUDIO, 31], [40, 41, 42]
    plain_PD = inputs(user, answer, 6)
    assert torch.equal(inputs(user, answer, 6, system=[33, 34]), plain_PD)
    text_0 = 9 + 8  # nine user tokens, then the prefix
    assert moved(inputs(user, [40, 55, 42], 6), plain_PD) == [text_0 + 1]
    assert moved(inputs(user, [40, 41], 6), plain_PD) == [text_0 + 2, text_0 + 3]  # its end is one frame earlier

    context = [35, 36, 37]
    retrieved_PD = inputs(context + user, answer, 6)
    assert not moved(torch.cat([retrieved_PD[:3], retrieved_PD[6:]]), plain_PD)
    assert not moved(retrieved_PD[3:6], talker.text_projection(table_VH[context]))


def test_hidden_states_of_text_never_come_here():
    """NaN in the Thinker's hidden states of text and of system prompts reaches no input."""
    config, talker, table_VH = omni(3)
    pair = [document(config, [30, r.AUDIO, 31, r.IMAGE], [40, 41], 4, system=[r.AUDIO, 50], seed=i) for i in range(2)]
    ids_T, lengths = torch.cat([ids_S for ids_S, _ in pair]), [len(ids_S) for ids_S, _ in pair]
    rows_M = multimodal_rows(config, ids_T, lengths)
    assert ids_T[rows_M].tolist() == [r.AUDIO, r.IMAGE] * 2
    hidden_TH = torch.full((len(ids_T), config.thinker.text.hidden_size), torch.nan)
    hidden_TH[rows_M] = torch.randn(len(rows_M), hidden_TH.shape[1], generator=torch.Generator().manual_seed(0))
    hidden_TH.requires_grad_()
    plan = join([plan for _, plan in pair], config.talker.num_code_groups)
    inputs_PD = talker_inputs(talker, plan, table_VH[plan.text_ids_X], hidden_TH[rows_M])
    assert inputs_PD.isfinite().all()
    inputs_PD.sum().backward()
    assert hidden_TH.grad.any(1).nonzero().flatten().tolist() == rows_M.tolist()


@pytest.mark.parametrize("seed", range(6))
def test_a_pack_is_its_documents_end_to_end(seed):
    config, talker, table_VH = omni(seed)
    rng = random.Random(seed)
    plans = [
        document(config, s.random_text(rng) + [r.AUDIO] * i, s.random_text(rng), rng.randint(0, 8), seed=i)[1]
        for i in range(4)
    ]
    hidden_MH = torch.randn(6, config.thinker.text.hidden_size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        alone = [
            talker_inputs(talker, plan, table_VH[plan.text_ids_X], hidden)
            for plan, hidden in zip(plans, hidden_MH.split([0, 1, 2, 3]), strict=True)
        ]
        plan = join(plans, config.talker.num_code_groups)
        packed_PD = talker_inputs(talker, plan, table_VH[plan.text_ids_X], hidden_MH)
    torch.testing.assert_close(packed_PD, torch.cat(alone))
    assert plan.doc_lengths == tuple(len(x) for x in alone)
    for name in ("targets_P", "position_ids_3P", "codes_GF"):
        assert torch.equal(getattr(plan, name), torch.cat([getattr(one, name) for one in plans], -1))
    groups = len(plan.codes_GF)
    assert same(plan, join([join(plans[:2], groups), join(plans[2:], groups)], groups))


def test_no_documents_give_zero_gradients():
    config, talker, table_VH = omni(4)
    plan = join([], config.talker.num_code_groups)
    assert same(plan.to("cpu"), plan)
    none_XH = table_VH[plan.text_ids_X]
    inputs_PD = talker_inputs(talker, plan, none_XH, none_XH)
    hidden_PD, router_logits = talker(inputs_PD, plan.position_ids_3P, plan.doc_lengths)
    states = talker.residual_states(hidden_PD[plan.frame_places_F - 1], plan.codes_GF)
    total = talker.codec_head(hidden_PD).sum() + talker.code_predictor.logits(states).sum()
    (total + sum(x.sum() for x in router_logits)).backward()
    for name, parameter in talker.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_what_does_not_fit_is_refused():
    config, talker, table_VH = omni(5)
    ids_S, plan = document(config, [30, r.AUDIO], [40], 2)
    positions_3U, codes_GT, speaker = plan.position_ids_3P[:, :7], plan.codes_GF, config.talker.speaker_id["ethan"]
    plan_document(config, ids_S, positions_3U, speaker, codes_GT)
    for change, message in (
        ({"token_ids_S": ids_S[:7]}, "no assistant turn"),
        ({"token_ids_S": ids_S[:9]}, "no assistant turn"),
        ({"user_position_ids_3U": positions_3U[:, :6]}, r"shape \(3, 6\).*7 user tokens"),
        ({"codes_GT": codes_GT[1:]}, "codes have shape"),
        ({"codes_GT": codes_GT - 100}, "codes run from -"),
        ({"codes_GT": codes_GT + config.talker.code_predictor.vocab_size}, "must lie in 0"),
        ({"speaker_id": 3}, "speaker_id 3 is no control id"),
        ({"config": replace(config, talker=None)}, "no talker"),
    ):
        arguments = {
            "config": config,
            "token_ids_S": ids_S,
            "user_position_ids_3U": positions_3U,
            "speaker_id": speaker,
            "codes_GT": codes_GT,
        }
        with pytest.raises(ValueError, match=message):
            plan_document(**arguments | change)
    text_XH = table_VH[plan.text_ids_X]
    with pytest.raises(ValueError, match="0 multimodal rows for the Talker, but its plan has places for 1"):
        talker_inputs(talker, plan, text_XH, text_XH[:0])
    with pytest.raises(ValueError, match="text rows"):
        talker_inputs(talker, plan, text_XH[1:], text_XH[:1])
