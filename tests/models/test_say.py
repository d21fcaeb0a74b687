"""Given text in a given voice: as `speak` says it, together as one by one, and what the Talker's own text changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from models.config import ConfigError
from models.omni import Omni
from models.sampling import Sampling
from models.say import SaySettings, Voice, answer_ids, say, user_positions
from models.speak import SpeakSettings, speak
from tests.models import random_model as r
from tests.models import random_speech as s

GREEDY = SaySettings(10, Sampling(), Sampling())


@dataclass
class Pack:
    token_ids_T: torch.Tensor
    position_ids_3T: torch.Tensor
    doc_lengths: tuple[int, ...]
    mel_FM: torch.Tensor
    mel_lengths: tuple[int, ...]
    pixels_PX: torch.Tensor
    grids: tuple[tuple[int, int, int], ...]


def build(seed: int = 3, kinds: tuple[str, ...] = ("ai", "", "v"), texts: tuple[int, ...] = (5, 2, 9)):
    """A random model, a pack of conversations that end with texts of so many tokens, and each of them alone."""
    config = s.random_omni_config(seed)
    omni = Omni(config)
    r.randomize(omni, seed)
    omni.train(False).requires_grad_(False)
    assert omni.talker is not None
    omni.talker.codec_head.weight.data[config.talker.codec_eos_token_id] = 0  # it seldom ends
    samples = []
    for place, (kind, length) in enumerate(zip(kinds, texts, strict=True)):
        sample = s.random_conversation(seed + place, config, kind)
        sample.ids = [*sample.ids, *(r.FIRST_TEXT + 2 + place + step for step in range(length))]
        samples.append(sample)
    return omni, pack(samples, config), [pack([sample], config) for sample in samples]


def pack(samples, config) -> Pack:
    positions = [torch.arange(len(sample.ids)).float().expand(3, -1) for sample in samples]
    positional, keywords = r.packed(samples, positions, config.thinker)
    return Pack(*positional, **keywords)


def assert_same(codes, expected):
    assert [tuple(each.shape) for each in codes] == [tuple(each.shape) for each in expected]
    assert all(torch.equal(one, other) for one, other in zip(codes, expected, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_together_as_one_by_one(seed):
    omni, together, alone = build(seed)
    codes = say(omni, together, ["ethan", "chelsie", "ethan"], GREEDY)
    singles = [
        say(omni, one, [name], GREEDY)[0] for one, name in zip(alone, ["ethan", "chelsie", "ethan"], strict=True)
    ]
    assert_same(codes, singles)
    assert codes[0].shape == (omni.config.talker.num_code_groups, 10) and codes[0].dtype is torch.int64


def test_voices_differ():
    """Random weights may well choose the same codes, but not from the same states."""
    omni, prompt, _ = build(0, ("",), (4,))
    conversation = prompt.token_ids_T, user_positions(omni.config, prompt.token_ids_T, prompt.position_ids_3T)
    none_MH = torch.empty(0, omni.config.thinker.text.hidden_size)
    states = [Voice(omni, none_MH, [conversation], [name], GREEDY, None).hidden_ND for name in ("ethan", "chelsie")]
    assert (states[0] - states[1]).abs().max() > 1e-4


def test_who_has_ended_waits_for_the_others():
    """One document ends in the middle of the others' speech, which goes on as if it were not there."""
    omni, together, alone = build(1, ("a", "", "a"))
    names, head = ["ethan"] * 3, omni.talker.codec_head.weight.data
    endless = say(omni, together, names, GREEDY)
    only = [code for code in endless[1][0].tolist() if code not in endless[0][0]]
    head[omni.config.talker.codec_eos_token_id] = 1.01 * head[only[-1]]
    codes = say(omni, together, names, GREEDY)
    assert len({each.shape[1] for each in codes}) > 1, "nobody ended early"
    assert_same(codes, [say(omni, one, ["ethan"], GREEDY)[0] for one in alone])


@pytest.mark.parametrize("seed,kind", [(0, "a"), (1, ""), (2, "iv")])
def test_says_what_speak_says(seed, kind):
    omni, prompt, _ = build(seed, (kind,), (0,))
    settings = SpeakSettings("ethan", 6, 10, 4, Sampling(), GREEDY.first_code, GREEDY.residual_codes)
    pieces = list(speak(omni, prompt, settings))
    tokens = [piece.token for piece in pieces if piece.token is not None]
    spoken = torch.cat([piece.codes_GT for piece in pieces if piece.codes_GT is not None], dim=1)
    ids = torch.cat([prompt.token_ids_T, torch.tensor([*tokens, omni.config.im_end_token_id, s.NEW_LINE])])
    (codes,) = say(omni, prompt, ["ethan"], GREEDY, talker_ids=[ids])
    assert torch.equal(codes, spoken)


def test_follows_the_text_that_the_talker_is_given():
    omni, prompt, _ = build(2, ("a",), (4,))
    ids = prompt.token_ids_T
    (plain,) = say(omni, prompt, ["ethan"], GREEDY)
    told = torch.cat([torch.tensor(s.turn(s.SYSTEM, 40, 41)), ids])  # the Talker leaves system prompts out
    assert torch.equal(say(omni, prompt, ["ethan"], GREEDY, talker_ids=[told])[0], plain)
    other = torch.cat([ids[:-4], ids[-4:].flip(0)])
    assert not torch.equal(say(omni, prompt, ["ethan"], GREEDY, talker_ids=[other])[0], plain)
    louder = replace(prompt, mel_FM=prompt.mel_FM + 1.0)
    assert not torch.equal(say(omni, louder, ["ethan"], GREEDY)[0], plain), "the Thinker's media reach it"


def test_text_of_a_conversation():
    config = s.random_omni_config(0)
    first, last = s.turn(s.ASSISTANT, 40, 41), s.turn(s.ASSISTANT, 50, 51, 52)
    conversation = [*s.turn(s.USER, 60), *first, *s.turn(s.USER, 61), *last]
    assert answer_ids(config, torch.tensor(conversation)) == [50, 51, 52]
    assert answer_ids(config, torch.tensor(conversation[:-2])) == [50, 51, 52]
    assert answer_ids(config, torch.tensor(conversation[:-5])) == []
    assert answer_ids(config, torch.tensor(s.turn(s.USER, 60))) == []


def test_draws_repeat_with_their_seed():
    omni, together, _ = build()
    settings, names = SaySettings(8, Sampling(1.0), Sampling(1.0)), ["ethan"] * 3
    runs = [say(omni, together, names, settings, generator=torch.Generator().manual_seed(n)) for n in (0, 0, 1)]
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_says_what_is_wrong():
    omni, together, _ = build()
    with pytest.raises(ConfigError, match="speaker 'nobody' is unknown: this model has chelsie, ethan"):
        say(omni, together, ["ethan", "nobody", "ethan"], GREEDY)
    with pytest.raises(ValueError, match="3 conversations, 3 for the Talker, 1 speakers"):
        say(omni, together, ["ethan"], GREEDY)
    with pytest.raises(ValueError, match="ends with nothing to say"):
        say(omni, build(texts=(5, 0, 2))[1], ["ethan"] * 3, GREEDY)
    with pytest.raises(ConfigError, match="max_frames must be at least 1"):
        SaySettings(0)
    nothing = Pack(
        torch.empty(0, dtype=torch.int64), torch.empty(3, 0), (), torch.empty(0, 128), (), torch.empty(0, 0), ()
    )
    assert say(omni, nothing, [], GREEDY) == []
    omni.talker = None
    with pytest.raises(ConfigError, match="no talker"):
        say(omni, together, ["ethan"] * 3, GREEDY)
