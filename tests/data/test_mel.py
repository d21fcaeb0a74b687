"""Log-mel against transformers' feature extractor on real speech, and on clips of any length."""

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data.audio import SAMPLE_RATE, decode
from data.errors import BadSample
from data.mel import NUM_MELS, log_mel, mel_filters, num_frames

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared with real recordings is absent")


@pytest.fixture(scope="module")
def extractor():
    transformers = pytest.importorskip("transformers")
    return transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=300, n_fft=400, hop_length=160)


def theirs(extractor, wave: np.ndarray) -> torch.Tensor:
    """As Qwen3-Omni's processor calls it: float32 [F, M]."""
    settings = {"padding": True, "truncation": False, "return_attention_mask": True, "return_tensors": "pt"}
    out = extractor(wave, sampling_rate=SAMPLE_RATE, **settings)
    return out["input_features"][0].T[: int(out["attention_mask"].sum())]


@needs_shared
def test_equals_transformers_on_a_speech(extractor) -> None:
    wave = decode((SHARED / "media/jfk.flac").read_bytes())
    for length in (len(wave), 16_001, 400):
        ours = log_mel(wave[:length])
        assert ours.shape == (length // 160, NUM_MELS) and ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs(extractor, wave[:length]), atol=1e-4, rtol=0)


@needs_shared
def test_equals_transformers_on_digits(extractor) -> None:
    with tarfile.open(SHARED / "fsdd_dev.tar", "r:") as tar:
        for info in list(tar)[::100]:
            file = tar.extractfile(info)
            assert file is not None
            wave = decode(file.read())
            torch.testing.assert_close(log_mel(wave), theirs(extractor, wave), atol=1e-4, rtol=0)


def test_equals_transformers_on_noise_and_silence(extractor) -> None:
    wave = np.random.default_rng(0).standard_normal(16_000 * 35).astype(np.float32)  # past Whisper's 30 s
    for clip in (wave, wave[:5_000] * 1e-4, np.zeros(3_200, np.float32)):
        torch.testing.assert_close(log_mel(clip), theirs(extractor, clip), atol=1e-4, rtol=0)


def test_filters_equal_transformers() -> None:
    audio_utils = pytest.importorskip("transformers.audio_utils")
    reference = audio_utils.mel_filter_bank(201, 128, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters().numpy(), reference.T, atol=1e-7)


def test_blocks_change_nothing() -> None:
    wave = np.random.default_rng(1).standard_normal(160 * 777 + 55).astype(np.float32)
    whole = log_mel(wave, block_frames=1 << 30)
    for block_frames in (1, 100, 776, 777):
        torch.testing.assert_close(log_mel(wave, block_frames), whole, atol=1e-6, rtol=0)


def test_forty_minutes_are_never_cut() -> None:
    samples = SAMPLE_RATE * 60 * 40
    wave = np.random.default_rng(2).standard_normal(samples, dtype=np.float32) * 0.1
    wave[: samples // 2] *= 1e-3
    mel = log_mel(wave)
    assert mel.shape == (240_000, NUM_MELS) == (num_frames(samples), NUM_MELS)
    assert float(mel.min()) >= float(mel.max()) - 8.0 / 4.0 - 1e-6
    tail = log_mel(wave[samples // 2 :])  # same maximum, so the last 20 minutes are as they are alone
    torch.testing.assert_close(mel[-1_000:], tail[-1_000:], atol=1e-5, rtol=0)


def test_memory_of_forty_minutes_is_bounded() -> None:
    """An STFT of the whole would hold 390 MB of complex numbers and as much again of power."""
    program = (
        "import resource, numpy as np; from data.mel import log_mel\n"
        "log_mel(np.zeros(16000, np.float32)); wave = np.ones(16000 * 2400, np.float32)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak(); mel = log_mel(wave); print(peak() - before)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 117 + 24  # the result, and the blocks


def test_clamp_is_the_clips_own() -> None:
    quiet = np.zeros(16_000, np.float32)
    quiet[8_000:] = 1e-3 * np.sin(np.arange(8_000) * 0.3)
    loud = quiet * 1000
    assert float(log_mel(quiet).max() - log_mel(quiet).min()) <= 2.0 + 1e-6
    assert float(log_mel(loud).min()) > float(log_mel(quiet).min())


def test_too_short() -> None:
    with pytest.raises(BadSample, match="399 samples, log-mel needs at least 400"):
        log_mel(np.zeros(399, np.float32))
