"""Position ids against transformers' on random documents, bit for bit; placeholder runs against its processor's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from models.audio_encoder import num_audio_tokens
from models.positions import (
    Audio,
    Image,
    MediaTokens,
    Segment,
    Text,
    Video,
    VideoWithAudio,
    document_positions,
    lay_out,
    next_positions,
    num_tokens,
    pack_positions,
    read_segments,
    text_audio_positions,
    token_positions,
)

TOKENS = MediaTokens(audio=5, image=6, video=7, audio_start=8, audio_end=9, vision_start=10, vision_end=11)
FIRST_TEXT = 20
EVEN = (0.5, 1.0, 2.0, 0.25, 3.0, 1.5)  # seconds whose ids have short binary fractions
UNEVEN = (0.1, 0.4, 2 / 3, 2 / 12.5, 1 / 6.5, 2 / 15, 2 / 29.97, 0.7, 1.234567)


def reference_positions(
    token_ids_T: Tensor, media: Sequence[tuple[Segment, int]], use_audio_in_video: bool
) -> tuple[Tensor, float]:
    """What transformers' get_rope_index gives, and its delta. `media` are segments and mel frames of each."""
    modeling = pytest.importorskip("transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe")
    owner = modeling.Qwen3OmniMoePreTrainedModelForConditionalGeneration
    config = SimpleNamespace(
        image_token_id=TOKENS.image,
        video_token_id=TOKENS.video,
        audio_token_id=TOKENS.audio,
        vision_start_token_id=TOKENS.vision_start,
        audio_start_token_id=TOKENS.audio_start,
        position_id_per_seconds=13,
        audio_config=SimpleNamespace(n_window=50),
    )
    model = SimpleNamespace(config=config, spatial_merge_size=2)
    model.get_llm_pos_ids_for_vision = MethodType(owner.get_llm_pos_ids_for_vision, model)
    images = [s.grid for s, _ in media if type(s) is Image]
    videos = [s for s, _ in media if isinstance(s, Video)]
    mel = [frames for _, frames in media if frames]
    positions, delta = owner.get_rope_index(
        model,
        token_ids_T[None],
        torch.tensor(images) if images else None,
        torch.tensor([v.grid for v in videos]) if videos else None,
        torch.ones(1, len(token_ids_T)),
        use_audio_in_video,
        torch.tensor(mel) if mel else None,
        torch.tensor([v.seconds for v in videos]) if videos else None,
    )
    return positions[:, 0].float(), delta.item()


def random_media(rng: random.Random, seconds: Sequence[float], with_audio: bool) -> tuple[Segment, int]:
    """An audio clip, an image, or a video, with sound if `with_audio`; and its mel frames."""
    kind, frames = rng.choice("aiv"), rng.choice((rng.randint(1, 99), 100 * rng.randint(1, 4), rng.randint(101, 900)))
    sides = 2 * rng.randint(1, 5), 2 * rng.randint(1, 5)
    if kind == "a":
        return Audio(num_audio_tokens(frames)), frames
    if kind == "i":
        return Image((rng.choice((1, 1, 1, 3)), *sides)), 0
    grid, step = (rng.randint(1, 12), *sides), rng.choice(seconds)
    if with_audio:
        return VideoWithAudio(grid, step, num_audio_tokens(frames)), frames
    return Video(grid, step), 0


def random_document(
    rng: random.Random, seconds: Sequence[float], with_audio: bool, longest_text: int = 30
) -> list[tuple[Segment, int]]:
    """Media with text between, or none, or in two parts."""
    document = [(Text(rng.choice((0, 1, rng.randint(2, longest_text)))), 0)]
    for _ in range(rng.randint(1, 5)):
        document.append(random_media(rng, seconds, with_audio))
        if rng.random() < 0.7:
            document += [(Text(rng.randint(0, longest_text)), 0) for _ in range(rng.randint(1, 2))]
    return document


def ids_of(segments: Sequence[Segment]) -> Tensor:
    count = sum(s.num_tokens for s in segments if isinstance(s, Text))
    return lay_out(segments, range(FIRST_TEXT, FIRST_TEXT + count), TOKENS)[0]


def arguments(document: Sequence[tuple[Segment, int]]) -> dict:
    return {
        "grids": [s.grid for s, _ in document if isinstance(s, Image)],
        "seconds": [s.seconds for s, _ in document if isinstance(s, Video)],
        "mel_lengths": [frames for _, frames in document if frames],
    }


@pytest.mark.parametrize("with_audio", [False, True])
@pytest.mark.parametrize("seconds", [EVEN, UNEVEN])
def test_equal_to_transformers(seconds, with_audio):
    """600 documents. Without a picture transformers counts 0, 1, 2, ..., and so do we."""
    rng = random.Random(f"{seconds[0]}{with_audio}")
    fractional = 0
    for case in range(150):
        document = random_document(rng, seconds, with_audio, longest_text=3000 if case % 10 == 0 else 30)
        segments = [segment for segment, _ in document]
        token_ids_T, positions_3T = lay_out(segments, ids_of(segments)[ids_of(segments) >= FIRST_TEXT], TOKENS)
        expected_3T, delta = reference_positions(token_ids_T, document, with_audio)
        assert positions_3T.dtype is torch.float32 and positions_3T.shape == (3, sum(map(num_tokens, segments)))
        assert torch.equal(positions_3T, expected_3T), document
        assert torch.equal(document_positions(segments), expected_3T)
        assert torch.equal(token_positions(token_ids_T, TOKENS, **arguments(document)), expected_3T)
        following = torch.arange(len(token_ids_T), len(token_ids_T) + 5) + torch.tensor(delta)
        assert torch.equal(next_positions(positions_3T, 5), following.expand(3, -1))
        fractional += bool((positions_3T % 1).any())
    assert fractional > 30


def test_sound_in_some_videos_only():
    """Transformers has one flag for all videos; a document of both kinds is its parts, each after the last's end."""
    rng = random.Random(0)
    mixed = 0
    for _ in range(60):
        parts, start = [torch.empty(3, 0)], 0.0
        document = [item for sound in (True, False, True) for item in random_document(rng, EVEN, sound, longest_text=9)]
        for segment, frames in document:
            if isinstance(segment, Text):
                part = text_audio_positions([segment.num_tokens])
            else:
                ids = ids_of([segment])
                part = reference_positions(ids, [(segment, frames)], isinstance(segment, VideoWithAudio))[0]
            parts.append(part + start)
            start = parts[-1][0, -1].item() + 1 if part.shape[1] else start
        segments = [segment for segment, _ in document]
        expected_3T = torch.cat(parts, dim=1)
        assert torch.equal(document_positions(segments), expected_3T)
        assert torch.equal(token_positions(ids_of(segments), TOKENS, **arguments(document)), expected_3T)
        mixed += len({type(s) for s in segments if isinstance(s, Video)}) == 2
    assert mixed > 20


def processor_run(segment: VideoWithAudio) -> list[int]:
    """The placeholders that transformers' processor writes."""
    processing = pytest.importorskip("transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe")
    names = {"S": TOKENS.audio_start, "E": TOKENS.audio_end, "v": TOKENS.video, "a": TOKENS.audio}
    processor = SimpleNamespace(
        audio_bos_token="S",
        audio_eos_token="E",
        video_token="v",
        audio_token="a",
        video_processor=SimpleNamespace(merge_size=2),
    )
    run = processing.Qwen3OmniMoeProcessor.replace_video_with_audio_token(
        processor,
        {"video_grid_thw": np.array([segment.grid]), "video_second_per_grid": [segment.seconds]},
        0,
        {"num_audio_tokens": [segment.num_audio_tokens]},
        0,
        position_id_per_seconds=13.0,
    )
    return [TOKENS.vision_start, *(names[letter] for letter in run), TOKENS.vision_end]


def test_run_is_the_processor_s():
    rng = random.Random(1)
    for _ in range(150):
        seconds = rng.choice((*EVEN, 0.1, 0.4, 2 / 3, 2 / 12.5, 2 / 24, 2 / 25, rng.uniform(0.05, 3)))
        grid = rng.randint(1, 40), 2 * rng.randint(1, 3), 2 * rng.randint(1, 3)
        segment = VideoWithAudio(grid, seconds, rng.randint(1, 200))
        for start in (0, 17, 300):
            token_ids_T, _ = lay_out([Text(start), segment], range(FIRST_TEXT, FIRST_TEXT + start), TOKENS)
            assert token_ids_T[start:].tolist() == processor_run(segment), (segment, start)


def test_each_placeholder_has_its_own_time_where_the_processor_rounds_otherwise():
    """At 30 fps transformers' two orders differ; ours is one, so that audio placeholders count up by one."""
    segment = VideoWithAudio((90, 2, 2), 2 / 30, 78)
    token_ids_T, positions_3T = lay_out([segment], (), TOKENS)
    assert token_ids_T.tolist() != processor_run(segment)
    assert torch.equal(positions_3T, reference_positions(token_ids_T, [(segment, 600)], True)[0])
    assert torch.equal(positions_3T[0, token_ids_T == TOKENS.audio], torch.arange(78) + 2.0)


def test_by_hand():
    """A video of 2 frames of 1 x 2, half a second apart, with 9 audio tokens, after one token of text."""
    token_ids_T, positions_3T = lay_out([Text(1), VideoWithAudio((2, 2, 4), 0.5, 9), Text(1)], [20, 21], TOKENS)
    assert token_ids_T.tolist() == [20, 10, 8, 7, 7, 5, 5, 5, 5, 5, 5, 5, 7, 7, 5, 5, 9, 11, 21]
    time = [0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 9.5, 9.5, 10, 11, 12, 13, 14]
    assert positions_3T[0].tolist() == time
    assert positions_3T[1].tolist() == [3 if t == 9.5 else t for t in time]
    assert positions_3T[2].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 9, 3, 4, 10, 11, 12, 13, 14]


def test_times_of_each_frame():
    """Equal times as one rate; other times where they say."""
    for steps in (0.5, 0.1, 2 / 15):
        times = (torch.arange(6) * torch.tensor(steps)).tolist()
        for kind, more in ((Video, ()), (VideoWithAudio, (40,))):
            even = [Text(3), kind((6, 4, 4), steps, *more), Text(2)]
            given = [Text(3), kind((6, 4, 4), times, *more), Text(2)]
            assert torch.equal(document_positions(even), document_positions(given))
    positions_3T = document_positions([Video((3, 2, 2), (0.25, 1.0, 1.5))])
    assert positions_3T[0].tolist() == [0, 4.25, 14, 20.5, 21.5]
    token_ids_T, positions_3T = lay_out([VideoWithAudio((2, 2, 2), (0.25, 0.5), 8)], (), TOKENS)
    assert positions_3T[0].tolist() == [0, 1, 2, 3, 4, 5, 5.25, 6, 7, 8, 8.5, 9, 10, 11]
    assert (token_ids_T == TOKENS.video).nonzero().flatten().tolist() == [6, 10]


def test_pack_restarts_and_empty_documents():
    rng = random.Random(2)
    documents = [[s for s, _ in random_document(rng, EVEN, sound)] for sound in (True, False, True)]
    parts = [document_positions(d) for d in documents]
    assert torch.equal(pack_positions([documents[0], [], *documents[1:]]), torch.cat(parts, dim=1))
    assert document_positions([]).shape == pack_positions([]).shape == (3, 0)
    assert token_positions(torch.empty(0, dtype=torch.int64), TOKENS).shape == (3, 0)
    assert next_positions(torch.empty(3, 0), 2).tolist() == [[0.0, 1.0]] * 3
    text_audio = [[Text(4), Audio(13), Text(1)], [Text(2)]]
    assert torch.equal(pack_positions(text_audio), text_audio_positions([20, 2]))


@pytest.mark.parametrize("seconds", UNEVEN)
def test_cuts_in_text_do_not_show(seconds):
    """Sums round: from a fractional start, one after another would drift."""
    segments = [Video((3, 2, 2), seconds), Text(600), Image((1, 4, 4))]
    cut = [segments[0], Text(0), *([Text(1)] * 600), segments[2]]
    assert torch.equal(document_positions(segments), document_positions(cut))


def test_generation_goes_on_from_the_largest_id():
    """A tall picture with a sound that outlasts it: the ids after it are smaller than its rows', as in transformers."""
    video = VideoWithAudio((1, 40, 2), 1.0, 3)
    token_ids_T, positions_3T = lay_out([video], (), TOKENS)
    expected_3T, delta = reference_positions(token_ids_T, [(video, 20)], True)
    assert torch.equal(positions_3T, expected_3T)
    assert positions_3T[:, -1].tolist() == [6, 6, 6] and positions_3T.max() == 21
    assert next_positions(positions_3T, 2).tolist() == [[22, 23]] * 3 and delta + len(token_ids_T) == 22


def test_read_segments():
    rng = random.Random(3)
    for _ in range(50):
        document = [d for sound in (True, False) for d in random_document(rng, UNEVEN, sound)]
        segments = [segment for segment, _ in document]
        read = read_segments(ids_of(segments), TOKENS, **arguments(document))
        media = [[s for s in some if not isinstance(s, Text)] for some in (segments, read)]
        assert media[0] == media[1] and sum(map(num_tokens, read)) == sum(map(num_tokens, segments))


DOCUMENT = [(Text(2), 0), (Image((1, 4, 4)), 0), (VideoWithAudio((2, 4, 4), 1.0, 13), 100), (Audio(3), 20)]
#  0-1 text, 2-7 image, 8-32 video with sound, 33-37 audio


@pytest.mark.parametrize(
    "change,message",
    [
        ({"grids": [(1, 4, 4)]}, r"run at token 8 needs number 2 of 1 grids"),
        ({"grids": [(1, 4, 4), (2, 4, 4), (1, 2, 2)]}, r"3 grids for 2 runs"),
        ({"grids": [(1, 4, 6), (2, 4, 4)]}, r"run at token 2 holds 4 placeholders, not 6: Image\(grid=\(1, 4, 6\)"),
        ({"grids": [(1, 4, 5), (2, 4, 4)]}, r"grid \(1, 4, 5\) cannot be merged 2 x 2"),
        ({"grids": [(1, 4, 4), (3, 4, 4)]}, r"run at token 8 holds 21 placeholders, not 25"),
        ({"seconds": []}, r"run at token 8 needs number 1 of 0 seconds"),
        ({"seconds": [1.0, 2.0]}, r"2 seconds for 1 runs"),
        ({"seconds": [(0.0, 1.0, 2.0)]}, r"3 times for the 2 frames of grid \(2, 4, 4\)"),
        ({"mel_lengths": [100]}, r"run at token 33 needs number 2 of 1 clips"),
        ({"mel_lengths": [100, 20, 20]}, r"3 clips for 2 runs"),
        ({"mel_lengths": [92, 20]}, r"run at token 8 holds 21 placeholders, not 20"),
        ({"mel_lengths": [100, 0]}, r"audio of 0 tokens"),
        ({3: TOKENS.video}, r"run at token 2 has 1 picture and 0 audio placeholders, not 4 and 0: Video"),
        ({4: 20}, r"run at token 2 has 3 picture and 0 audio placeholders, not 4 and 0"),
        ({3: 20}, r"run at token 2 is of no known kind: token 10 is followed by 20"),
        ({7: TOKENS.audio_end}, r"run at token 2 must end with tokens \(11,\), not \(9,\)"),
        ({9: 20}, r"run at token 8 is of no known kind: token 10 is followed by 20"),
        ({13: TOKENS.image}, r"run at token 8 has 7 picture and 13 audio placeholders, not 8 and 13"),
        ({7: 20}, r"run at token 2 holds 28 placeholders, not 4"),
        ({1: TOKENS.image}, r"29 placeholders, but the runs hold 28: some lie outside a run"),
        ({37: 20}, r"run at token 33 has no end: none of the tokens \(9,\) follows"),
        ({1: TOKENS.audio_start}, r"run at token 1 is of no known kind: token 8 is followed by 10"),
    ],
)
def test_bad_input(change, message):
    token_ids_T = ids_of([segment for segment, _ in DOCUMENT])
    given = arguments(DOCUMENT)
    for key, value in change.items():
        if isinstance(key, int):
            token_ids_T[key] = value
        else:
            given[key] = value
    with pytest.raises(ValueError, match=message) as error:
        token_positions(token_ids_T, TOKENS, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Text(-1), "text of -1 tokens"),
        (lambda: Audio(0), "audio of 0 tokens"),
        (lambda: Image((1, 0, 2)), r"grid \(1, 0, 2\) must be three counts above 0"),
        (lambda: Image((4, 2)), r"grid \(4, 2\) must be three"),
        (lambda: Video((2, 2, 2), 0.0), "seconds between frames must be above 0, not 0.0"),
        (lambda: Video((2, 2, 2), float("nan")), "not nan"),
        (lambda: Video((2, 2, 2), (1.0, 0.5)), r"must not go back: \(1.0, 0.5\)"),
        (lambda: Video((2, 2, 2), (1.0, float("nan"))), "finite"),
        (lambda: Video((2, 2, 2), (-1.0, 0.0)), "not below 0"),
        (lambda: VideoWithAudio((2, 2, 2), 1.0, 0), "0 audio tokens"),
        (lambda: num_tokens(Image((1, 3, 2))), r"grid \(1, 3, 2\) cannot be merged"),
        (lambda: document_positions([Image((1, 6, 4))], merge=4), "merged 4 x 4"),
        (lambda: lay_out([Text(3)], [1, 2]), "2 text ids for text segments of 3 tokens"),
    ],
)
def test_bad_segments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tokens_of_a_model():
    from models.omni_config import OmniConfig
    from tests.models.helpers import tiny_config

    tokens = MediaTokens.of(OmniConfig(tiny_config()))
    assert (tokens.audio, tokens.image, tokens.vision_start) == (5, -1, MediaTokens().vision_start)
