"""Counting a corpus from its indexes, the page of samples, the picture of packs, and the command around them."""

import hashlib
import io
import json
import re
import subprocess
import sys
from base64 import b64decode, b64encode
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data.survey
from data.corpus import Corpus
from data.costs import Sizing
from data.index import build_index
from data.inspect import main
from data.page import PageLimits, media_type, page
from data.picture import documents_of, draw_packs
from data.report import MAX_ROWS, Table, as_json, as_text, bars_as_text, tables
from data.sample import SampleRecord
from data.shard_index import index_path
from data.survey import LIMITS, Lengths, Survey, Totals, survey
from data.tokenizer import train_tokenizer
from data.types import Batch
from tests.data.audio_bytes import encode, tone
from tests.data.corpus_kit import members_of, spoken, tokenizer, write_tar, written
from train.layout import ModelLayout

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = tokenizer()
SIZING = Sizing(ModelLayout())
HOSTILE = "</span></script><script>window.hacked=1</script><img src=//x onerror='hacked()'>\"&lt;\x1b[31m\u202e\x00 אב"


def png(width: int = 64, height: int = 48, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def film(kind: str = "mp4", codec: str = "libx264", seconds: int = 1, sound: bool = False) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        heard = container.add_stream("aac", rate=16_000) if sound else None
        for number in range(8 * seconds):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number % 255, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if heard:
            frame = av.AudioFrame.from_ndarray(tone(16_000, seconds)[None], format="fltp", layout="mono")
            frame.sample_rate = 16_000
            container.mux(heard.encode(frame))
            container.mux(heard.encode())
    return file.getvalue()


def asked(key: str, kind: str, extension: str, payload: bytes, **about: str) -> SampleRecord:
    """A question about a medium."""
    question = [{"type": kind, kind: extension}, {"type": "text", "text": "Which?"}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "This one."}]
    return SampleRecord(key, turns, {extension: payload}, **about)


def hostile() -> SampleRecord:
    turns = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]
    return SampleRecord("<b>$x_{$", turns, {}, language="<i>", source=HOSTILE[:60], speaker='"><script>')


def records() -> list[SampleRecord]:
    loud = [{"type": "text", "text": "Hear."}, {"type": "video", "video": "mp4", "sound": True}]
    document = [
        {"type": "text", "text": "One."},
        {"type": "image", "image": "png"},
        {"type": "text", "text": "Given.", "loss": False},
        {"type": "audio", "audio": "wav"},
    ]
    return [
        *[written(f"t{i}", "one two " * (i + 1), source="text", language="en" if i % 2 else "de") for i in range(9)],
        *[spoken(f"a{i}", 0.5 + i, source="speech", language="de") for i in range(4)],
        asked("p", "image", "png", png(), source="pictures"),
        asked("v", "video", "mp4", film(), source="films"),
        SampleRecord("d", (), {"png": png(), "wav": encode(tone(16_000), 16_000)}, source="mixed", segments=document),
        hostile(),
        SampleRecord("f", (), {"mp4": film(seconds=2, sound=True)}, source="films", segments=loud),
    ]


def shards(folder: Path, chosen: list[SampleRecord], count: int = 2) -> list[str]:
    """Indexed shards of the records, and one more member set that cannot be used."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        members = {"bad.json": b"{}"} if number == 0 else {}
        for record in chosen[number::count]:
            members |= members_of(record)
        paths.append(write_tar(folder / f"s{number}.tar", members))
        build_index(paths[-1], TOKENIZER)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.open(shards(tmp_path_factory.mktemp("corpus"), records()))


@pytest.fixture(scope="module")
def found(corpus: Corpus) -> Survey:
    return survey(corpus, SIZING, picks=2)


# Counting


def test_totals_are_those_of_the_samples_one_by_one(corpus: Corpus, found: Survey) -> None:
    total, tokens, media = Totals(), 0, 0
    for sample in range(corpus.num_samples):
        shard, row = corpus.locate(sample)
        costs = corpus.index(shard).costs(slice(row, row + 1))
        sizes = SIZING.sizes(costs)
        tokens += int(SIZING.tokens(costs, sizes)[0])
        media += len(costs.kind_M)
    total = found.total
    assert (total.samples, total.documents, total.tokens) == (18, 2, tokens)
    assert (total.clips, total.images, total.videos) == (5, 2, 2) and media == 9
    assert total.audio_seconds == pytest.approx(0.5 + 1.5 + 2.5 + 3.5 + 1)
    assert (total.video_seconds, total.sound_seconds) == (pytest.approx(3), pytest.approx(2, abs=0.2))
    assert abs(total.film_sound - 26) <= 3 and abs(total.audio - 9 * 13) <= 5  # 13 tokens a second
    assert total.image == 2 * SIZING.sizes(corpus.index(1).costs(slice(6, 7))).seen_M[0] and total.video > 0
    assert found.bytes == sum(Path(path).stat().st_size for path in corpus.paths)
    assert dict(found.left_out) == {'its .json needs either "messages" or "segments"': 1}
    assert found.groups["text", "de"].samples == 5 and found.groups["text", "en"].samples == 4
    assert found.lengths["mixed", "audio + image"].samples == 1


def test_windows_and_shards_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Survey) -> None:
    monkeypatch.setattr(data.survey, "WINDOW", 3)
    other = Corpus.open(shards(tmp_path, records(), 3))
    again = survey(other, SIZING, picks=2)
    assert again.groups == found.groups and again.left_out == found.left_out
    assert as_json(again)["lengths"] == as_json(found)["lengths"]
    assert {names: len(samples) for names, samples in again.picks.items()} == {
        names: len(samples) for names, samples in found.picks.items()
    }


def test_picks_depend_on_the_seed_alone(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [survey(corpus, SIZING, picks=2, seed=seed).picks for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1] and any(other != chosen[0] for other in chosen[2:])
    assert len(set(chosen[0]["text", "text only"])) == 2 and len(chosen[0]["films", "video"]) == 1
    monkeypatch.setattr(data.survey, "WINDOW", 2)
    assert survey(corpus, SIZING, picks=2).picks == chosen[0]


@given(st.lists(st.integers(0, 1 << 30), min_size=1), st.sampled_from([1, 50, 90, 99, 100]))
def test_percentiles_and_bars(values: list[int], percent: int) -> None:
    tokens_N = np.array(values)
    lengths = Lengths(np.bincount(data.survey._bin(tokens_N), minlength=data.survey._BINS), sum(values), max(values))
    exact = int(np.percentile(tokens_N, percent, method="inverted_cdf"))
    assert exact <= lengths.percentile(percent) <= exact * 65 / 64 + 1e-9
    bars = lengths.bars()
    assert sum(count for _, _, count in bars) == len(values)
    assert all(before[1] + 1 == after[0] for before, after in zip(bars, bars[1:], strict=False))
    for first, last, count in bars:
        assert count == int(((tokens_N >= first) & (tokens_N <= last)).sum())
    assert len(bars_as_text(lengths).splitlines()) <= len(bars)


def test_shares_above_usual_lengths_are_exact(tmp_path: Path) -> None:
    size = 30
    texts = [written(f"k{i}", "x" * (LIMITS[0] - size // 2 + i)) for i in range(size)]
    (name,) = shards(tmp_path, texts, 1)
    corpus = Corpus.open([name])
    costs = corpus.index(0).costs(slice(0, size))
    expected = int((costs.text_tokens_N > LIMITS[0]).sum())
    lengths = survey(corpus, SIZING).lengths_by(None)["all"]
    assert 0 < expected < size and lengths.above.tolist() == [expected, 0]


def test_a_larger_limit_of_pixels_gives_more_tokens(corpus: Corpus) -> None:
    small, large = (
        survey(corpus, Sizing(ModelLayout(), image=type(SIZING.image)(min_pixels=pixels))).total.image
        for pixels in (1024, 65536)
    )
    assert small < large


# Tables


def test_tables_are_aligned_and_fold_what_is_too_much(found: Survey) -> None:
    many = {(f"源{i}", ""): Totals(samples=1, text=i + 1) for i in range(MAX_ROWS + 10)}
    lengths = {
        (source, "text only"): Lengths(np.bincount([1], minlength=data.survey._BINS), 1, 1) for source, _ in many
    }
    wide = Survey(1, 1, SIZING, many, lengths, {}, found.left_out, found.examples, {"x"})
    by_group, _, by_source, left_out = tables(wide)
    for table in (by_group, by_source):
        assert len(table.rows) == MAX_ROWS and table.rows[-1][0] == "(11 others)"
    column = by_group.header.index("text")
    assert sum(int(row[column].replace(",", "")) for row in by_group.rows) == wide.total.text
    assert left_out.rows == [("1", 's0.tar:bad: its .json needs either "messages" or "segments"')]
    lines = as_text(Table("t", ["name", "n"], [["源", "1"], ["ab", "22"]], total=["all", "23"])).splitlines()
    assert lines == ["t:", "  name   n", "  --------", "  源     1", "  ab    22", "  --------", "  all   23"]


def test_names_of_a_corpus_cannot_steer_the_terminal(found: Survey) -> None:
    text = "\n".join(map(as_text, tables(found)))
    assert HOSTILE[:40] in text and all(letter.isprintable() or letter == "\n" for letter in text)


# The page


class Page(HTMLParser):
    """Elements and text of a page; holds it to what it promises."""

    VOID = {"meta", "img", "br", "tr", "td", "th"}

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.style, self.open = "", "", []
        self.feed(html.decode())
        self.close()
        assert not set(self.open) - {"html"}, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open += [tag] * (tag not in self.VOID)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check_safe(html: bytes) -> Page:
    """Nothing runs, nothing is loaded from elsewhere, whatever the browser."""
    parsed = Page(html)
    names = {name for name, _ in parsed.elements}
    assert not names & {"script", "iframe", "object", "embed", "link", "base", "form", "b", "i"}, names
    for name, attributes in parsed.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "style"], (name, attributes)
        for key in ("src", "href"):
            assert (attributes.get(key) or "data:").startswith("data:"), (name, attributes)
    (policy,) = [meta["content"] for meta in parsed.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    digest = b64encode(hashlib.sha256(parsed.style.encode()).digest()).decode()
    assert policy and "default-src 'none'" in policy and f"'sha256-{digest}'" in policy and "script" not in policy
    return parsed


def payload(uri: str | None) -> bytes:
    assert uri
    return b64decode(uri.partition(";base64,")[2], validate=True)


def test_a_page_shows_every_kind_and_runs_nothing(corpus: Corpus, found: Survey) -> None:
    parsed = check_safe(page("all", corpus, found))
    for key in ("s1.tar:d", "s1.tar:p", "s0.tar:v", "<b>$x_{$", "left out"):
        assert key in parsed.text, key
    assert HOSTILE.replace("\x1b", "\ufffd").replace("\x00", "\ufffd") in parsed.text
    assert {image["src"] and payload(image["src"]) for image in parsed.of("img")} == {png()}
    assert [video["src"] and video["src"][:15] for video in parsed.of("video")] == ["data:video/mp4;"] * 2
    assert len(parsed.of("audio")) == 3 and all("controls" in audio for audio in parsed.of("audio"))
    assert encode(tone(16_000), 16_000) in [payload(audio["src"]) for audio in parsed.of("audio")]
    assert len(parsed.of("svg")) == len(found.lengths_by(1))


def test_a_page_depends_on_the_seed_alone(corpus: Corpus) -> None:
    pages = [page("x", corpus, survey(corpus, SIZING, picks=1, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert pages[0] == pages[1] and any(other != pages[0] for other in pages[2:])


def test_text_with_loss_is_marked(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "asked"},
        {"role": "assistant", "content": "not taught", "loss": False},
        {"role": "assistant", "content": "taught"},
    ]
    parts = [{"type": "text", "text": "told"}, {"type": "text", "text": "given", "loss": False}]
    chosen = [SampleRecord("c", turns), SampleRecord("d", segments=parts)]
    corpus = Corpus.open(shards(tmp_path, chosen, 1))
    html = page("x", corpus, survey(corpus, SIZING, picks=2)).decode()
    assert set(re.findall(r'<span class="text learned">(.*?)</span>', html)) == {"taught", "told"}
    assert set(re.findall(r'<span class="text">(.*?)</span>', html)) == {"asked", "not taught", "given"}


def test_what_is_not_shown_is_said(tmp_path: Path) -> None:
    chosen = [
        asked("kept", "image", "png", png(), source="a"),
        asked("large", "audio", "wav", encode(tone(16_000, 2), 16_000), source="b"),
        asked("last", "image", "png", png(300, 300, "blue"), source="c"),
        asked("other", "video", "mkv", film("matroska"), source="b"),
        written("long", "x" * 50, source="d"),
    ]
    corpus = Corpus.open(shards(tmp_path, chosen, 1))
    limits = PageLimits(medium_bytes=40_000, page_bytes=len(png()) + len(chosen[3].media["mkv"]), letters=20)
    parsed = check_safe(page("x", corpus, survey(corpus, SIZING, picks=1), limits=limits))
    assert len(parsed.of("img")) == 1 and not parsed.of("audio") + parsed.of("video")
    assert "not shown: over the limit of 40 kB for one medium" in parsed.text
    assert "for all media is reached" in parsed.text and "... 30 more letters" in parsed.text
    (link,) = parsed.of("a")
    assert link["download"] == "other.mkv" and payload(link["href"]) == chosen[3].media["mkv"]
    assert "its format is none that browsers play" in parsed.text


def test_a_sample_that_has_changed_is_named(tmp_path: Path) -> None:
    (name,) = shards(tmp_path, [written("a", "hello")], 1)
    corpus = Corpus.open([name])
    chosen = survey(corpus, SIZING, picks=1)
    content = Path(name).read_bytes()
    Path(name).write_bytes(content.replace(b'"hello"', b'"jello"'))
    parsed = check_safe(page("x", corpus, chosen))
    assert "cannot be read: .json has changed" in parsed.text


@given(st.text(), st.text(min_size=1))
def test_any_text_stays_text(title: str, cell: str) -> None:
    from data.page import _table, _text

    html = f"<title>{_text(title)}</title>{_table(Table(title, ['h'], [[cell]]))}".encode("utf-8", "replace")
    parsed = Page(html)
    assert [name for name, _ in parsed.elements] == ["title", "h2", "div", "table", "tr", "th", "tr", "td"]
    printable = all(letter.isprintable() for letter in cell)
    assert not printable or parsed.text.endswith("h" + cell)


KINDS = {
    "png": (png(), "image", "image/png", True),
    "wav": (encode(tone(16_000), 16_000), "audio", "audio/wav", True),
    "wav of floats": (encode(tone(16_000), 16_000, "wav", "FLOAT"), "audio", "audio/wav", True),
    "wav of 8 bits": (encode(tone(16_000), 16_000, "wav", "PCM_U8"), "audio", "audio/wav", False),
    "wav of mu-law": (encode(tone(16_000), 16_000, "wav", "ULAW"), "audio", "audio/wav", False),
    "flac": (encode(tone(16_000), 16_000, "flac"), "audio", "audio/flac", True),
    "mp3": (encode(tone(16_000), 16_000, "mp3"), "audio", "audio/mpeg", True),
    "opus": (encode(tone(16_000), 16_000, "opus"), "audio", "audio/ogg", True),
    "mp4": (film(), "video", "video/mp4", True),
    "mp4 of another codec": (film(codec="mpeg4"), "video", "video/mp4", False),
    "webm": (film("webm", "libvpx"), "video", "video/webm", True),
    "mkv": (film("matroska"), "video", "application/octet-stream", False),
    "avi": (film("avi", "mpeg4"), "video", "application/octet-stream", False),
    "page": (b"<html><script>x</script>", "image", "application/octet-stream", False),
    "drawing": (b"<svg onload='x'>", "image", "application/octet-stream", False),
    "sound as an image": (encode(tone(16_000), 16_000, "flac"), "image", "application/octet-stream", False),
    "nothing": (b"", "audio", "application/octet-stream", False),
}


@pytest.mark.parametrize("name", KINDS)
def test_media_types(name: str) -> None:
    content, kind, expected, plays = KINDS[name]
    mime, problem = media_type(content, kind)
    assert (mime, not problem) == (expected, plays), problem


@given(
    st.binary(max_size=100), st.sampled_from(["", "RIFF", "RIFFabcdWAVE", "RIFFabcdWAVEfmt ", "\x00\x00\x00\x00ftyp"])
)
def test_media_types_of_any_bytes(tail: bytes, head: str) -> None:
    for kind in ("audio", "image", "video"):
        mime, _ = media_type(head.encode() + tail, kind)
        assert mime == "application/octet-stream" or mime.startswith(kind)


# The picture

PADS = {90: "audio", 91: "image", 92: "video"}


def batch(learned: bool = True) -> Batch:
    ids = torch.tensor([1, 90, 90, 2, 3, 4, 91, 91, 91, 5, 6, 92])
    labels = ids.roll(-1)
    labels[[0, 1, 2, 5, 6, 7, 8, 10, 11]] = -100
    if not learned:
        labels[:] = -100
    positions = torch.cat([torch.arange(5.0), torch.arange(7.0) * 2]).expand(3, -1)
    keys = ("a.tar:x", "b.tar:$\\frac{<y>源")
    return Batch(ids, labels, positions, (5, 7), torch.empty(0, 128), (), keys, ("c.tar:z: has no .json member",))


def test_documents_of_a_batch() -> None:
    first, second = documents_of(batch(), PADS)
    assert (first.key, first.start, first.tokens, first.learned, first.position) == ("a.tar:x", 0, 5, 2, 4.0)
    assert first.kinds == {"text": 3, "audio": 2, "image": 0, "video": 0}
    assert (second.number, second.start, second.tokens, second.learned, second.position) == (2, 5, 7, 1, 12.0)
    assert second.kinds == {"text": 3, "audio": 0, "image": 3, "video": 1}
    assert documents_of(Batch.empty(128), PADS) == []


def pixels_of(picture: bytes, colour: str) -> int:
    rgb_HWC = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return int((rgb_HWC == wanted).all(axis=2).sum())


def test_a_picture_shows_kinds_loss_and_free_room() -> None:
    from data.picture import _KINDS, _LOSS

    drawn, unlearned, short = (
        draw_packs([each], PADS, length) for each, length in ((batch(), 12), (batch(False), 12), (batch(), 24))
    )
    assert drawn == draw_packs([batch()], PADS, 12)  # the same bytes each time
    assert pixels_of(drawn, _LOSS) > 3 * pixels_of(unlearned, _LOSS) > 0  # the legend has it too
    tall = {kind: pixels_of(drawn, colour) for kind, colour in _KINDS.items()}
    assert tall["text"] > tall["image"] > tall["audio"] > tall["video"] > 0  # 6, 3, 2 and 1 tokens
    assert pixels_of(short, _KINDS["text"]) < 0.7 * tall["text"]  # half as wide where half is free
    assert Image.open(io.BytesIO(draw_packs([batch(), Batch.empty(128)], PADS, 12))).height > 400


# The command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards(tmp_path / "shards", records())
    TOKENIZER.save(tmp_path / "tokenizer")
    return tmp_path


def test_the_command_prints_counts_and_writes_json_and_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, written_page = folder / "x.json", folder / "x.html"
    arguments = [f"{folder}/shards/*.tar", "--json", str(made), "--page", str(written_page), "data.video.fps=1"]
    assert main([*arguments, "image.max_pixels=4000"]) == 0
    shown = capsys.readouterr().out
    assert "samples        18: 16 conversations, 2 documents" in shown and "left out       1 samples" in shown
    assert "max_pixels=4000" in shown and "fps=1 " in shown and "##" in shown
    counts = json.loads(made.read_text())
    assert counts["total"]["samples"] == 18 and counts["sizes"]["image"]["max_pixels"] == 4000
    assert sum(group["tokens"] for group in counts["groups"]) == counts["total"]["tokens"]
    assert check_safe(written_page.read_bytes()).of("audio")


def test_a_step_is_drawn_as_the_reader_gives_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    settings = ["shards/s0.tar", "shards/s1.tar", "tokenizer=tokenizer"]
    pack = ["--pack", "0", "--sequence-length", "400", "--sequences-per-step", "4", "--window", "64"]
    assert main([*settings, *pack]) == 0
    shown = capsys.readouterr().out
    assert "step 0: 4 sequences of 400 tokens, seed 0" in shown and "sequence 4:" in shown
    corpus = Corpus.open(["shards/s*.tar"])
    tokens = {}
    for sample in range(corpus.num_samples):
        shard, row = corpus.locate(sample)
        costs = corpus.index(shard).costs(slice(row, row + 1))
        tokens[corpus.name(sample)] = int(SIZING.tokens(costs, SIZING.sizes(costs))[0])
    rows = re.findall(r"^ +(\d+)  (s[01]\.tar:\S+) +(\d+) +(\d+) ", shown.partition("step 0")[2], re.MULTILINE)
    assert len({key for _, key, _, _ in rows}) > 10 and [number for number, _, _, _ in rows].count("1") == 4
    end = 0
    for number, key, start, length in rows:
        assert int(start) == (0 if number == "1" else end) and int(length) == tokens[key], key
        end = int(start) + int(length)
        assert end <= 400
    assert Image.open("pack-0.png").width == 1540
    assert main([*settings, *pack, "--page", "x.html", "--picture", "y.png"]) == 0
    assert payload(check_safe(Path("x.html").read_bytes()).of("img")[0]["src"]) == Path("y.png").read_bytes()


def test_python_finds_its_own_inspect(folder: Path) -> None:
    command = [sys.executable, "-m", "data.inspect", str(folder / "shards" / "s0.tar")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("shards") and not done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none-*.tar"], "none-*.tar"),
        (["none.tar"], "none.tar"),
        (["bare.tar"], "bare.tar"),
        (["damaged.tar"], "damaged.tar.index: damaged index"),
        (["shards/s0.tar", "tokenizer=other"], "s0.tar: its index was made with another tokenizer"),
        (["shards/s0.tar", "tokenizer=nowhere"], "nowhere/tokenizer.json: no such file"),
        (["tokenizer=tokenizer"], "name at least one shard"),
        (["shards/s0.tar", "tokeniser=x"], "tokeniser=x: no such setting; known are tokenizer=, image.* and video.*"),
        (["shards/s0.tar", "image.pixels=3"], "data.image.pixels: no such setting; known are max_bytes"),
        (["shards/s0.tar", "video.fps=many"], "data.video.fps=many: must be a number"),
        (["shards/s0.tar", "video.fps=nan"], "data.video.fps=nan: must be above 0"),
        (["shards/s0.tar", "--pack", "0"], "--pack reads text: name the tokenizer's folder with tokenizer=FOLDER"),
        (["shards/s0.tar", "--pack", "-1"], "--pack -1: must be a step, 0 or above"),
        (["shards/s0.tar", "--samples", "0"], "--samples 0: must be above 0"),
        (["shards/s0.tar", "image.max_pixels=9"], "data.image.min_pixels=3136: must be at most data.image.max_pixels"),
        (["shards/s0.tar", "video.max_frames=1"], "data.video.min_frames=4: must be at most data.video.max_frames"),
        (["shards"], '"shards" is a folder; name its shards, for instance "shards/*.tar"'),
        (["shards/s0.tar", "--page", "none/x.html"], "none/x.html: there is no folder none"),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path,
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    for name in ("bare", "damaged"):
        write_tar(Path(f"{name}.tar"), members_of(written("a")))
    index_path(Path("damaged.tar")).write_bytes(b"\x08\0\0\0\0\0\0\0junkjunk")
    train_tokenizer(["another text"], 301).save(Path("other"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and expected in err and err.count("\n") == 1 and not out
    assert not list(Path().glob("*.html")) + list(Path().glob("*.png"))
