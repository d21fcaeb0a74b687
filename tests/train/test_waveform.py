"""Training the waveform decoder: what is scored, that splits do not matter, and that it learns real voices."""

from __future__ import annotations

import io
import math
import tarfile
from pathlib import Path

import pytest
import soundfile
import soxr
import torch

from models.code2wav import Code2Wav
from models.init import init_weights
from models.omni_config import Code2WavConfig
from tests.models.test_code2wav import TINY, tiny
from train.adversary import Adversary, AdversaryConfig
from train.errors import RecipeError
from train.waveform import WaveformObjective, WaveformWeights, train_step
from train.waveform_loss import Segments, SpectralConfig, crop, join, no_segments

RATE = TINY.samples_per_frame
DIGITS = Path(__file__).parents[2] / "../shared/data/fsdd_dev.tar"
SPECTRAL = SpectralConfig(((256, 16), (64, 6)), floor=1e-3)
ADVERSARY = AdversaryConfig((2, 3), (4, 8), (64,), 4)


def utterance(frames, seed):
    generator = torch.Generator().manual_seed(seed)
    codes_GT = torch.randint(0, TINY.codebook_size, (TINY.num_quantizers, frames), generator=generator)
    return codes_GT, 0.1 * torch.randn(frames * RATE - 100 * (seed % 3), generator=generator)


def some_segments(count=3, frames=3, context=2):
    generator = torch.Generator().manual_seed(1)
    return [
        crop(*utterance(2 + 2 * i, i), frames, generator, context=context, samples_per_frame=RATE) for i in range(count)
    ]


def test_scored_samples_are_those_of_the_whole_decode():
    """With the whole past as context, decoded pieces equal the same samples of one decode; context is not scored."""
    model = tiny()
    objective = WaveformObjective(model, SPECTRAL)
    codes_GT, wave_S = utterance(9, 0)
    whole_S = model(codes_GT[None])[0]
    pieces = [
        Segments(codes_GT[:, :stop], wave_S[RATE * start : RATE * stop], (stop,), (start,), (RATE * (stop - start),))
        for start, stop in ((0, 4), (3, 9), (7, 8))
    ]
    lengths = objective.lengths(join(pieces))
    assert lengths == [RATE * 4 - 555, RATE * 6 - 555, RATE - 555]
    real_S, fake_S = objective.waves(join(pieces))
    starts = (0, 3 * RATE, 7 * RATE)
    want_real_S, want_fake_S = (
        torch.cat([x_S[start : start + n] for start, n in zip(starts, lengths, strict=True)])
        for x_S in (wave_S, whole_S)
    )
    assert torch.equal(real_S, want_real_S)
    torch.testing.assert_close(fake_S, want_fake_S, atol=1e-5, rtol=1e-5)


def test_the_end_of_an_utterance_is_scored_to_its_last_sample():
    """The codec filled the last frame up; that is not scored."""
    codes_GT, wave_S = utterance(3, 0)
    segment = crop(codes_GT, wave_S[: 2 * RATE + 10], 3, None, samples_per_frame=RATE)
    objective = WaveformObjective(tiny(), SPECTRAL)
    assert objective.lengths(segment) == [2 * RATE + 10]
    short = crop(codes_GT[:, :1], wave_S[:600], 3, None, samples_per_frame=RATE)
    assert objective.lengths(short) == [600] and len(objective.waves(short)[1]) == 600


@pytest.mark.parametrize("hostile", [False, True])
def test_any_split_gives_the_same_step(hostile):
    """One micro-batch, one a segment, and one with nothing: the same means and the same weights after a step."""
    segments = some_segments()
    splits = [[join(segments)], segments, [join(segments[:2]), no_segments(TINY.num_quantizers), segments[2]]]
    ends, means = [], []
    for micro_batches in splits:
        model, adversary = tiny(), Adversary(ADVERSARY) if hostile else None
        optimizers = [torch.optim.SGD(m.parameters(), 1e-3) for m in (model, adversary) if m is not None]
        objective = WaveformObjective(model, SPECTRAL)
        others = (adversary, optimizers[1]) if adversary is not None else ()
        means.append(train_step(objective, micro_batches, optimizers[0], WaveformWeights(), *others))
        ends.append(model.state_dict() | (adversary.state_dict() if adversary is not None else {}))
    names = {"stft_linear", "stft_log", "mel", "loss"}
    assert set(means[0]) == names | ({"adversarial", "matching", "discriminator"} if hostile else set())
    before = tiny().state_dict()
    assert not all(torch.equal(before[name], ends[0][name]) for name in before)
    for end, mean in zip(ends[1:], means[1:], strict=True):
        assert mean == pytest.approx(means[0], rel=1e-4)
        for name, value in ends[0].items():
            torch.testing.assert_close(end[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_nothing_to_score_gives_zero_gradients():
    objective, adversary = WaveformObjective(tiny(), SPECTRAL), Adversary(ADVERSARY)
    sums = objective(no_segments(TINY.num_quantizers), adversary)
    WaveformWeights().share(sums, 0).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_weights():
    sums = {name: torch.tensor(10.0**i) for i, name in enumerate(("stft_linear", "stft_log", "mel", "matching"))}
    weights = WaveformWeights(stft_linear=1, stft_log=2, mel=3, matching=4)
    assert float(weights.share(sums, 2)) == (1 + 20 + 300 + 4000) / 2
    with pytest.raises(RecipeError, match="weights.mel must not be below 0"):
        WaveformWeights(mel=-1)


def digits(seconds):
    """Real voices at 24 kHz, one level, end to end."""
    parts, total = [], 0
    with tarfile.open(DIGITS) as tar:
        for name in sorted(name for name in tar.getnames() if name.endswith("_0.wav")):
            member = tar.extractfile(name)
            assert member is not None
            wave, rate = soundfile.read(io.BytesIO(member.read()), dtype="float32")
            parts.append(torch.from_numpy(soxr.resample(wave, rate, 24_000)))
            parts[-1] *= 0.08 / parts[-1].square().mean().sqrt()
            total += len(parts[-1])
            if total > seconds * 24_000:
                break
    return torch.cat(parts)[: int(seconds * 24_000)]


def chords(seconds):
    """A new chord of three tones every 0.4 s."""
    at = torch.arange(int(seconds * 24_000)) / 24_000
    roots = 110 * 2 ** (
        torch.randint(0, 24, (int(seconds / 0.4) + 1,), generator=torch.Generator().manual_seed(0)) / 12
    )
    root = roots[(at / 0.4).long()]
    return 0.05 * sum((2 * math.pi * root * ratio * at).sin() for ratio in (1, 1.25, 1.5))


def quantize(wave_S, groups=8, levels=16):
    """Codes [groups, frames]: the logarithmic energy of each of `groups` bands, in `levels` equal steps."""
    padded = torch.nn.functional.pad(wave_S, (0, -len(wave_S) % 1920)).view(-1, 1920)
    power = torch.fft.rfft(padded).abs().square()
    edges = torch.logspace(math.log10(4), math.log10(961), groups + 1).long()
    bands = zip(edges[:-1], edges[1:], strict=True)
    energy_GT = torch.stack([power[:, a:b].mean(1).clamp(min=1e-4).log() for a, b in bands])
    low, high = energy_GT.amin(1, keepdim=True), energy_GT.amax(1, keepdim=True)
    return ((energy_GT - low) / (high - low + 1e-6) * levels).long()


def learn(wave_S, steps, hostile=False):
    """Mel distances: means of the first and the last tenth of the steps, then of all the sound with shuffled codes."""
    config = Code2WavConfig(16, 8, 64, 128, 2, 2, 2, decoder_dim=64, sliding_window=8)
    model = Code2Wav(config)
    init_weights(model, seed=0)
    objective = WaveformObjective(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.8, 0.99))
    others = ()
    if hostile:
        adversary = Adversary(AdversaryConfig((2, 5), (8, 16, 32), (512,), 8))
        others = adversary, torch.optim.AdamW(adversary.parameters(), lr=5e-4, betas=(0.8, 0.99))
    codes_GF, generator, mels = quantize(wave_S), torch.Generator().manual_seed(0), []
    for _ in range(steps):
        segments = join([crop(codes_GF, wave_S, 8, generator, context=4) for _ in range(4)])
        mels.append(train_step(objective, [segments], optimizer, WaveformWeights(), *others)["mel"])
    shuffled_GF = codes_GF[:, torch.randperm(codes_GF.shape[1], generator=generator)]
    whole = crop(shuffled_GF, wave_S, codes_GF.shape[1], None)
    with torch.no_grad():
        wrong = float(objective(whole)["mel"]) / sum(objective.lengths(whole))
    tenth = max(1, steps // 10)
    return sum(mels[:tenth]) / tenth, sum(mels[-tenth:]) / tenth, wrong


def test_it_learns_chords():
    first, last, _ = learn(chords(3), 12)
    assert last < 0.5 * first, (first, last)


@pytest.mark.slow
@pytest.mark.parametrize("hostile, steps", [(False, 200), (True, 120)])
def test_it_learns_real_voices(hostile, steps):
    """The mel distance of 4 s of digits falls below a third of its start, and wrong codes sound wrong."""
    if not DIGITS.exists():
        pytest.skip("../shared/data/fsdd_dev.tar is absent: chords are learned instead, in another test")
    first, last, wrong = learn(digits(4), steps, hostile)
    assert last < first / 3 and last < 0.75 * wrong, (first, last, wrong)
