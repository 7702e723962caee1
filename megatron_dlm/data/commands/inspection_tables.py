"""What `data inspect` prints of one dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megatron_dlm.data.commands.report_file import in_bytes

_BAR_CHARACTERS = 24
_SHOWN_INPUTS = 3


def print_inspection(console: Console, found: dict[str, Any]) -> None:
    """Facts, document lengths and decoded windows."""
    table = Table(show_header=False, title=Text(found["dataset"]))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in (*_amounts(found), *_id_rows(found["ids"]), *_fact_rows(found)):
        table.add_row(name, Text(value))
    console.print(table)
    if found["lengths"]["histogram"]:
        console.print(_histogram(found))
    for window in found["windows"]:
        end = window["offset"] + len(window["ids"])
        title = (
            f"{window['shard']}, document {window['document']}, tokens {window['offset']} to {end} "
            f"of {window['document_tokens']}"
        )
        text = window["text"]
        shown = " ".join(map(str, window["ids"])) if text is None else printable(text)
        console.print(Panel(Text(shown), title=Text(title), title_align="left"))


def printable(text: str) -> str:
    """The text with everything escaped that could steer a terminal."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def _amounts(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    lengths = found["lengths"]
    yield "shards", f"{found['shards']:,}"
    yield "documents", f"{found['documents']:,} ({lengths['empty']:,} empty)"
    yield "tokens", f"{found['tokens']:,} as {', '.join(found['dtypes']) or 'nothing'}"
    yield "on disk", in_bytes(found["bytes"])
    if found["text_bytes"]:
        per_token = found["text_bytes"] / max(1, found["tokens"])
        yield "text", f"{in_bytes(found['text_bytes'])}, {per_token:.3f} bytes per token"
    if lengths["mean"] is not None:
        quantiles = ", ".join(
            f"{float(share):.0%}: {size:,}" for share, size in lengths["quantiles"].items()
        )
        yield "tokens per document", f"mean {lengths['mean']:,.1f}, longest {lengths['longest']:,}"
        yield "  not exceeded by", quantiles


def _id_rows(ids: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "ids counted in", f"{ids['counted_tokens']:,} tokens"
    if ids["counted_tokens"]:
        yield "ids", f"{ids['smallest']} to {ids['largest']}, {ids['different']:,} different"
    if ids["vocab_size"] is None:
        yield "vocabulary", "unknown: no manifest, and no --tokenizer"
    else:
        yield "vocabulary", f"{ids['vocab_size']:,}"
        yield "  outside of it", f"{ids['outside_vocabulary']:,} tokens"
    if ids["first_outside"] is not None:
        yield "    the first", ids["first_outside"]
    for name, special in ids["special"].items():
        yield name, f"id {special['id']}, {special['count']:,} times"
    if ids["documents_without_eod"] is not None:
        yield "documents without final eod", f"{ids['documents_without_eod']:,}"


def _fact_rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    facts, inputs = found["facts"], found["inputs"]
    if found["without_manifest"]:
        yield "shards without manifest", f"{found['without_manifest']:,}"
    if facts["tokenizer_sha256"]:
        yield "tokenizer", facts["tokenizer_sha256"]
    if inputs:
        more = "" if len(inputs) <= _SHOWN_INPUTS else ", …"
        yield "made from", f"{len(inputs):,} files: {', '.join(inputs[:_SHOWN_INPUTS])}{more}"
    for reason, number in found["left_out"].items():
        yield "left out", f"{number:,}: {reason}"
    if facts["held_out"]:
        held_out = facts["held_out"]
        yield (
            "split",
            f"the {held_out['side']} side, {held_out['fraction']:g} held out by the hash of the "
            f"{held_out['by']}",
        )


def _histogram(found: dict[str, Any]) -> Table:
    table = Table(title="tokens in a document")
    for name in ("from", "to", "documents", "share"):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_column("of all tokens", justify="right")
    rows = found["lengths"]["histogram"]
    most = max(row["documents"] for row in rows)
    for row in rows:
        table.add_row(
            f"{row['from']:,}",
            f"{row['to']:,}",
            f"{row['documents']:,}",
            f"{row['documents'] / found['documents']:.1%}",
            "█" * -(-row["documents"] * _BAR_CHARACTERS // most),
            f"{row['tokens'] / max(1, found['tokens']):.1%}",
        )
    return table
