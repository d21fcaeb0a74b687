"""A page of HTML about a corpus: tables, histograms, packed batches, a few samples of each kind, to look at and hear.

    Survey --tables, histograms--> HTML        Corpus --open_sample--> text, turns, loss; media as data: URIs --> HTML

The page needs nothing but itself. What a corpus says is text, never markup: all of it is escaped, media get their type
from their first bytes and a fixed list, and the page's own policy forbids scripts, frames and everything remote. Media
over the limits are named, not embedded; a file that browsers may not play is a link to save it.
Cost: reading the samples that are shown. Memory: the page.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from data.corpus import Corpus
from data.costs import FILM, Costs
from data.errors import BadSample
from data.reader import open_sample
from data.report import Table, hours, human_bytes, summary, tables
from data.sample import Part, SampleRecord, medium_of, parts_of
from data.survey import Lengths, Survey

MAX_PARTS = 200  # of a sample that are shown
MAX_KINDS = 60  # pairs of a source and a pattern of which samples are shown
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}h3{font-size:1rem;margin:1.6rem 0 .4rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px}td,th{padding:.15rem .6rem;text-align:right;
white-space:nowrap}
td.name,th.name{text-align:left;white-space:normal;min-width:5rem;unicode-bidi:isolate}th{border-bottom:1px solid #888}
tr.total td{border-top:1px solid #888}
article{border:1px solid #ccc;border-radius:6px;padding:.6rem 1rem;margin:.7rem 0}
.key{font:13px ui-monospace,monospace;overflow-wrap:anywhere}.about,figcaption{color:#666;font-size:13px}
.turn{display:flex;gap:.8rem;margin:.4rem 0}.role{flex:0 0 5.5rem;color:#666;font-size:13px}.content{min-width:0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}.learned{background:#fde3ee}
.left{color:#a33}figure{margin:.4rem 0}img.medium,video{max-width:100%;max-height:22rem;border:1px solid #ddd}
img.picture{max-width:100%}rect{fill:#4e79a7}svg text{font:11px system-ui,sans-serif;fill:#444}
"""
_DIGEST = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; img-src data:; media-src data:; style-src 'sha256-{_DIGEST}'; base-uri 'none'; "
    "form-action 'none'"
)


@dataclass(frozen=True)
class PageLimits:
    """What is embedded at most."""

    medium_bytes: int = 4 << 20
    page_bytes: int = 64 << 20  # of all media together
    letters: int = 4000  # of one part's text


@dataclass(frozen=True)
class Picture:
    """A picture for the page, such as a packed batch."""

    title: str
    png: bytes
    tables: Sequence[Table] = ()


@dataclass
class _Budget:
    """Bytes of media that may still be embedded."""

    limits: PageLimits
    left: int

    def refusal(self, size: int) -> str:
        """Why so many bytes are not embedded, "" where they are, which then count."""
        if size > self.limits.medium_bytes:
            return f"over the limit of {human_bytes(self.limits.medium_bytes)} for one medium"
        if size > self.left:
            return f"the page's limit of {human_bytes(self.limits.page_bytes)} for all media is reached"
        self.left -= size
        return ""


def page(
    title: str, corpus: Corpus, survey: Survey, pictures: Sequence[Picture] = (), limits: PageLimits | None = None
) -> bytes:
    """The page, UTF-8. Samples that cannot be read are named with the reason."""
    limits = limits or PageLimits()
    rows = "".join(f"<tr><td class=name>{_text(name)}<td class=name>{_text(value)}" for name, value in summary(survey))
    body = [f"<h1>{_text(title)}</h1><table>{rows}</table>"]
    body += [_table(table) for table in tables(survey)]
    body.append("<h2>histograms of lengths in tokens</h2>")
    body += [f"<h3>{_text(name)}</h3>{_histogram(lengths)}" for name, lengths in survey.lengths_by(1).items()]
    for picture in pictures:
        body.append(f"<h2>{_text(picture.title)}</h2>")
        body.append(f'<img class=picture alt="packed sequences" src="{_uri("image/png", picture.png)}">')
        body += [_table(table) for table in picture.tables]
    body.append(_samples(corpus, survey, limits))
    head = (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta http-equiv="Content-Security-Policy" '
        f'content="{_POLICY}"><meta name=referrer content=no-referrer><meta name=viewport '
        f'content="width=device-width"><title>{_text(title)}</title><style>{_STYLE}</style></head>'
    )
    return f"{head}<body>{''.join(body)}</body></html>\n".encode("utf-8", "replace")


def media_type(payload: bytes, kind: str) -> tuple[str, str]:
    """MIME type by the first bytes, and why browsers may not play it, "" where all do.

    `kind` is the part's, "audio", "image" or "video"; a file that is none of that kind is only for saving.
    """
    head, found = payload[:16], ""
    images = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"BM": "bmp"}
    for magic, name in images.items():
        found = f"image/{name}" if head.startswith(magic) else found
    if head.startswith(b"RIFF"):
        found = {b"WEBP": "image/webp", b"WAVE": "audio/wav"}.get(head[8:12], "")
    elif head.startswith(b"fLaC"):
        found = "audio/flac"
    elif head.startswith(b"OggS"):
        found = "audio/ogg"
    elif head.startswith(b"ID3") or (head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xE6 in (0xE2, 0xE4, 0xE6)):
        found = "audio/mpeg"
    elif head[4:8] == b"ftyp":
        found = f"{kind}/mp4"
    elif head.startswith(b"\x1a\x45\xdf\xa3") and b"webm" in payload[:64]:
        found = f"{kind}/webm"
    if not found.startswith(kind) or found in ("image/mp4", "image/webm"):
        return "application/octet-stream", "its format is none that browsers play"
    if found == "audio/wav" and (problem := _wav_problem(payload)):
        return found, problem
    if found == "video/mp4" and not any(codec in payload for codec in (b"avc1", b"av01", b"vp09")):
        return found, "its codec is none that all browsers play"
    return found, ""


def _wav_problem(payload: bytes) -> str:
    place = payload.find(b"fmt ", 12, 1 << 16)
    chunk = payload[place + 8 : place + 48]
    if place < 0 or len(chunk) < 16:
        return "its header is not a usual one"
    form, bits = (int.from_bytes(chunk[at : at + 2], "little") for at in (0, 14))
    if form == 0xFFFE:
        form = int.from_bytes(chunk[24:26], "little")
    usual = (form == 1 and bits in (16, 24, 32)) or (form == 3 and bits == 32)
    return "" if usual else f"a wav of format {form} with {bits} bits may not play in every browser"


def _samples(corpus: Corpus, survey: Survey, limits: PageLimits) -> str:
    budget = _Budget(limits, limits.page_bytes)
    shown = list(survey.picks.items())
    html = [
        "<h2>samples</h2><p>Text <span class=learned>like this</span> carries loss, as do the end of such a turn and "
        "of a document; all other text is given.</p>"
    ]
    for (source, pattern), samples in shown[:MAX_KINDS]:
        total = survey.lengths[source, pattern].samples
        html.append(f"<h3>{_text(source)}: {_text(pattern)} ({len(samples)} of {total:,})</h3>")
        html += [_sample(corpus, survey, sample, budget) for sample in samples]
    if len(shown) > MAX_KINDS:
        html.append(f"<p class=left>{len(shown) - MAX_KINDS} more pairs of a source and media are not shown.</p>")
    return "".join(html)


def _sample(corpus: Corpus, survey: Survey, sample: int, budget: _Budget) -> str:
    key = f"<div class=key>{_text(corpus.name(sample))}</div>"
    try:
        record, _ = open_sample(corpus, sample, 1 << 30)
    except BadSample as error:
        return f"<article>{key}<p class=left>cannot be read: {_text(error.reason)}</p></article>"
    captions, tokens = _captions(survey, corpus.costs(sample))
    about = [
        f"{tokens:,} tokens",
        *(f"{name}: {value}" for name in ("language", "speaker") if (value := getattr(record, name))),
    ]
    body, number, left = [], 0, MAX_PARTS
    for role, parts, learned in _turns(record):
        content = []
        for part in parts[:left]:
            if part["type"] == "text":
                content.append(_part_text(part["text"], learned and part.get("loss", True), budget.limits.letters))
            elif part["type"] == "speech":
                content.append(_speech(corpus, sample, part, budget))
            else:
                medium = medium_of(part)
                payload = record.media[medium.extension]
                content.append(_medium(record.key, medium.kind, medium.extension, payload, captions[number], budget))
                number += 1
        left -= len(parts[:left])
        body.append(f"<div class=turn><div class=role>{role}</div><div class=content>{''.join(content)}</div></div>")
        if not left:
            body.append(f"<p class=left>Only the first {MAX_PARTS} parts are shown.</p>")
            break
    return f"<article>{key}<div class=about>{_text(', '.join(about))}</div>{''.join(body)}</article>"


def _turns(record: SampleRecord) -> list[tuple[str, Sequence[Part], bool]]:
    """(role, parts, whether its text may carry loss) of each turn; a document is one turn."""
    if record.segments:
        return [("document", record.segments, True)]
    return [
        (turn["role"], parts_of(turn["content"]), turn["role"] == "assistant" and turn.get("loss", True))
        for turn in record.messages
    ]


def _captions(survey: Survey, costs: Costs) -> tuple[list[str], int]:
    """What is known of each medium of a sample, and the tokens of the sample."""
    sizes = survey.sizing.sizes(costs)
    captions = []
    for medium in range(len(costs.kind_M)):
        facts = []
        if costs.height_M[medium]:
            facts.append(f"{costs.width_M[medium]} x {costs.height_M[medium]} pixels")
        if costs.frames_M[medium]:
            facts.append(f"{hours(costs.seconds_M[medium])}, {costs.frames_M[medium]:,} frames")
        if costs.samples_M[medium]:
            sound = "sound heard: " if costs.kind_M[medium] == FILM else ""
            facts.append(sound + hours(costs.samples_M[medium] / 16_000))
        captions.append(", ".join([*facts, f"{sizes.tokens_M[medium]:,} tokens"]))
    return captions, int(survey.sizing.tokens(costs, sizes)[0])


def _part_text(text: str, learned: bool, letters: int) -> str:
    more = f" <span class=left>... {len(text) - letters:,} more letters</span>" if len(text) > letters else ""
    return f'<div dir=auto><span class="text{" learned" * learned}">{_text(text[:letters])}</span>{more}</div>'


def _speech(corpus: Corpus, sample: int, part: Part, budget: _Budget) -> str:
    """The recording of an answer, which no token stands for."""
    shard, row = corpus.locate(sample)
    try:
        payload = corpus.index(shard).read_speech(row)[part["speech"]]
    except (BadSample, KeyError) as error:
        return f"<p class=left>its speech cannot be read: {_text(str(error))}</p>"
    caption = f"what the Talker learns to say, speaker: {part.get('speaker') or '(unknown)'}"
    return _medium(corpus.name(sample), "audio", part["speech"], payload, caption, budget)


def _medium(key: str, kind: str, extension: str, payload: bytes, caption: str, budget: _Budget) -> str:
    mime, problem = media_type(payload, kind)
    caption = f"{kind} .{extension}, {human_bytes(len(payload))}, {caption}"
    if refusal := budget.refusal(len(payload)):
        return (
            f"<figure><figcaption>{_text(caption)} <span class=left>not shown: {refusal}</span></figcaption></figure>"
        )
    uri = _uri("application/octet-stream" if problem else mime, payload)
    if problem:
        name = f"{key.rpartition(':')[2]}.{extension}"
        shown = f'<a download="{_text(name)}" href="{uri}">save it</a> <span class=left>({_text(problem)})</span>'
    elif kind == "image":
        shown = f'<img class=medium alt="image" src="{uri}">'
    else:
        shown = f'<{kind} controls preload=metadata src="{uri}"></{kind}>'
    return f"<figure>{shown}<figcaption>{_text(caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        names = [column in table.words for column in range(len(cells))]
        return "".join(f"<{tag}{' class=name' * name}>{_text(cell)}" for cell, name in zip(cells, names, strict=True))

    rows = "".join(f"<tr>{row(cells, 'td')}" for cells in table.rows)
    total = f"<tr class=total>{row(table.total, 'td')}" if table.total else ""
    head = f"<tr>{row(table.header, 'th')}"
    return f"<h2>{_text(table.title)}</h2><div class=wide><table>{head}{rows}{total}</table></div>"


def _histogram(lengths: Lengths) -> str:
    """Bars on a logarithmic axis as SVG; the count of each is its tooltip, and stands above it."""
    bars = lengths.bars()
    tallest = max(count for _, _, count in bars)
    step, height = 44, 120
    parts = []
    for place, (first, last, count) in enumerate(bars):
        tall = round(height * count / tallest, 1) if count else 0
        x, y = 4 + place * step, 16 + height - tall
        parts.append(
            f'<rect x="{x}" y="{y:g}" width="{step - 4}" height="{tall:g}"><title>{first:,} to {last:,} '
            f"tokens: {count:,} samples</title></rect>"
        )
        if count:
            parts.append(f'<text x="{x + step / 2 - 2:g}" y="{y - 3:g}" text-anchor="middle">{_short(count)}</text>')
        parts.append(f'<text x="{x}" y="{height + 30}">{_short(first)}</text>')
    width = 8 + step * len(bars)
    return f'<svg width="{width}" height="{height + 36}" viewBox="0 0 {width} {height + 36}">{"".join(parts)}</svg>'


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**4)):
        if number >= size:
            return f"{number / (1000 if unit == 'k' else size):.3g}{unit}"
    return str(number)


def _uri(mime: str, payload: bytes) -> str:
    return f"data:{mime};base64,{b64encode(payload).decode()}"


def _text(text: str) -> str:
    """Text as HTML; control characters, which HTML may not hold, become replacement characters."""
    kept = "".join(c if c.isprintable() or c in "\n\t" or ord(c) > 0x9F else "\N{REPLACEMENT CHARACTER}" for c in text)
    return escape(kept, quote=True)
