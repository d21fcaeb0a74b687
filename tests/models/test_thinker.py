"""Packing, empty batches, counts that disagree, and bf16."""

from __future__ import annotations

import pytest
import torch

from models.layers.attention import attend, make_segments
from tests.models import helpers as h


def outputs(thinker, arguments):
    hidden_TD, router_logits = thinker(*arguments)
    return torch.cat([hidden_TD, *router_logits], dim=1)


@torch.no_grad()
def test_documents_do_not_see_each_other():
    """Change the tokens and the clip of one document, or make its clip NaN: the others stay bit-equal."""
    generator = torch.Generator().manual_seed(0)
    thinker = h.tiny_thinker()
    shapes = [(6, ()), (3, (60,)), (600, ()), (7, (450,)), (6, ()), (5, (63, 130))]
    documents = [h.document(generator, num_text, clips) for num_text, clips in shapes]
    arguments = h.pack(generator, documents)
    before = outputs(thinker, arguments)
    for poison in (1.0, float("nan")):
        ids_T, mel_FM = arguments.token_ids_T.clone(), arguments.mel_FM.clone()
        start = sum(arguments.doc_lengths[:3])
        here = slice(start, start + arguments.doc_lengths[3])
        ids_T[here] = torch.where(ids_T[here] == h.AUDIO_TOKEN, h.AUDIO_TOKEN, 63 - ids_T[here] % 8)
        mel_FM[60:510] += poison
        after = outputs(thinker, arguments._replace(token_ids_T=ids_T, mel_FM=mel_FM))
        others = torch.ones(len(ids_T), dtype=torch.bool)
        others[here] = False
        assert torch.equal(after[others], before[others])
        assert not torch.equal(after[here], before[here])


def test_pack_equals_separate_documents():
    generator = torch.Generator().manual_seed(1)
    thinker = h.tiny_thinker()
    shapes = [(n, ()) for n in (1, 2, 30, 31, 9, 40, 700, 100)] + [(2, (930,)), (4, (50, 121))]
    documents = [h.document(generator, num_text, clips) for num_text, clips in shapes]
    arguments = h.pack(generator, documents)
    together = outputs(thinker, arguments)
    weights = torch.randn(together.shape, generator=generator)
    (together * weights).sum().backward()
    parameters = {name: p for name, p in thinker.named_parameters() if name != "lm_head.weight"}
    gradients = {name: p.grad for name, p in parameters.items()}
    thinker.zero_grad()
    frame = token = 0
    for doc in documents:
        alone = h.pack(generator, [doc])
        alone = alone._replace(mel_FM=arguments.mel_FM[frame : frame + sum(doc.clips)])
        here = slice(token, token + len(doc.ids))
        out = outputs(thinker, alone)
        torch.testing.assert_close(out, together[here], atol=1e-5, rtol=1e-5)
        (out * weights[here]).sum().backward()
        frame, token = frame + sum(doc.clips), token + len(doc.ids)
    for name, p in parameters.items():
        assert (p.grad - gradients[name]).norm() <= 1e-5 * p.grad.norm() + 1e-4, name


@pytest.mark.parametrize("causal", [True, False])
def test_attention_against_a_dense_mask(causal):
    generator = torch.Generator().manual_seed(2)
    lengths = [1, 3, 104, 90, 17, 520, 17, 64, 65]
    q_THC = torch.randn(sum(lengths), 4, 8, generator=generator)
    k_TGC, v_TGC = torch.randn(2, sum(lengths), 2, 8, generator=generator)
    doc_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask_TT = doc_T[:, None] == doc_T
    mask_TT = mask_TT.tril() if causal else mask_TT
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q_THC, k_TGC, v_TGC)), attn_mask=mask_TT, enable_gqa=True
    ).transpose(0, 1)
    got = attend(q_THC, k_TGC, v_TGC, make_segments(lengths, q_THC.device), causal=causal)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shapes", [[], [(5, ()), (7, ())], [(0, (20,))]])
def test_every_parameter_gets_a_gradient_from_every_batch(shapes):
    """A rank without tokens or without audio enters the same modules: zero gradients, never none."""
    generator = torch.Generator().manual_seed(3)
    thinker = h.tiny_thinker()
    hidden_TD, router_logits = thinker(*h.pack(generator, [h.document(generator, *shape) for shape in shapes]))
    (thinker.lm_head(hidden_TD).square().sum() + sum(r.square().sum() for r in router_logits)).backward()
    for name, p in thinker.named_parameters():
        assert p.grad is not None, name
        if not shapes or (name.startswith("audio_tower") and len(shapes) == 2):
            assert not p.grad.any(), name


def test_counts_that_disagree():
    generator = torch.Generator()
    thinker = h.tiny_thinker()
    good = h.pack(generator, [h.document(generator, 3, (100,))])
    with pytest.raises(ValueError, match="13 audio placeholders in the tokens, but 0 audio tokens from 0 clips"):
        thinker(*good._replace(mel_FM=good.mel_FM[:0], mel_lengths=()))
    with pytest.raises(ValueError, match=r"doc_lengths \[4\] must be positive and sum to the 19 tokens"):
        thinker(*good._replace(doc_lengths=(4,)))
    with pytest.raises(ValueError, match=r"mel_lengths \[99\] must be positive and sum to the 100 mel frames"):
        thinker(*good._replace(mel_lengths=(99,)))


def test_bf16_runs_and_routes_in_fp32():
    generator = torch.Generator().manual_seed(4)
    thinker = h.tiny_thinker()
    arguments = h.pack(generator, [h.document(generator, 9, (130,)), h.document(generator, 5)])
    want = outputs(thinker, arguments)
    thinker.bfloat16()
    hidden_TD, router_logits = thinker(*arguments)
    hidden_TD.float().sum().backward()
    assert hidden_TD.dtype is torch.bfloat16 and all(r.dtype is torch.float32 for r in router_logits)
    assert (hidden_TD.float() - want[:, : hidden_TD.shape[1]]).norm() < 0.1 * want[:, : hidden_TD.shape[1]].norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in thinker.model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu():
    """bf16 on a GPU (variable-length attention, grouped experts) against fp32 on CPU, and fp32 against fp32."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(9, (130,)), (5, ()), (600, ()), (30, (950,))]
    arguments = h.pack(generator, [h.document(generator, *shape) for shape in shapes])
    thinker = h.tiny_thinker()
    want = outputs(thinker, arguments).detach()
    on_gpu = h.Pack(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments))
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        got = outputs(thinker.to("cuda", dtype), on_gpu).float().cpu()
        assert (got - want).norm() < tolerance * want.norm()
