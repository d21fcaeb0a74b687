"""The Mimi codec on a tiny random model: which codes, how many, and what happens to folders that do not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from data.codec import Codec
from data.errors import BadSample, DataError
from data.mimi import Mimi

transformers = pytest.importorskip("transformers")
HOP = 24  # 4 * 3 * 2 samples of a frame


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model of 20 codebooks with random weights and codebooks."""
    config = transformers.MimiConfig(
        hidden_size=16,
        num_filters=2,
        upsampling_ratios=[4, 3],
        codebook_size=32,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        num_quantizers=20,
        num_hidden_layers=1,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        upsample_groups=16,
        sliding_window=10,
    )
    torch.manual_seed(0)
    model = transformers.MimiModel(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("embed_sum"):
                tensor.normal_()
            elif name.endswith("bias"):
                tensor.normal_(0.0, 0.1)
            elif "scale" in name:
                tensor.fill_(0.5)
    folder = tmp_path_factory.mktemp("mimi")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mimi(saved) -> Mimi:
    return Mimi(saved)


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def wave(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def test_encode_gives_the_first_16_codebooks(saved, mimi):
    model = transformers.MimiModel.from_pretrained(saved)
    want = model.encode(wave(1000)[None, None]).audio_codes[0]
    codes = mimi.encode(wave(1000))
    assert want.shape == (20, 42)
    assert codes.dtype is torch.int64 and torch.equal(codes, want[:16])
    assert all(len(row.unique()) > 3 for row in codes), "the test's codebooks are not used"


@pytest.mark.parametrize("samples", [0, 1, HOP - 1, HOP, HOP + 1, 5 * HOP, 999])
def test_lengths(mimi, samples):
    codes = mimi.encode(wave(samples))
    frames = -(-samples // HOP)
    assert codes.shape == (16, frames)
    heard = mimi.decode(codes)
    assert heard.dtype is torch.float32 and heard.shape == (frames * HOP,) and heard.isfinite().all()


def test_decode_is_that_of_transformers(saved, mimi):
    model = transformers.MimiModel.from_pretrained(saved)
    codes = torch.randint(0, 32, (16, 30), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mimi.decode(codes), model.decode(codes[None]).audio_values[0, 0], rtol=0, atol=0)


def test_many_are_encoded_as_each_alone(mimi):
    """Padding to the longest would not do: it changes the last frame of a shorter one."""
    waves = [wave(500, 1), wave(130, 2), wave(0), wave(77, 3)]
    assert all(torch.equal(codes, mimi.encode(wave)) for codes, wave in zip(mimi.encode_all(waves), waves, strict=True))
    padded = mimi.encode(torch.cat([waves[1], torch.zeros(370)]))
    alone = mimi.encode(waves[1])
    assert torch.equal(padded[:, :4], alone[:, :4]) and not torch.equal(padded[:, : alone.shape[1]], alone)


def test_is_a_codec(mimi):
    codec: Codec = mimi
    assert (codec.sample_rate, codec.num_codebooks, codec.codebook_size) == (24_000, 16, 32)
    assert codec.frame_rate == 24_000 / HOP and mimi.samples_per_frame == HOP


def test_identity_follows_the_weights(saved, mimi, copied):
    assert mimi.identity == Mimi(saved).identity
    kind, digest, codebooks = mimi.identity.split("/")
    assert (kind, len(digest), codebooks) == ("mimi", 16, "16")
    path = copied / "model.safetensors"
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(payload)
    assert Mimi(copied).identity != mimi.identity


@pytest.mark.parametrize(
    "wave,message",
    [
        (torch.zeros(1, 100), "mono floats of shape"),
        (torch.zeros(100, dtype=torch.int16), "mono floats of shape"),
        (torch.tensor([0.0, float("nan")]), "not finite"),
        (torch.zeros(24_000 * 121), "121 s of audio, but at most 120 s are allowed"),
    ],
)
def test_waveforms_that_cannot_be_encoded(mimi, wave, message):
    with pytest.raises(BadSample, match=message):
        mimi.encode(wave)


@pytest.mark.parametrize(
    "codes,message",
    [
        (torch.zeros(15, 4, dtype=torch.int64), r"shape \[16, frames\], not torch.int64 \[15, 4\]"),
        (torch.zeros(16, 4), "must be int64"),
        (torch.full((16, 4), 32), "go from 32 to 32, but must lie in 0 .. 31"),
        (torch.full((16, 4), -1), "go from -1 to -1"),
        (torch.zeros(16, 400_000, dtype=torch.int64), "400 s of audio"),
    ],
)
def test_codes_that_cannot_be_decoded(mimi, codes, message):
    with pytest.raises(BadSample, match=message):
        mimi.decode(codes)


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model_type": "encodec"}, "model_type must be 'mimi'"),
        ({"sampling_rate": 16_000}, "sampling_rate must be 24000, not 16000"),
        ({"audio_channels": 2}, "audio_channels must be 1, not 2"),
        ({"num_quantizers": 8}, "num_quantizers must be 16 or more, not 8"),
        ({"num_quantizers": "many"}, "num_quantizers must be 16 or more, not many"),
        ({"hidden_size": 32}, "cannot load the Mimi model in"),
        ({"num_quantizers": 24}, "lacks quantizer.acoustic"),
    ],
)
def test_configurations_that_do_not_fit(copied, changes, message):
    edit(copied, **changes)
    with pytest.raises(DataError, match=message) as caught:
        Mimi(copied)
    assert "\n" not in str(caught.value)


def test_folders_that_lack_files(copied, tmp_path):
    with pytest.raises(DataError, match="absent/config.json: give the local folder"):
        Mimi(tmp_path / "absent")
    (copied / "model.safetensors").unlink()
    with pytest.raises(DataError, match="model.safetensors is missing"):
        Mimi(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(DataError, match="config.json is not JSON"):
        Mimi(copied)


def test_damaged_weights(copied):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot load the Mimi model in"):
        Mimi(copied)


def test_without_transformers(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r'needs transformers: pip install "omniloom\[mimi\]"'):
        Mimi(saved)
