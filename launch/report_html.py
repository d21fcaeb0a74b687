"""Pieces of the page's HTML. All text that comes from a run goes through `text`."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape

from launch.report_metrics import number_of


def text(value: object) -> str:
    """As HTML; control characters, which HTML may not hold, and lone surrogates become replacement characters."""
    kept = (c if c.isprintable() or c in "\n\t" or ord(c) > 0x9F else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return escape("".join(kept).encode("utf-8", "replace").decode(), quote=True)


def table(header: Sequence[object], rows: Iterable[Sequence[str]], words: int = 1, name: str = "") -> str:
    """Rows of HTML cells; the first `words` columns are left-aligned words, the others numbers."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{'' if at < words else ' class=n'}>{cell}</{tag}>" for at, cell in enumerate(row))

    head = f"<thead><tr>{cells([text(each) for each in header], 'th')}</tr></thead>"
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    caption = f"<caption>{text(name)}</caption>" if name else ""
    return f"<div class=wide><table>{caption}{head}<tbody>{body}</tbody></table></div>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and HTML values; empty values are left out."""
    return (
        "<dl class=facts>"
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs if value)
        + "</dl>"
    )


def tiles(pairs: Iterable[tuple[str, str, str]]) -> str:
    """Headline numbers: name, value, what to know beside it."""
    shown = (
        f"<div class=tile><div class=name>{a}</div><div class=value>{b}</div><div class=beside>{c}</div></div>"
        for a, b, c in pairs
    )
    return f"<div class=tiles>{''.join(shown)}</div>"


def badge(state: str) -> str:
    """A state as a coloured word."""
    return f'<span class="badge {text(state)}">{text(state)}</span>'


def uri(mime: str, payload: bytes) -> str:
    """Bytes that lie in the page."""
    return f"data:{mime};base64,{b64encode(payload).decode()}"


def figure(value: object, digits: int = 4) -> str:
    """A number for people: 1,234; 0.0123; 1.8e-6. Other values as they are."""
    number = None if isinstance(value, str) else number_of(value)
    if number is None:
        return text("-" if value is None else value)
    if number == int(number) if abs(number) < 1e15 else False:
        return f"{int(number):,}"
    return f"{number:,.0f}" if 1e4 <= abs(number) < 1e15 else f"{number:.{digits}g}"


def short(number: float) -> str:
    """A count with three digits and its unit: 12.3M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def percent(value: object) -> str:
    """A share; "-" for what is none."""
    number = number_of(value)
    return "-" if number is None else f"{number:.1%}"


def bar(share: float, other: float | None = None) -> str:
    """A share as a bar, with a tick where another share lies."""
    tick = "" if other is None else f'<path class=tick d="M{min(1, max(0, other)) * 100:.4g} 0v10"/>'
    return (
        f'<svg class=bar viewBox="0 0 100 10" preserveAspectRatio=none aria-hidden=true>'
        f'<rect width="{min(1, max(0, share)) * 100:.4g}" height="10"/>{tick}</svg>'
    )
