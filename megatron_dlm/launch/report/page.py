"""The HTML of a report: one file, all of it inline, that asks the network for nothing.

What comes from the files of a run reaches the page as escaped text or inside one block of JSON, in
which no character is left that could end the block.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm import __version__
from megatron_dlm.launch.report.curves import Table, thinned
from megatron_dlm.launch.report.run_files import Event, RunFiles
from megatron_dlm.launch.report.summary import differences, facts_table

_ASSETS = Path(__file__).parent / "assets"
_MAX_EVENTS = 500  # of a run, the newest
# The browser itself is told to load nothing, whatever the page says.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


def render(runs: Sequence[RunFiles], *, max_points: int) -> str:
    """The whole page."""
    title = "Report: " + ", ".join(run.name for run in runs)
    made = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by megatron_dlm {__version__}"
    scripts = "\n".join(_asset(name) for name in ("scales.js", "chart.js", "page.js"))
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>",
        f"<style>{_asset('page.css')}</style></head><body>",
        f'<header><h1>{escape(title)}</h1><p class="quiet">made {made}</p></header>',
        _warnings(runs),
        '<main id="charts"><noscript>The curves need JavaScript; the tables do not.</noscript>',
        "</main>",
        _facts(runs),
        _differences(runs),
        _events(runs),
        _configurations(runs),
        f'<script type="application/json" id="data">{_data(runs, max_points)}</script>',
        f"<script>{scripts}</script></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _warnings(runs: Sequence[RunFiles]) -> str:
    items = [
        f"<li><b>{escape(run.name)}</b>: {escape(text)}</li>"
        for run in runs
        for text in run.warnings
    ]
    return f'<ul class="warnings" role="note">{"".join(items)}</ul>' if items else ""


def _facts(runs: Sequence[RunFiles]) -> str:
    return _section("Runs", _table(["", *_names(runs)], facts_table(runs)))


def _differences(runs: Sequence[RunFiles]) -> str:
    if len(runs) == 1:
        return ""
    rows = differences(runs)
    if not rows:
        return _section("Differences of the configurations", "<p>There are none.</p>")
    table = _table(["key", *_names(runs)], rows)
    return _section("Differences of the configurations", table)


def _events(runs: Sequence[RunFiles]) -> str:
    pairs = [(event, run.name) for run in runs for event in _newest(run)]
    if not pairs:
        return ""
    pairs.sort(key=lambda pair: pair[0].time, reverse=True)
    rows = [
        (
            f"{event.time.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S}",
            [name, event.kind, "" if event.step is None else f"{event.step:,.0f}", _told(event)],
        )
        for event, name in pairs
    ]
    return _section("Events", _table(["time (UTC)", "run", "event", "step", ""], rows))


def _configurations(runs: Sequence[RunFiles]) -> str:
    blocks = [
        f"<details><summary>{escape(run.name)}</summary><pre>{escape(run.config_text)}</pre></details>"
        for run in runs
        if run.config_text
    ]
    return _section("Configurations", "".join(blocks)) if blocks else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in texts)
        + "</tr>"
        for label, texts in rows
    )
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{content}</table></div>'


def _names(runs: Sequence[RunFiles]) -> list[str]:
    return [run.name for run in runs]


def _newest(run: RunFiles) -> Sequence[Event]:
    return run.events[-_MAX_EVENTS:]


def _told(event: Event) -> str:
    """The details of an event: seconds 0.63, reason …"""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in event.details.items()
        if value is not None
    )


def _data(runs: Sequence[RunFiles], max_points: int) -> str:
    """What the script draws; of < > & and line separators, none is left as it is."""
    content = [
        {
            "name": run.name,
            "tables": [_numbers(thinned(table, max_points)) for table in run.tables],
            "events": [
                {
                    "time": event.time.timestamp() * 1000,
                    "kind": event.kind,
                    "step": event.step,
                    "text": _told(event),
                }
                for event in _newest(run)
            ],
        }
        for run in runs
    ]
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _numbers(table: Table) -> dict[str, Any]:
    return {
        "split": table.split,
        "axes": {name: _rounded(values, 12) for name, values in table.axes.items()},
        "columns": {name: _rounded(values, 6) for name, values in table.columns.items()},
    }


def _rounded(values: np.ndarray, digits: int) -> list[float | int | None]:
    """As few characters as the digits allow; null where there is no number."""
    rounded = [None if np.isnan(value) else float(f"{value:.{digits}g}") for value in values]
    return [int(value) if value is not None and value.is_integer() else value for value in rounded]
