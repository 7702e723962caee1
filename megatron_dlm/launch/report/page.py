"""The HTML of a report: one file, all of it inline, that asks the network for nothing.

What comes from the files of a run reaches the page as escaped text or inside one block of JSON, in
which no character is left that could end the block.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from typing import Any

import numpy as np

from megatron_dlm import __version__
from megatron_dlm.launch.report.curves import Table, thinned
from megatron_dlm.launch.report.html import asset, document, section, table, warnings
from megatron_dlm.launch.report.run_files import Event, RunFiles
from megatron_dlm.launch.report.summary import differences, facts_table

_MAX_EVENTS = 500  # of a run, the newest


def render(runs: Sequence[RunFiles], *, max_points: int) -> str:
    """The whole page."""
    title = "Report: " + ", ".join(run.name for run in runs)
    made = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by megatron_dlm {__version__}"
    scripts = "\n".join(asset(name) for name in ("scales.js", "chart.js", "page.js"))
    body = [
        f'<header><h1>{escape(title)}</h1><p class="quiet">made {made}</p></header>',
        warnings([f"<b>{escape(run.name)}</b>: {escape(t)}" for run in runs for t in run.warnings]),
        '<main id="charts"><noscript>The curves need JavaScript; the tables do not.</noscript>',
        "</main>",
        section("Runs", table(["", *_names(runs)], facts_table(runs))),
        _differences(runs),
        _events(runs),
        _configurations(runs),
        f'<script type="application/json" id="data">{_data(runs, max_points)}</script>',
        f"<script>{scripts}</script>",
    ]
    return document(title, policy="script-src 'unsafe-inline';", style=asset("page.css"), body=body)


def _differences(runs: Sequence[RunFiles]) -> str:
    if len(runs) == 1:
        return ""
    rows = differences(runs)
    if not rows:
        return section("Differences of the configurations", "<p>There are none.</p>")
    return section("Differences of the configurations", table(["key", *_names(runs)], rows))


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
    return section("Events", table(["time (UTC)", "run", "event", "step", ""], rows))


def _configurations(runs: Sequence[RunFiles]) -> str:
    blocks = [
        f"<details><summary>{escape(run.name)}</summary><pre>{escape(run.config_text)}</pre></details>"
        for run in runs
        if run.config_text
    ]
    return section("Configurations", "".join(blocks)) if blocks else ""


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
