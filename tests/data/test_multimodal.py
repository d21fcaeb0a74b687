"""Every modality from shards to the model: lengths as foretold, media at their placeholders, and damage."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.corpus import Corpus
from data.document import MediaLimits
from data.index import build_index
from data.plan import Plan, PlanSettings
from data.reader import Reader
from data.sample import SampleRecord, media_of
from data.shards import write_shards
from data.tokenizer import AUDIO_PAD, IMAGE_PAD, VIDEO_PAD
from data.video import Sampling, load_video
from data.vision import ImageLimits, load_image
from models.init import init_weights
from models.positions import document_positions, read_segments
from models.thinker import Thinker
from tests.data import media_kit
from tests.data.audio_bytes import encode, tone
from tests.data.corpus_kit import members_of, tokenizer, write_tar
from tests.data.layouts import layout_of
from train.opening import model_config
from train.recipe import load_recipe

TOKENIZER = tokenizer()
LIMITS = MediaLimits(
    image=ImageLimits(min_pixels=1024, max_pixels=16_384),
    sampling=Sampling(fps=2.0, min_frames=2, max_frames=12, min_pixels=1024, max_pixels=9_216, max_tokens=200),
)
TEXT = {"type": "text", "text": "one two"}
KINDS = {
    "audio": {"type": "audio", "audio": "wav"},
    "image": {"type": "image", "image": "png"},
    "video": {"type": "video", "video": "mp4"},
    "film": {"type": "video", "video": "mp4", "sound": True},
}


EXTENSION = {"audio": "wav", "image": "png", "video": "mp4", "film": "mp4"}
FILM = media_kit.film(times=[i / 10 for i in range(23)], size=(96, 64), sound=media_kit.sounding(2.1))


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(media_kit.picture(width + height, (width, height))).save(file, "PNG")
    return file.getvalue()


def records() -> list[SampleRecord]:
    """Conversations and documents over every subset of the kinds."""
    made = []
    for number in range(1, 16):
        names = [name for bit, name in enumerate(KINDS) if number >> bit & 1]
        names = names[::-1] if number % 2 else names
        payloads = {"wav": encode(tone(16_000, 0.3 + number / 7), 16_000), "png": png(40 + 9 * number, 70), "mp4": FILM}
        media = {extension: payloads[extension] for extension in {EXTENSION[name] for name in names}}
        ask = {"role": "user", "content": [*(KINDS[name] for name in names), TEXT]}
        turns = [ask, {"role": "assistant", "content": "three"}]
        segments = [part for name in names for part in (KINDS[name], TEXT)]
        made.append(SampleRecord(f"c{number}", turns, media, source="c"))
        made.append(SampleRecord(f"d{number}", (), media, source="d", segments=segments))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("shards")
    assert write_shards(records(), folder, TOKENIZER, 11).left_out == []
    return Corpus.open([str(folder / "*.tar")], TOKENIZER.fingerprint)


def epoch(corpus: Corpus, length: int = 900, **settings) -> list:
    """Batches of one pass."""
    reader = Reader(corpus, TOKENIZER, seed=0, layout=layout_of(TOKENIZER), limits=LIMITS, sequence_length=length)
    plan = Plan(corpus, PlanSettings(length, 1, **settings), seed=0, sizing=reader.sizing)
    found, step = [], 0
    while (pack := plan.step(step)[0]).epochs.max() == 0:
        found.append((pack, reader.batch(pack)))
        step += 1
    return found


def test_every_sample_comes_once_as_long_as_the_index_says(corpus: Corpus) -> None:
    keys = []
    for pack, batch in epoch(corpus):
        assert batch.skipped == () and batch.doc_lengths == tuple(pack.tokens)
        keys += batch.keys
    assert sorted(key.split(":")[1] for key in keys) == sorted(record.key for record in records())


def test_media_fill_their_placeholders_and_positions_are_the_models(corpus: Corpus) -> None:
    layout = layout_of(TOKENIZER)
    for _, batch in epoch(corpus):
        ids = batch.token_ids_T
        seen = (ids == TOKENIZER.id(IMAGE_PAD)) | (ids == TOKENIZER.id(VIDEO_PAD))
        assert int(seen.sum()) == len(batch.pixels_PX) // 4 == sum(t * h * w for t, h, w in batch.grids) // 4
        heard = sum(int(layout.num_audio_tokens(frames)) for frames in batch.mel_lengths)
        assert int((ids == TOKENIZER.id(AUDIO_PAD)).sum()) == heard
        assert (batch.labels_T[:-1][seen[1:]] == -100).all()


def test_pictures_are_those_of_the_documents_in_order(corpus: Corpus) -> None:
    wanted = {record.key: record for record in records()}
    for _, batch in epoch(corpus):
        expected = []
        for key in batch.keys:
            record = wanted[key.split(":")[1]]
            for medium in media_of(record):
                if medium.kind == "image":
                    expected.append(load_image(record.media["png"], LIMITS.image)[0])
                if medium.kind == "video":
                    expected.append(load_video(FILM, LIMITS.sampling).pixels_PX)
        assert torch.equal(torch.cat(expected), batch.pixels_PX)


def test_positions_are_those_of_the_tokens_and_the_films_times(corpus: Corpus) -> None:
    tokens, checked = layout_of(TOKENIZER).tokens, 0
    times = load_video(FILM, LIMITS.sampling).times
    for _, batch in epoch(corpus):
        grids, clips = list(batch.grids), list(batch.mel_lengths)
        documents = zip(
            batch.token_ids_T.split(list(batch.doc_lengths)),
            batch.position_ids_3T.split(list(batch.doc_lengths), dim=1),
            strict=True,
        )
        for ids_T, position_ids_3T in documents:
            own, sounds = int((ids_T == tokens.vision_start).sum()), int((ids_T == tokens.audio_start).sum())
            films = sum(grid[0] > 1 for grid in grids[:own])
            segments = read_segments(
                ids_T, tokens, grids=grids[:own], seconds=[times] * films, mel_lengths=clips[:sounds]
            )
            assert torch.equal(position_ids_3T, document_positions(segments))
            grids, clips, checked = grids[own:], clips[sounds:], checked + films
    assert checked == 2 * 16  # eight of the fifteen subsets have a video, eight a film


def test_a_thinker_learns_from_every_batch(corpus: Corpus) -> None:
    thinker = Thinker(model_config(load_recipe(["recipe=scenes"]), TOKENIZER))
    init_weights(thinker, seed=0)
    for _, batch in epoch(corpus)[:3]:
        hidden_TD, _ = thinker(
            batch.token_ids_T,
            batch.position_ids_3T,
            batch.doc_lengths,
            batch.mel_FM,
            batch.mel_lengths,
            pixels_PX=batch.pixels_PX,
            grids=batch.grids,
        )
        hidden_TD.square().sum().backward()
        assert hidden_TD.isfinite().all()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in thinker.named_parameters() if "lm_head" not in n
    )


def test_damage_costs_the_sample_that_has_it(tmp_path: Path) -> None:
    film, picture = media_kit.film(), png(64, 64)
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(jpeg, "JPEG")
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    bad = {
        "zero": ("image", "png", b""),
        "corrupt": ("image", "jpg", jpeg.getvalue()[:300] + b"\xff\xd9" * 50),
        "cut": ("video", "mp4", film[: len(film) // 2]),
        "bomb": ("image", "png", bomb.getvalue()),
        "other": ("image", "jpg", film),
        "sound": ("video", "mp4", encode(tone(16_000, 1.0), 16_000)),
        "extension": ("image", "exe", picture),
        "nan": ("audio", "wav", encode(np.full(16_000, np.nan, np.float32), 16_000, subtype="FLOAT")),
    }
    made = [SampleRecord("good", media={"png": picture}, segments=[KINDS["image"]])]
    for key, (kind, extension, payload) in bad.items():
        made.append(SampleRecord(key, media={extension: payload}, segments=[{"type": kind, kind: extension}]))
    members = {name: payload for record in made for name, payload in members_of(record).items()}
    index = build_index(write_tar(tmp_path / "x.tar", members), TOKENIZER)
    assert index.num_samples == 1
    lines = index.about["left_out"]
    assert [line.split(": ")[0] for line in lines] == [f"x.tar:{key}" for key in bad]
    assert all(len(line) > 25 and "\n" not in line for line in lines), lines
