"""The few pieces of HTML that all pages are made of; texts are escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"


def asset(name: str) -> str:
    """A file that goes into the page as it is."""
    return (_ASSETS / name).read_text(encoding="utf-8")


def section(title: str, content: str) -> str:
    """A titled part of the page; the content is HTML already."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows of (label, texts)."""
    return table_of_html(
        header, [(escape(label), [escape(text) for text in texts]) for label, texts in rows]
    )


def table_of_html(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The same for cells that are HTML already; only the header is text."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = "".join(
        f'<tr><th scope="row">{label}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for label, cells in rows
    )
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{content}</table></div>'


def warnings(items: Sequence[str]) -> str:
    """A list that stands out; nothing for none. The items are HTML already."""
    listed = "".join(f"<li>{item}</li>" for item in items)
    return f'<ul class="warnings" role="note">{listed}</ul>' if items else ""


def document(title: str, *, policy: str, style: str, body: Sequence[str]) -> str:
    """The whole page; policy: what else the browser may use than styles of the page itself."""
    # The browser itself is told to load nothing, whatever the page says.
    rules = f"default-src 'none'; style-src 'unsafe-inline'; {policy}"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{rules} '
        "base-uri 'none'; form-action 'none'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>",
        f"<style>{style}</style></head><body>",
        *body,
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"
