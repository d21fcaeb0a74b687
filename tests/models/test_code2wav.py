"""The waveform decoder: transformers' numbers, and streams that equal the whole."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest
import torch

from models.code2wav import Code2Wav, Code2WavStream
from models.layers.sliding import SlidingAttention, sliding_mask
from models.omni_config import Code2WavConfig

TOLERANCE = 1e-5
STREAM_TOLERANCE = 1e-6  # of full scale: the order of sums differs, nothing else
TINY = Code2WavConfig(
    codebook_size=11,
    num_quantizers=3,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    decoder_dim=16,
    sliding_window=5,
)


def random_config(seed: int) -> Code2WavConfig:
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2])
    heads = kv_heads * rng.choice([1, 2, 3])
    rates = tuple(rng.choice([2, 3, 4, 5]) for _ in range(rng.choice([1, 2, 3])))
    return Code2WavConfig(
        codebook_size=rng.choice([7, 16]),
        num_quantizers=rng.choice([1, 2, 5, 16]),
        hidden_size=heads * rng.choice([4, 6, 8]),
        intermediate_size=rng.choice([10, 24]),
        num_hidden_layers=rng.choice([1, 2, 3]),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        decoder_dim=rng.choice([2, 3]) * 2 ** len(rates),
        sliding_window=rng.choice([1, 2, 3, 5, 8, 72]),
        upsample_rates=rates,
        upsampling_ratios=tuple(rng.choice([2, 3]) for _ in range(rng.choice([1, 2]))),
        rope_theta=rng.choice([100.0, 10_000.0]),
    )


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights at no special value; activations near 1, so that rounding is not blown up and few samples clip."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(0.0, 0.1, generator=generator)
            if any(part in name for part in ("norm.weight", "layernorm.weight", "scale", "gamma")):
                parameter.add_(1.0)
        elif "embedding" in name:
            parameter.normal_(0.0, 1.0, generator=generator)
        else:
            gain = 1.0 if "q_proj" in name or "k_proj" in name else 0.3 if "conv2" in name else 0.7
            parameter.normal_(0.0, gain * parameter[0].numel() ** -0.5, generator=generator)


def tiny(seed: int = 0, config: Code2WavConfig = TINY) -> Code2Wav:
    model = Code2Wav(config)
    randomize(model, seed)
    return model


def random_codes(config: Code2WavConfig, batch: int, frames: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.codebook_size, (batch, config.num_quantizers, frames), generator=generator)


def reference(config: Code2WavConfig) -> torch.nn.Module:
    pytest.importorskip("transformers")
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeCode2WavConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeCode2Wav

    shape = asdict(config)
    rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
    return Qwen3OmniMoeCode2Wav(Qwen3OmniMoeCode2WavConfig(**shape, rope_parameters=rope))


def twins(config: Code2WavConfig, seed: int) -> tuple[Code2Wav, torch.nn.Module]:
    """Ours and transformers', with the same weights under the same names."""
    ours, theirs = tiny(seed, config), reference(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-6)).item()


@pytest.mark.parametrize("seed", range(24))
def test_forward_and_gradients_equal_transformers(seed):
    config = random_config(seed)
    ours, theirs = twins(config, seed)
    codes = random_codes(config, batch=1 + seed % 3, frames=random.Random(seed).randint(2, 33), seed=seed)
    wave, want = ours(codes), theirs(codes).squeeze(1)
    assert wave.shape == want.shape == (len(codes), ours.num_samples(codes.shape[2]))
    assert 0.01 < want.std() and (want.abs() < 1).float().mean() > 0.5, "the test's weights are silent or clip"
    assert relative(wave, want) < TOLERANCE
    direction = torch.rand(wave.shape, generator=torch.Generator().manual_seed(seed)) + 0.1
    (wave * direction).sum().backward()
    (want * direction).sum().backward()
    want_grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        # With a window of one frame, or one head seeing itself, the scores do not matter: both gradients are rounding.
        if config.sliding_window == 1 and ("q_proj" in name or "k_proj" in name):
            assert parameter.grad.abs().max() < 1e-5
            continue
        assert want_grads[name].norm() > 0
        assert relative(parameter.grad, want_grads[name]) < TOLERANCE, name


def test_bf16_is_as_near_as_transformers_is():
    """bf16 keeps 8 bits: within 2 % of fp32's wave, as transformers' own bf16 is, and of each other."""
    config = replace(TINY, hidden_size=32, num_hidden_layers=3)
    ours, theirs = twins(config, 1)
    codes = random_codes(config, 2, 40, 1)
    with torch.no_grad():
        exact = ours(codes)
        wave, want = ours.bfloat16()(codes), theirs.bfloat16()(codes).squeeze(1)
    assert wave.dtype is torch.bfloat16
    assert relative(wave.float(), want.float()) < 0.02
    assert relative(wave.float(), exact) < 0.02
    assert relative(wave.float(), exact) < 1.5 * relative(want.float(), exact)


def test_released_shape():
    with torch.device("meta"):
        model = Code2Wav(Code2WavConfig(2048, 16, 1024, 3072, 8, 16, 16))
        wave = model(torch.zeros(2, 16, 25, dtype=torch.int64))
    assert sum(p.numel() for p in model.parameters()) == 216_016_577
    assert wave.shape == (2, 47_445)
    assert [model.num_samples(t) for t in (0, 1, 2, 25)] == [0, 1365, 3285, 25 * 1920 - 555]
    assert model.config.samples_per_frame == 1920


@pytest.mark.parametrize("frames", [1, 4, 5, 6, 23])
def test_blocks_see_what_one_banded_mask_shows(frames):
    """Against attention over all frames at once, with frames of a past before them."""
    torch.manual_seed(frames)
    layer, before, window = SlidingAttention(24, 6, 2, 5).double(), 3, 5
    x = torch.randn(2, frames, 24, dtype=torch.float64)
    cos, sin = torch.ones(frames, 4, dtype=torch.float64), torch.zeros(frames, 4, dtype=torch.float64)
    got = layer(x, cos, sin, sliding_mask(frames, window, 0, x.device), None)
    distance = torch.arange(frames).unsqueeze(1) - torch.arange(frames)
    band = (distance >= 0) & (distance < window)
    q, k, v = (p(x).unflatten(2, (-1, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=band, enable_gqa=True)
    torch.testing.assert_close(got, layer.o_proj(want.transpose(1, 2).flatten(2)), rtol=1e-12, atol=1e-12)
    mask = sliding_mask(frames, window, before, x.device)
    assert mask.numel() < 2 * window * (frames + window)  # linear in frames
    seen = mask.sum(-1).flatten()[:frames]
    assert seen.tolist() == [min(window, before + 1 + t) for t in range(frames)]


@pytest.mark.parametrize("batch,frames", [(0, 0), (0, 4), (2, 0)])
def test_nothing_to_decode_gives_zero_gradients(batch, frames):
    model = tiny()
    wave = model(random_codes(TINY, batch, frames, 0))
    assert wave.shape == (batch, model.num_samples(frames))
    wave.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_too_few_frames_for_a_sample():
    config = replace(TINY, upsampling_ratios=(1,))
    model = tiny(config=config)
    assert [model.num_samples(t) for t in (1, 2)] == [0, 405]
    wave = model(random_codes(config, 2, 1, 0))
    assert wave.shape == (2, 0)
    wave.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_gradients_reach_every_parameter():
    model = tiny()
    model(random_codes(TINY, 2, 12, 0)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_padding_on_the_right_changes_nothing():
    """Utterances of different lengths in a batch: each one's own samples are those it has alone, gradients too."""
    model, lengths = tiny().double(), (3, 9, 5)
    codes = random_codes(TINY, 3, 9, 0)
    waves = model(codes)
    alone = [model(codes[i : i + 1, :, :t])[0] for i, t in enumerate(lengths)]
    for wave, want in zip(waves, alone, strict=True):
        torch.testing.assert_close(wave[: len(want)], want, rtol=0, atol=1e-13)
    batched = sum(wave[: len(want)].square().sum() for wave, want in zip(waves, alone, strict=True))
    got = torch.autograd.grad(batched, list(model.parameters()))
    want = torch.autograd.grad(sum(wave.square().sum() for wave in alone), list(model.parameters()))
    for ours, theirs in zip(got, want, strict=True):
        assert relative(ours, theirs) < TOLERANCE  # norms compute in fp32


def cuts(rng: random.Random, frames: int) -> list[int]:
    """Chunk lengths that sum to `frames`, runs of one frame and empty chunks among them."""
    lengths: list[int] = []
    while sum(lengths) < frames:
        length = rng.choice([0, 1, 1, 1, 2, 3, 7, 20])
        lengths.append(min(length, frames - sum(lengths)))
    return lengths


def streamed(model: Code2Wav, codes: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    stream = Code2WavStream(model)
    waves = [stream.push(chunk) for chunk in codes.split(lengths, dim=2)]
    return torch.cat([*waves, stream.finish()], dim=1)


@pytest.mark.parametrize("seed", range(30))
def test_any_split_of_a_stream_joins_to_the_whole(seed):
    rng = random.Random(seed)
    config = random_config(seed)
    if seed % 6 == 0:
        config = replace(config, upsampling_ratios=(1,))  # the first frame gives no sample
    model = tiny(seed, config)
    frames = rng.choice([1, 2, 9, 31, 90])
    codes, lengths = random_codes(config, rng.choice([1, 3]), frames, seed), cuts(rng, frames)
    with torch.no_grad():
        whole, exact = model(codes), model.double()(codes)
        got = streamed(model.float(), codes, lengths)
        assert got.shape == whole.shape
        if whole.numel():
            assert (got - whole).abs().max() <= STREAM_TOLERANCE, lengths
        torch.testing.assert_close(streamed(model.double(), codes, lengths), exact, rtol=0, atol=1e-12)


def test_one_frame_at_a_time_past_many_windows():
    model = tiny()
    codes = random_codes(TINY, 2, 60, 0)
    with torch.no_grad():
        whole = model(codes)
    stream, given = Code2WavStream(model), 0
    for t in range(60):
        chunk = stream.push(codes[:, :, t : t + 1])
        assert chunk.shape == (2, model.num_samples(t + 1) - given)
        assert (chunk - whole[:, given : given + chunk.shape[1]]).abs().max() <= STREAM_TOLERANCE
        given += chunk.shape[1]
    assert given == whole.shape[1] and stream.finish().shape == (2, 0)


def test_a_stream_remembers_a_fixed_amount():
    """As many values after 100 frames as after 20, and no chunk is kept alive by a view of it."""
    model, sizes = tiny(), []
    stream = Code2WavStream(model)
    for t in range(100):
        stream.push(random_codes(TINY, 1, 1 if t % 2 else 4, t))
        kept = stream._past._columns.values()
        sizes.append(sum(x.untyped_storage().nbytes() for x in kept))
        assert all(x.untyped_storage().nbytes() == x.numel() * 4 for x in kept)
    assert len(set(sizes[19:])) == 1


def test_bf16_stream():
    model = tiny().bfloat16()
    codes = random_codes(TINY, 1, 30, 3)
    with torch.no_grad():
        whole = model(codes)
    assert (streamed(model, codes, [1, 9, 13, 7]) - whole).float().abs().max() < 2**-6


def test_decode_is_the_whole_where_chunked_decode_is_not():
    """transformers' chunked decode restarts on 25 frames and loses samples at every seam; ours carries its state."""
    config = replace(TINY, num_hidden_layers=4, sliding_window=24, hidden_size=32)
    ours, theirs = twins(config, 5)
    codes = random_codes(config, 1, 230, 5)
    with torch.no_grad():
        whole = ours(codes)
        chunked = theirs.chunked_decode(codes, chunk_size=60, left_context_size=25).squeeze(1)
    assert (ours.decode(codes, chunk_frames=60) - whole).abs().max() <= STREAM_TOLERANCE
    lost = 1920 - ours.num_samples(1)
    assert chunked.shape[1] == whole.shape[1] - 3 * lost  # four chunks, three seams
    first, second = 60 * 1920 - lost, 60 * 1920 - lost
    assert (chunked[:, :first] - whole[:, :first]).abs().max() <= 1e-5
    aligned = whole[:, 60 * 1920 : 60 * 1920 + second]
    assert relative(chunked[:, first : first + second], aligned) > 1e-3, "25 frames do not cover the receptive field"


def test_errors():
    model = tiny()
    with pytest.raises(ValueError, match="4 codebooks, but this decoder has 3"):
        model(torch.zeros(1, 4, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="go from 0 to 11, but must lie in 0 .. 10"):
        model.decode(torch.tensor([[[0, 11], [1, 1], [1, 1]]]))
    with pytest.raises(ValueError, match="chunk_frames must be at least 1, not 0"):
        model.decode(random_codes(TINY, 1, 3, 0), chunk_frames=0)
    stream = Code2WavStream(model)
    stream.push(random_codes(TINY, 2, 3, 0))
    with pytest.raises(ValueError, match="a chunk for 1 streams after one for 2"):
        stream.push(random_codes(TINY, 1, 3, 0))
    stream.finish()
    with pytest.raises(ValueError, match="is finished"):
        stream.push(random_codes(TINY, 2, 3, 0))
