"""The audio encoder with its text decoder: windows, packing, cross-attention and greedy answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.types import Batch
from models.audio_encoder import AudioEncoder, num_audio_tokens
from models.config import (
    AudioConfig,
    AudioDecoderConfig,
    ConfigError,
    TextConfig,
    ThinkerConfig,
    TranscriberConfig,
    VisionConfig,
)
from models.flops import audio_decoder_flops, audio_flops, transcriber_flops
from models.hf import released_shapes
from models.init import init_tensor, init_weights
from models.layers.cross import attend_across, make_pairs
from models.thinker import Media, Thinker
from models.transcriber import Transcriber, split_pack, transcribe

MELS, AUDIO, VOCAB, END = 16, 40, 41, 1
TEXT = TextConfig(VOCAB, 16, 1, 2, 1, 8, 4, 2, 8, mrope_section=(2, 1, 1))
HEARS = AudioConfig(16, 2, 2, 32, output_dim=16, downsample_hidden_size=4, num_mel_bins=MELS)
DECODER = AudioDecoderConfig(24, 2, 2, 32)


def model(tied: bool = True) -> Transcriber:
    made = Transcriber(TranscriberConfig(ThinkerConfig(TEXT, HEARS, AUDIO), replace(DECODER, tie_word_embeddings=tied)))
    init_weights(made, 0)
    return made.train(False)


def mel(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(frames, MELS, generator=torch.Generator().manual_seed(seed))


def document(clips: list[int], words: int, seed: int) -> Batch:
    """Some words, the clips, more words."""
    generator = torch.Generator().manual_seed(seed)
    heard = sum(int(num_audio_tokens(frames)) for frames in clips)
    text_T = torch.randint(2, AUDIO, (words,), generator=generator)
    ids_T = torch.cat([text_T[: words // 2], torch.full((heard,), AUDIO), text_T[words // 2 :]])
    mels = [mel(frames, seed + place) for place, frames in enumerate(clips)]
    return Batch(
        token_ids_T=ids_T,
        labels_T=ids_T,
        position_ids_3T=torch.arange(len(ids_T)).float().expand(3, -1),
        doc_lengths=(len(ids_T),),
        mel_FM=torch.cat([torch.empty(0, MELS), *mels]),
        mel_lengths=tuple(clips),
        keys=("",),
    )


def join(batches: list[Batch]) -> Batch:
    return Batch(
        token_ids_T=torch.cat([b.token_ids_T for b in batches]),
        labels_T=torch.cat([b.labels_T for b in batches]),
        position_ids_3T=torch.cat([b.position_ids_3T for b in batches], 1),
        doc_lengths=tuple(n for b in batches for n in b.doc_lengths),
        mel_FM=torch.cat([b.mel_FM for b in batches]),
        mel_lengths=tuple(n for b in batches for n in b.mel_lengths),
        keys=tuple(k for b in batches for k in b.keys),
    )


def hidden(made: Transcriber, batch: Batch, windows: tuple[int, ...] = ()) -> torch.Tensor:
    audio_ES = made.encode(Media(batch.mel_FM, batch.mel_lengths, None, (), windows)).audio_TD
    return made(batch.token_ids_T, batch.doc_lengths, audio_ES)[0]


clip = st.tuples(st.integers(1, 1900), st.integers(1, 8))


@settings(max_examples=25, deadline=None)
@given(st.lists(clip, min_size=1, max_size=5))
@torch.no_grad()
def test_a_pack_of_windows_is_the_encoder_clip_by_clip(clips: list[tuple[int, int]]) -> None:
    """Each clip as from an encoder that is configured with its window; the clips beside it do not matter."""
    encoder = model().audio_tower
    mels = [mel(frames, place) for place, (frames, _) in enumerate(clips)]
    windows = [100 * seconds for _, seconds in clips]
    found = encoder(torch.cat(mels), [len(each) for each in mels], windows)
    parts = []
    for mel_FM, window in zip(mels, windows, strict=True):
        alone = AudioEncoder(replace(HEARS, n_window_infer=window)).train(False)
        alone.load_state_dict(encoder.state_dict())
        parts.append(alone(mel_FM, [len(mel_FM)]))
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_window_is_heard() -> None:
    encoder, mel_FM = model().audio_tower, mel(500)
    narrow, wide = (encoder(mel_FM, [500], [window]) for window in (200, 800))
    assert torch.equal(wide, encoder(mel_FM, [500]))  # 8 s is the configured one
    assert (narrow - wide).abs().max() > 1e-3


@pytest.mark.parametrize("windows", [[50], [150], [0]])
def test_windows_are_whole_seconds(windows: list[int]) -> None:
    with pytest.raises(ValueError, match="must be multiples of 100 frames"):
        model().audio_tower(mel(300), [300], windows)


doc = st.tuples(st.lists(st.integers(1, 260), max_size=2), st.integers(2, 9))


@settings(max_examples=25, deadline=None)
@given(st.lists(doc, min_size=1, max_size=5))
@torch.no_grad()
def test_documents_of_a_pack_do_not_see_each_other(documents: list[tuple[list[int], int]]) -> None:
    made = model()
    batches = [document(clips, words, 10 * seed) for seed, (clips, words) in enumerate(documents)]
    alone = torch.cat([hidden(made, batch) for batch in batches])
    torch.testing.assert_close(hidden(made, join(batches)), alone, rtol=1e-4, atol=1e-5)


def test_a_document_hears_all_of_its_clips_and_no_later_word() -> None:
    """By gradients: of a word's state in every mel frame of its document, in no other's, in no later word."""
    made = model()
    batch = join([document([130, 40], 6, 0), document([90], 4, 7)])
    batch.mel_FM.requires_grad_()
    hidden(made, batch)[3].sum().backward()
    assert batch.mel_FM.grad is not None
    heard_F = batch.mel_FM.grad.abs().sum(1) > 0
    assert heard_F[:170].all() and not heard_F[170:].any()
    later = batch.token_ids_T.clone()
    later[-1] = 3
    with torch.no_grad():
        changed = hidden(made, batch) - hidden(made, replace(batch, token_ids_T=later))
    assert not changed[:-1].any() and changed[-1].any()


@torch.no_grad()
def test_where_a_frame_is_matters() -> None:
    """The encoder's positions start anew every second: without the decoder's, seconds could be exchanged."""
    made, second = model(), mel(100)
    frames_ES = made.encode(Media(torch.cat([second, mel(100, 5)]), [100, 100], None, ())).audio_TD
    swapped_ES = frames_ES.roll(13, 0)
    ids = torch.tensor([5, 6])
    one, other = (made.audio_decoder(ids, [2], each, [26]) for each in (frames_ES, swapped_ES))
    assert (one - other).abs().max() > 1e-3


def test_every_parameter_has_a_gradient_whatever_the_batch() -> None:
    for tied in (True, False):
        for batch in (Batch.empty(MELS), document([], 4, 0), document([120], 4, 0)):
            made = model(tied)
            hidden_XD = hidden(made, batch)
            made.audio_decoder.head(hidden_XD).sum().backward()
            assert all(p.grad is not None for p in made.parameters())
            assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=6))
def test_cross_attention_is_that_of_each_document(lengths: list[tuple[int, int]]) -> None:
    tokens, frames = ([pair[i] for pair in lengths] for i in (0, 1))
    q, k, v = (torch.randn(sum(n), 2, 4, dtype=torch.float64) for n in (tokens, frames, frames))
    found = attend_across(q, k, v, make_pairs(tokens, frames, torch.device("cpu"))).split(tokens)
    for out, query, key, value in zip(found, q.split(tokens), k.split(frames), v.split(frames), strict=True):
        scores = torch.einsum("thc,ehc->hte", query, key) / 2
        expected = torch.einsum("hte,ehc->thc", scores.softmax(-1), value) if len(key) else torch.zeros_like(query)
        torch.testing.assert_close(out, expected)


@torch.no_grad()
def test_greedy_answers_are_those_of_whole_forwards() -> None:
    """Keys and values kept give what reading everything anew gives; a document without a clip among them."""
    made = model()
    prompts = [document([150, 60], 5, 0), document([], 3, 1), document([40], 7, 2)]
    expected = []
    for prompt in prompts:
        answer: list[int] = []
        for _ in range(6):
            ids_T = torch.cat([prompt.token_ids_T, torch.tensor(answer, dtype=torch.int64)])
            logits_V = made.audio_decoder.head(
                hidden(made, replace(prompt, token_ids_T=ids_T, doc_lengths=(len(ids_T),)))
            )[-1]
            logits_V[AUDIO] = -torch.inf
            answer.append(int(logits_V.argmax()))
        stop = answer.index(END) if END in answer else 6
        expected.append(answer[:stop])
    assert transcribe(made, join(prompts), 6, END) == expected
    assert transcribe(made, Batch.empty(MELS), 6, END, all_done=lambda done: done) == []


def test_names_are_the_released_ones_and_weights_a_thinkers() -> None:
    """The encoder begins as a Thinker's of the same seed; of the decoder a released folder knows nothing."""
    made, thinker = model(), Thinker(ThinkerConfig(TEXT, HEARS, AUDIO))
    init_weights(thinker, 0)
    ours, theirs = made.audio_tower.state_dict(), thinker.audio_tower.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    names = released_shapes(made)
    assert {name.split(".")[0] for name in names} == {"thinker", "audio_decoder"}
    assert {n for n in names if n.startswith("thinker.")} < released_shapes(thinker).keys()


def test_the_first_loss_is_near_that_of_a_guess() -> None:
    made, batch = model(), document([200], 30, 3)
    logits = made.audio_decoder.head(hidden(made, batch))
    text = batch.token_ids_T[split_pack(batch.token_ids_T, batch.doc_lengths, AUDIO).rows_X]
    loss = torch.nn.functional.cross_entropy(logits[:-1], text[1:])
    assert abs(loss.item() - torch.tensor(float(VOCAB)).log().item()) < 0.5


def test_what_does_not_fit() -> None:
    vision = VisionConfig(2, 16, 16, 2, 16, (0,), 16, patch_size=2)
    with pytest.raises(ConfigError, match="hears alone"):
        TranscriberConfig(ThinkerConfig(TEXT, HEARS, AUDIO, vision, 38, 39), DECODER)
    with pytest.raises(ConfigError, match="even multiple of num_attention_heads"):
        replace(DECODER, hidden_size=25)
    with pytest.raises(ConfigError, match="num_hidden_layers must be above 0"):
        replace(DECODER, num_hidden_layers=0)
    made, batch = model(), document([100], 4, 0)
    with pytest.raises(ValueError, match="13 audio placeholders in the tokens, but 0 audio tokens"):
        made(batch.token_ids_T, batch.doc_lengths, torch.empty(0, 16))
    with pytest.raises(ValueError, match="only hears"):
        made.encode(Media(mel(0), (), None, ((1, 2, 2),)))
    with pytest.raises(ValueError, match="0 initialisation rules"):
        init_tensor("audio_decoder.layers.0.mlp.bias", torch.empty(3), 0, 1.0)


def test_flops_count_every_matrix_once() -> None:
    """A token's are 6 times the weights that it meets; a window's attention is counted as drawn."""
    config = model().config
    layer = sum(p.numel() for n, p in model().audio_decoder.layers[0].named_parameters() if "norm" not in n)
    frames = 2 * 16 * 24  # keys and values of a frame
    weights = 2 * (layer - frames) + VOCAB * 24
    assert audio_decoder_flops(config, [1], [0]) == 6 * weights
    assert audio_decoder_flops(config, [0], [1]) == 6 * 2 * frames
    assert audio_flops(HEARS, [1600], [800]) == audio_flops(HEARS, [1600])
    narrow, wide = (audio_flops(HEARS, [1600], [window]) for window in (100, 800))
    assert wide - narrow == 3 * 4 * 16 * 2 * (2 * 104**2 - 16 * 13**2)
    whole = audio_decoder_flops(config, [9], [20]) + audio_flops(HEARS, [150], [100])
    assert transcriber_flops(config, [9], [20], [150], [100]) == whole
