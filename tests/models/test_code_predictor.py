"""The code predictor: one pass or step by step, batched or alone, the codes are the same, and transformers' too."""

from __future__ import annotations

import pytest
import torch

from models.talker import Talker
from tests.models import random_model as r
from tests.models import random_speech as s


def likeliest(logits_NV):
    return logits_NV.argmax(-1)


def tiny(seed):
    talker = Talker(s.random_talker_config(seed))
    r.randomize(talker, seed)
    return talker


def frames(talker, seed, number=9):
    config, generator = talker.config, torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(number, config.text.hidden_size, generator=generator)
    size = config.code_predictor.vocab_size
    return hidden_ND, torch.randint(0, size, (config.num_code_groups, number), generator=generator)


@pytest.mark.parametrize("seed", range(20))
def test_steps_equal_transformers_and_one_pass(seed):
    """Greedy residual codes as transformers generates them; teacher forcing with them predicts them again."""
    pytest.importorskip("transformers")
    config = s.random_talker_config(seed)
    reference = s.reference_talker(config, seed).eval()
    talker = s.talker_like(reference, config)
    hidden_ND, codes_GN = frames(talker, seed)
    codes_NG = talker.predict(hidden_ND, codes_GN[0], likeliest)
    assert codes_NG.dtype is torch.int64 and torch.equal(codes_NG[:, 0], codes_GN[0])
    first_ND = reference.model.codec_embedding(codes_GN[0])
    want_NR = reference.code_predictor.generate(
        inputs_embeds=torch.stack([hidden_ND, first_ND], 1), max_new_tokens=config.num_code_groups - 1, do_sample=False
    )
    assert torch.equal(codes_NG[:, 1:], want_NR)
    logits_NRV = talker.code_predictor.logits(talker.residual_states(hidden_ND, codes_NG.T))
    assert torch.equal(logits_NRV.argmax(-1), want_NR)


@pytest.mark.parametrize("seed", range(6))
def test_step_logits_equal_one_pass(seed):
    """Any way of choosing is fed by the logits of teacher forcing; frames do not depend on those beside them."""
    talker = tiny(seed)
    hidden_ND, codes_GN = frames(talker, seed)
    logits, turn = [], iter(codes_GN[1:])

    def forced(logits_NV):
        logits.append(logits_NV)
        return next(turn)

    assert torch.equal(talker.predict(hidden_ND, codes_GN[0], forced), codes_GN.T)
    with torch.no_grad():
        want_NRV = talker.code_predictor.logits(talker.residual_states(hidden_ND, codes_GN))
        alone_NRV = talker.code_predictor.logits(talker.residual_states(hidden_ND[4:5], codes_GN[:, 4:5]))
    torch.testing.assert_close(torch.stack(logits, 1), want_NRV, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone_NRV, want_NRV[4:5], rtol=1e-5, atol=1e-5)


def test_heads_see_earlier_codes_only():
    """A changed code moves the logits of later codes alone; the last code moves none."""
    talker = tiny(6)
    groups = talker.config.num_code_groups
    hidden_ND, codes_GN = frames(talker, 0)
    with torch.no_grad():
        before_NRV = talker.code_predictor.logits(talker.residual_states(hidden_ND, codes_GN))
        for group in range(groups):
            changed_GN = codes_GN.clone()
            changed_GN[group] = (changed_GN[group] + 1) % talker.config.code_predictor.vocab_size
            after_NRV = talker.code_predictor.logits(talker.residual_states(hidden_ND, changed_GN))
            moved = [not torch.equal(after_NRV[:, r], before_NRV[:, r]) for r in range(groups - 1)]
            assert moved == [r >= group for r in range(groups - 1)]


def test_no_frames():
    """Zero gradients; the embedding of the last code, which is never fed, belongs to the Talker's inputs."""
    talker = tiny(2)
    hidden_ND, codes_GN = frames(talker, 0, number=0)
    assert talker.predict(hidden_ND, codes_GN[0], likeliest).shape == (0, talker.config.num_code_groups)
    talker.code_predictor.logits(talker.residual_states(hidden_ND, codes_GN)).sum().backward()
    unused = f"model.codec_embedding.{talker.config.num_code_groups - 2}.weight"
    for name, parameter in talker.code_predictor.named_parameters():
        if name == unused:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and not parameter.grad.any(), name
