"""Answers in text and voice: transformers' greedy `generate()` token for token and code for code, and what streams."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from models.code2wav import Code2Wav
from models.config import ConfigError
from models.omni import Omni
from models.omni_config import Code2WavConfig
from models.sampling import Sampling
from models.speak import SpeakSettings, Spoken, speak, user_positions
from models.talker_inputs import user_rows
from tests.models import random_model as r
from tests.models import random_speech as s

pytest.importorskip("transformers")
GREEDY = {"text": Sampling(), "first_code": Sampling(), "residual_codes": Sampling()}


@dataclass
class Prompt:
    token_ids_T: torch.Tensor
    position_ids_3T: torch.Tensor
    doc_lengths: tuple[int, ...]
    mel_FM: torch.Tensor
    mel_lengths: tuple[int, ...]
    pixels_PX: torch.Tensor
    grids: tuple[tuple[int, int, int], ...]


def build(seed, kinds):
    config = s.random_omni_config(seed)
    reference = s.reference_omni(config, seed)
    reference.talker.codec_head.weight.data[config.talker.codec_eos_token_id] = 0  # it seldom ends
    ours = Omni(config).eval()
    ours.thinker.load_state_dict(r.our_names(reference.thinker.state_dict()))
    assert ours.talker is not None
    ours.talker.load_state_dict(reference.talker.state_dict())
    sample = s.random_conversation(seed, config, kinds)
    inputs = r.reference_inputs(sample)
    positions = r.reference_positions(reference.thinker, inputs)
    positional, keywords = r.packed([sample], [positions], config.thinker)
    return config, reference, ours, inputs, Prompt(*positional, **keywords)


def with_wave(omni, seed):
    """The same model with a small waveform decoder of random weights."""
    talker = omni.config.talker
    wave = Code2WavConfig(talker.code_predictor.vocab_size, talker.num_code_groups, 8, 12, 1, 2, 1, decoder_dim=16)
    whole = Omni(replace(omni.config, code2wav=wave))
    torch.manual_seed(seed)
    whole.code2wav = Code2Wav(wave)
    whole.thinker, whole.talker = omni.thinker, omni.talker
    for parameter in whole.code2wav.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    return whole.eval()


def tokens_of(pieces: list[Spoken]) -> list[int]:
    return [piece.token for piece in pieces if piece.token is not None]


def codes_of(pieces: list[Spoken]) -> torch.Tensor:
    return torch.cat([piece.codes_GT for piece in pieces if piece.codes_GT is not None], dim=1)


@pytest.mark.parametrize("seed,kinds", [(seed, ("", "a", "i", "v", "ai", "va")[seed % 6]) for seed in range(12)])
def test_equal_to_transformers(seed, kinds):
    _, reference, ours, inputs, prompt = build(seed, kinds)
    heard = []
    reference.code2wav.chunked_decode = lambda codes, **_: heard.append(codes) or torch.zeros(1, 1, 8)
    penalty = 1.0 if seed % 2 else 1.3
    sequences, _ = reference.generate(
        **inputs,
        speaker="Ethan",
        thinker_max_new_tokens=7,
        thinker_eos_token_id=None,
        thinker_do_sample=False,
        thinker_suppress_tokens=[r.AUDIO, r.IMAGE, r.VIDEO],
        talker_do_sample=False,
        talker_repetition_penalty=penalty,
        talker_max_new_tokens=12,
    )
    settings = {"max_new_tokens": 6, "max_frames": 12, "packet_frames": 5}  # theirs never speaks its last token
    settings |= GREEDY | {"first_code": Sampling(repetition_penalty=penalty)}
    ours.config = replace(ours.config, im_end_token_id=r.AUDIO)  # never drawn: as without an end
    pieces = list(speak(ours, prompt, SpeakSettings("ethan", **settings)))
    assert tokens_of(pieces) == sequences[0, len(prompt.token_ids_T) : -1].tolist()
    assert torch.equal(codes_of(pieces)[:, : heard[0].shape[2]], heard[0][0])
    assert codes_of(pieces).shape[1] - heard[0].shape[2] in (0, 1)  # theirs ends a frame early at its limit


def test_sound_leaves_before_the_text_is_complete():
    _, _, ours, _, prompt = build(1, "a")
    whole = with_wave(ours, 0)
    settings = SpeakSettings("chelsie", max_new_tokens=30, max_frames=20, packet_frames=2, **GREEDY)
    pieces = list(speak(whole, prompt, settings))
    first_sound = next(i for i, piece in enumerate(pieces) if piece.wave_S is not None)
    assert len(tokens_of(pieces[:first_sound])) == 2 < len(tokens_of(pieces))
    codes = codes_of(pieces)
    wave = torch.cat([piece.wave_S for piece in pieces if piece.wave_S is not None])
    assert codes.shape[1] == 20
    torch.testing.assert_close(wave, whole.code2wav(codes.unsqueeze(0))[0], atol=1e-4, rtol=0)


def test_the_talker_may_read_another_conversation():
    """Another system prompt, rewritten text: the answer's text stays, the voice follows what the Talker read."""
    config, _, ours, _, prompt = build(4, "a")
    settings = SpeakSettings("ethan", max_new_tokens=8, max_frames=8, **GREEDY)
    plain = list(speak(ours, prompt, settings))
    ids, positions = prompt.token_ids_T, prompt.position_ids_3T
    own = user_positions(config, ids, positions)
    same = list(speak(ours, prompt, settings, talker_ids_S=ids, talker_positions_3U=own))
    assert torch.equal(codes_of(plain), codes_of(same))
    system = torch.tensor(s.turn(s.SYSTEM, 40, 41, 42))  # the Talker leaves system prompts out
    told = list(speak(ours, prompt, settings, talker_ids_S=torch.cat([system, ids]), talker_positions_3U=own))
    assert torch.equal(codes_of(plain), codes_of(told))
    rewritten = torch.where(ids >= r.FIRST_TEXT + 1, 50, ids)
    other = list(speak(ours, prompt, settings, talker_ids_S=rewritten, talker_positions_3U=own))
    assert tokens_of(other) == tokens_of(plain) and not torch.equal(codes_of(plain), codes_of(other))


@pytest.mark.parametrize("seed", range(12))
def test_user_positions_are_those_of_the_user_segments_alone(seed):
    """As transformers counts them on the user's ids."""
    config = s.random_omni_config(seed)
    reference = s.reference_omni(config, seed)
    sample = s.random_conversation(seed, config, ("aiv", "v", "ia")[seed % 3])
    inputs = r.reference_inputs(sample)
    ids = inputs["input_ids"][0]
    positions = r.reference_positions(reference.thinker, inputs)
    alone = inputs | {"input_ids": ids[user_rows(config, ids)].unsqueeze(0)}
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    want = r.reference_positions(reference.thinker, alone)
    torch.testing.assert_close(user_positions(config, ids, positions), want, atol=1e-5, rtol=0)


def test_sampling_repeats_with_its_seed():
    _, _, ours, _, prompt = build(2, "a")
    settings = SpeakSettings("ethan", max_new_tokens=8, max_frames=8, text=Sampling(temperature=1.0))
    runs = [list(speak(ours, prompt, settings, generator=torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    assert tokens_of(runs[0]) == tokens_of(runs[1]) != tokens_of(runs[2])
    assert torch.equal(codes_of(runs[0]), codes_of(runs[1]))


def test_says_what_is_wrong():
    _, _, ours, _, prompt = build(0, "")
    with pytest.raises(ConfigError, match="speaker 'nobody' is unknown: this model has chelsie, ethan"):
        next(speak(ours, prompt, SpeakSettings("nobody")))
    with pytest.raises(ConfigError, match="max_frames"):
        SpeakSettings("ethan", max_frames=0)
    ours.talker = None
    with pytest.raises(ConfigError, match="no talker"):
        next(speak(ours, prompt, SpeakSettings("ethan")))
