"""The fitted codec: lengths, level, streams cut anywhere, and every file or argument that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import data.kmeans_codec as kmeans_codec
import data.mimi
from data.codec import Codec, open_codec
from data.errors import BadSample, DataError
from data.kmeans_codec import CodecSettings, KMeansCodec, levelled, save_codec
from data.quantizer import BLOCK_VALUES, Quantizer, fit_quantizer, perplexities
from data.vocoder import DELAY, HOP, VocoderStream, log_mel, make_vocoder, spectral_loss, train_vocoder

BLOCK = 1920
SIZES = CodecSettings(codebooks=4, codebook_size=32, dimensions=24, width=24, layers=4)


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def speechlike(seconds: float, seed: int = 0) -> torch.Tensor:
    """Harmonics under a slow envelope, with noise: blocks differ from one another."""
    time_S = torch.arange(round(24_000 * seconds)) / 24_000
    pitch_S = 120 + 40 * torch.sin(1.3 * time_S + seed)
    phase_S = 2 * torch.pi * pitch_S.cumsum(0) / 24_000
    voice_S = sum((torch.sin(k * phase_S) / k for k in range(1, 20)), torch.zeros(()))
    return 0.1 * voice_S * (1.1 + torch.sin(7 * time_S)) + 0.05 * noise(len(time_S), seed)


def write(folder: Path, sizes: CodecSettings = SIZES, seed: int = 0) -> Path:
    """A codec that was hardly trained; its sound is noise, but it is loud and hears its codes."""
    blocks_NX = log_mel(levelled(speechlike(20, seed))).reshape(-1, BLOCK_VALUES)
    fitted = fit_quantizer(blocks_NX, sizes.codebooks, sizes.codebook_size, sizes.dimensions, seed, lambda: None)
    vocoder = make_vocoder(sizes.width, sizes.layers, seed)
    with torch.no_grad():
        vocoder.leave.weight *= 4.0
    save_codec(folder, sizes, fitted, vocoder, {"seed": seed})
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("codecs") / "codec")


@pytest.fixture(scope="module")
def codec(saved) -> KMeansCodec:
    return KMeansCodec(saved)


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def some_codes(frames: int, seed: int = 0, rows: int = 4) -> torch.Tensor:
    return torch.randint(0, 32, (rows, frames), generator=torch.Generator().manual_seed(seed))


# what it is


def test_is_a_codec(codec):
    seen: Codec = codec
    assert (seen.sample_rate, seen.frame_rate, seen.num_codebooks, seen.codebook_size) == (24_000, 12.5, 4, 32)
    assert codec.levels == 4 and codec.samples_per_frame == BLOCK


def test_identity_follows_the_weights(saved, codec, copied, tmp_path_factory):
    assert KMeansCodec(copied).identity == codec.identity
    kind, digest, codebooks = codec.identity.split("/")
    assert (kind, len(digest), codebooks) == ("kmeans", 16, "4")
    assert KMeansCodec(saved, levels=2).identity == codec.identity, "levels change decoding alone"
    other = write(tmp_path_factory.mktemp("codecs") / "other", seed=1)
    assert KMeansCodec(other).identity != codec.identity
    tensors = load_file(copied / "codec.safetensors")
    tensors["mean"][3] += 1e-3
    save_file(tensors, copied / "codec.safetensors")
    assert KMeansCodec(copied).identity != codec.identity


@pytest.mark.parametrize("samples", [0, 1, 1200, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 12_345])
def test_lengths(codec, samples):
    """1,200 samples are 0.05 s."""
    codes = codec.encode(noise(samples))
    frames = -(-samples // BLOCK)
    assert codes.dtype is torch.int64 and codes.shape == (4, frames)
    heard = codec.decode(codes)
    assert heard.dtype is torch.float32 and heard.shape == (frames * BLOCK,)
    assert heard.isfinite().all() and (heard.abs() <= 1.0).all()


def test_codes_tell_sounds_apart_and_each_codebook_is_used(codec):
    codes = codec.encode(speechlike(10))
    assert all(len(row.unique()) > 3 for row in codes)
    assert not torch.equal(codes, codec.encode(speechlike(10, seed=5)))
    mel = log_mel(levelled(speechlike(10)))
    distances = [float((codec.mel_of(codes[:rows]) - mel).square().mean()) for rows in (1, 2, 4)]
    assert distances[0] > 1.05 * distances[1] > 1.05 * distances[2]


# level


def test_loudness_is_not_coded(codec):
    wave = speechlike(3)
    codes = codec.encode(wave)
    assert torch.equal(codec.encode(wave / 16), codes) and torch.equal(codec.encode(wave * 1e6 * 2**40), codes)
    assert not torch.equal(codec.encode(wave * 2**-20), codes), "silence is not raised to speech"


def test_silence_around_an_utterance_changes_nothing(codec):
    wave = speechlike(25 * 0.08)
    codes = codec.encode(wave)
    around = codec.encode(torch.cat([torch.zeros(10 * BLOCK), wave, torch.zeros(30 * BLOCK)]))
    assert torch.equal(around[:, 11:34], codes[:, 1:24])


def test_silence(codec):
    codes = codec.encode(torch.zeros(4 * BLOCK))
    assert torch.equal(codes, codes[:, :1].expand(4, 4)) and codec.decode(codes).isfinite().all()


# decoding


def test_fewer_levels_are_fewer_rows(saved, codec):
    codes = some_codes(5)
    few = KMeansCodec(saved, levels=2)
    assert few.levels == 2 and few.num_codebooks == 4
    assert torch.equal(few.encode(noise(9000)), codec.encode(noise(9000))), "encoding has all codebooks"
    assert torch.equal(few.decode(codes), codec.decode(codes[:2])) and torch.equal(
        few.decode(codes[:1]), codec.decode(codes[:1])
    )
    assert not torch.allclose(few.decode(codes), codec.decode(codes))


@pytest.mark.parametrize("levels", [0, -1, 5])
def test_levels_that_there_are_not(saved, levels):
    with pytest.raises(DataError, match=f"levels must be from 1 to 4, .* not {levels}$"):
        KMeansCodec(saved, levels=levels)


def whole(codec: KMeansCodec, codes: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return codec._vocoder(codec.mel_of(codes)[None].double())[0].float().clamp(-1.0, 1.0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 99))
def test_a_stream_is_the_whole_cut_anywhere(codec, pieces, seed):
    codes = some_codes(sum(pieces), seed)
    stream, sent = codec.stream(), []
    for piece in codes.split(pieces, dim=1):
        sent.append(stream.push(piece))
        frames = sum(map(len, sent)) + DELAY
        assert frames == DELAY or frames % BLOCK == 0, "15 ms late, no more"
    joined = torch.cat([*sent, stream.finish()])
    expected = whole(codec, codes) if sum(pieces) else torch.zeros(0)
    assert joined.shape == expected.shape
    if len(joined):
        assert expected.abs().max() > 0.05, "the test's codec is silent"
        assert (joined - expected).abs().max() <= 2e-7, "float32 somewhere on the way"
        torch.testing.assert_close(codec.decode(codes), expected, rtol=0, atol=2e-7)


def test_two_blocks_of_context_are_not_enough(codec):
    codes = some_codes(12)
    stream = VocoderStream(codec._vocoder)
    assert codec._vocoder.context * HOP == 3 * BLOCK
    kept, codec._vocoder.context = codec._vocoder.context, 16
    try:
        sent = [stream.push(codec.mel_of(piece)) for piece in codes.split(1, dim=1)]
    finally:
        codec._vocoder.context = kept
    assert (torch.cat([*sent, stream.finish()]) - whole(codec, codes)).abs().max() > 1e-5


def test_later_codes_change_no_sound_that_was_sent(codec):
    codes = some_codes(8)
    changed = codes.clone()
    changed[:, 5:] = (changed[:, 5:] + 7) % 32
    first, second = whole(codec, codes), whole(codec, changed)
    final = 5 * BLOCK - DELAY
    torch.testing.assert_close(first[:final], second[:final], rtol=0, atol=1e-6)
    assert (first[final:] - second[final:]).abs().max() > 1e-3


def test_a_stream_can_begin_again(codec):
    codes = some_codes(6)
    stream = codec.stream()
    first = torch.cat([stream.push(codes), stream.finish()])
    assert torch.equal(torch.cat([stream.push(codes), stream.finish()]), first) and not len(stream.finish())


# what cannot be coded


@pytest.mark.parametrize(
    "wave,message",
    [
        (torch.zeros(1, 100), r"mono floats of shape \[samples\], not torch.float32 \[1, 100\]"),
        (torch.zeros(2, 100), "mono floats of shape"),
        (torch.zeros(100, dtype=torch.int16), "mono floats of shape"),
        (torch.tensor([0.0, float("nan")]), "not finite"),
        (torch.tensor([0.0, float("inf")]), "not finite"),
        (torch.zeros(24_000 * 121), "121 s of audio, but at most 120 s are allowed"),
    ],
)
def test_waveforms_that_cannot_be_encoded(codec, wave, message):
    with pytest.raises(BadSample, match=message):
        codec.encode(wave)


@pytest.mark.parametrize(
    "codes,message",
    [
        (torch.zeros(5, 4, dtype=torch.int64), r"shape \[1 to 4, frames\], not torch.int64 \[5, 4\]"),
        (torch.zeros(0, 4, dtype=torch.int64), r"shape \[1 to 4, frames\]"),
        (torch.zeros(4, dtype=torch.int64), r"shape \[1 to 4, frames\]"),
        (torch.zeros((), dtype=torch.int64), r"shape \[1 to 4, frames\]"),
        (torch.zeros(4, 4), "must be int64"),
        (torch.zeros(4, 4, dtype=torch.int32), "must be int64"),
        (torch.full((4, 4), 32), "go from 32 to 32, but must lie in 0 .. 31"),
        (torch.full((4, 4), -1), "go from -1 to -1"),
        (torch.tensor([[0], [0], [0], [99]]), "go from 0 to 99"),
        (torch.zeros(4, 5000, dtype=torch.int64), "400 s of audio"),
    ],
)
def test_codes_that_cannot_be_decoded(saved, codec, codes, message):
    with pytest.raises(BadSample, match=message):
        codec.decode(codes)
    if codes.ndim == 2 and codes.shape[1] < 5000:
        with pytest.raises(BadSample, match=message):
            KMeansCodec(saved, levels=1).stream().push(codes)


# files


def edit(folder: Path, **changes) -> None:
    path = folder / "codec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"format": "omniloom-kmeans-codec-9"}, "codec.json: format must be 'omniloom-kmeans-codec-1', not"),
        ({"format": None}, "format must be"),
        ({"codebooks": None}, "codebooks must be a whole number from 1 to 64, not None"),
        ({"codebooks": True}, "codebooks must be a whole number"),
        ({"codebook_size": "32"}, "codebook_size must be a whole number from 2 to 65536, not '32'"),
        ({"width": 10**9}, "width must be a whole number from 8 to 2048"),
        ({"layers": 0}, "layers must be a whole number"),
        ({"codebooks": 3}, r"codebooks is F32 \[4, 32, 24\], but codec.json asks for F32 \[3, 32, 24\]"),
        ({"dimensions": 25}, "components is F32"),
        ({"width": 32}, "vocoder..* is F32"),
        ({"layers": 5}, "vocoder.layers.4.* is missing"),
        ({"layers": 3}, "vocoder.layers.3.* is unknown"),
    ],
)
def test_configurations_that_do_not_fit(copied, changes, message):
    edit(copied, **changes)
    with pytest.raises(DataError, match=message) as caught:
        KMeansCodec(copied)
    assert "\n" not in str(caught.value) and str(copied) in str(caught.value)


def test_folders_that_lack_files(copied, tmp_path):
    with pytest.raises(DataError, match="cannot read .*absent/codec.json: give a folder that"):
        KMeansCodec(tmp_path / "absent")
    (copied / "codec.safetensors").unlink()
    with pytest.raises(DataError, match="codec.safetensors is missing"):
        KMeansCodec(copied)
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        (copied / "codec.json").write_bytes(content)
        with pytest.raises(DataError, match="codec.json is not JSON"):
            KMeansCodec(copied)
    (copied / "codec.json").write_text("[1]")
    with pytest.raises(DataError, match="format must be"):
        KMeansCodec(copied)


def test_damaged_weights(copied):
    path = copied / "codec.safetensors"
    payload = path.read_bytes()
    for damaged in (payload[:-100], payload[:4], b"", b"\xff" * 2000):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="codec.safetensors is damaged"):
            KMeansCodec(copied)
    path.write_bytes(payload)
    tensors = load_file(path)
    save_file(tensors | {"more": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="more is unknown"):
        KMeansCodec(copied)
    save_file(tensors | {"mean": tensors["mean"].half()}, path)
    with pytest.raises(DataError, match="mean is F16"):
        KMeansCodec(copied)
    tensors["codebooks"][1, 2, 3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(DataError, match="codebooks holds values that are not finite"):
        KMeansCodec(copied)


def test_saving_leaves_all_or_nothing(saved, tmp_path, monkeypatch):
    codec = KMeansCodec(saved)

    def stop(path: Path, payload: bytes) -> None:
        if path.name == "codec.json":
            raise KeyboardInterrupt
        path.write_bytes(payload)

    monkeypatch.setattr(kmeans_codec, "write_atomically", stop)
    with pytest.raises(KeyboardInterrupt):
        save_codec(tmp_path / "codec", SIZES, codec._quantizer, codec._vocoder, {})
    assert not list(tmp_path.iterdir())


# opening by folder


def test_open_codec_tells_codecs_apart(saved, tmp_path, monkeypatch):
    opened = open_codec(str(saved), levels=3)
    assert isinstance(opened, KMeansCodec) and opened.levels == 3

    class Stub:
        num_codebooks = 16

        def __init__(self, folder: Path, device: str = "cpu") -> None:
            self.folder = folder

    monkeypatch.setattr(data.mimi, "Mimi", Stub)
    (tmp_path / "config.json").write_text('{"model_type": "mimi"}')
    for levels in (None, 16):
        assert isinstance(open_codec(tmp_path, levels), Stub)
    with pytest.raises(DataError, match="levels=4: Mimi in .* decodes all 16 codebooks"):
        open_codec(tmp_path, levels=4)
    monkeypatch.undo()
    (tmp_path / "config.json").write_text('{"model_type": "encodec"}')
    with pytest.raises(DataError, match="model_type must be 'mimi'"):
        open_codec(tmp_path)


@pytest.mark.parametrize("name", ["", "absent"])
def test_open_codec_says_what_is_expected(tmp_path, name):
    with pytest.raises(DataError, match="holds no codec: expected codec.json, .* or Mimi's config.json"):
        open_codec(tmp_path / name)


# parts


def test_log_mel_frames_are_centred_and_start_anywhere():
    wave = speechlike(1.0)
    frames = log_mel(wave)
    assert frames.shape == (100, 80)
    later = log_mel(wave[10 * HOP :])
    torch.testing.assert_close(later[3:], frames[13:], rtol=0, atol=1e-3)
    assert log_mel(torch.zeros(BLOCK)).unique().tolist() == pytest.approx([-6.9078], abs=1e-3)
    click = torch.zeros(100 * HOP)
    click[50 * HOP + HOP // 2] = 1.0
    assert int(log_mel(click).mean(1).argmax()) == 50


def test_a_quantizer_keeps_what_it_was_fitted_to():
    """As many codes as blocks and all dimensions: every block is its own centroid."""
    blocks = log_mel(levelled(speechlike(4))).reshape(-1, BLOCK_VALUES)
    fitted: Quantizer = fit_quantizer(blocks, 1, len(blocks), BLOCK_VALUES, 0, lambda: None)
    codes = fitted.encode(blocks.reshape(-1, 80))
    torch.testing.assert_close(fitted.decode(codes).reshape(-1, BLOCK_VALUES), blocks, rtol=0, atol=1e-3)
    assert perplexities(codes, len(blocks)) == pytest.approx([len(blocks)], rel=1e-6)
    assert perplexities(torch.zeros(1, 9, dtype=torch.int64), 4) == pytest.approx([1.0])


def test_identical_blocks_are_no_obstacle():
    blocks = torch.ones(100, BLOCK_VALUES)
    fitted = fit_quantizer(blocks, 2, 8, 4, 0, lambda: None)
    assert fitted.codebooks_GKD.isfinite().all()
    torch.testing.assert_close(fitted.decode(fitted.encode(blocks.reshape(-1, 80))), torch.ones(800, 80))


def test_training_a_vocoder_lowers_its_loss():
    wave = levelled(speechlike(1.6))
    vocoder = make_vocoder(32, 2, seed=0)
    batch = log_mel(wave)[None], wave[None]
    losses = list(train_vocoder(vocoder, [batch] * 60, 60))
    assert len(losses) == 60 and losses[-1] < 0.75 * losses[0]
    assert float(spectral_loss(batch[1], batch[1])) == 0.0 and not vocoder.training


def test_untrained_vocoders_follow_the_seed_and_nothing_else():
    torch.manual_seed(5)
    first, drawn = make_vocoder(16, 1, seed=3), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn), "torch's own random state moved"
    same, other = make_vocoder(16, 1, seed=3), make_vocoder(16, 1, seed=4)
    assert torch.equal(first.leave.weight, same.leave.weight) and not torch.equal(
        first.leave.weight, other.leave.weight
    )
