"""The page of a study: one file, figures inline, that asks the network for nothing.

What comes from the files of a study reaches the page as escaped text, and figures as images.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from urllib.parse import quote

from megatron_dlm import __version__
from megatron_dlm.config.study_commands import StudyReportConfig
from megatron_dlm.launch.report.html import (
    asset,
    document,
    section,
    table,
    table_of_html,
    warnings,
)
from megatron_dlm.launch.report.summary import ABSENT, short
from megatron_dlm.launch.study_report.runs import RunLine, commits
from megatron_dlm.scaling.figures.drawn import Drawn
from megatron_dlm.scaling.results import Results
from megatron_dlm.scaling.study import Study


@dataclass(frozen=True)
class Figure:
    """A declared figure: drawn, or why not."""

    name: str
    drawn: Drawn | None
    error: str


@dataclass(frozen=True)
class StudyPage:
    """Everything that the page says."""

    study: Study
    is_default: bool
    """Whether the study declares no figures of its own."""
    figures: Sequence[Figure]
    runs: Sequence[RunLine]
    results: Results
    warnings: Sequence[str]
    config: StudyReportConfig


def render(page: StudyPage) -> str:
    """The whole page."""
    title = f"Study: {page.study.name}"
    body = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="question">{escape(page.study.question)}</p>',
        f'<p class="quiet">{_summary(page)}</p></header>',
        warnings([escape(text) for text in (*page.warnings, *doubts(page))]),
        "<main>",
        *(_figure(figure) for figure in page.figures),
        _no_figures(page),
        section(f"{len(page.runs)} runs", _runs(page)),
        section("How to make it again", _commands(page)),
        section("Where it comes from", _provenance(page)),
        "</main>",
    ]
    style = asset("page.css") + asset("study.css")
    return document(title, policy="img-src data:;", style=style, body=body)


def _summary(page: StudyPage) -> str:
    reported = sum(run.last is not None for run in page.runs)
    made = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by megatron_dlm {__version__}"
    return (
        f"{reported} of {len(page.runs)} runs have reported, {len(page.results.rows):,} rows; "
        f"made {made}"
    )


def doubts(page: StudyPage) -> list[str]:
    """What a reader should know before the figures are believed."""
    found = []
    missing = [run.name for run in page.runs if run.last is None]
    if missing:
        num_runs = f"{len(missing)} of {len(page.runs)} runs"
        found.append(f"{num_runs} have not reported: {_first_of(missing)}")
    begun = ("running", "killed", "preempted", "failed")
    unfinished = [run.name for run in page.runs if run.state in begun]
    if unfinished:
        found.append(f"{len(unfinished)} runs are not finished: {_first_of(unfinished)}")
    made_from = commits(page.results.rows)
    if len(made_from) > 1:
        found.append(f"the runs were made from {len(made_from)} states of the code (see below)")
    return found


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")


def _figure(figure: Figure) -> str:
    if figure.drawn is None:
        return section(figure.name, warnings([escape(figure.error)]))
    drawn = figure.drawn
    cells = table(drawn.header, [(row[0], row[1:]) for row in drawn.rows])
    notes = "".join(f"<li>{escape(note)}</li>" for note in drawn.notes)
    links = "".join(f'<a href="{quote(path.name)}">{escape(path.name)}</a>' for path in drawn.files)
    alternative = escape(f"{drawn.title}; its numbers are in the table that follows", quote=True)
    return section(
        drawn.title,
        f'<figure class="figure" id="{escape(figure.name, quote=True)}">'
        f'<img alt="{alternative}" src="{_image(drawn.files)}"></figure>'
        f"{cells}"
        f'<ul class="notes">{notes}</ul><p class="files">{links}</p>',
    )


def _image(files: Sequence[Path]) -> str:
    """The figure as a data: address; SVG, which is sharp at every size."""
    picture = next(path for path in files if path.suffix == ".svg")
    content = base64.b64encode(picture.read_bytes()).decode("ascii")
    return f"data:image/svg+xml;base64,{content}"


def _no_figures(page: StudyPage) -> str:
    if not page.is_default:
        return ""
    what = "these are the validation curves" if page.figures else "and has more axes than two"
    return (
        f'<p class="quiet">The study declares no <code>figures:</code>, {what}. '
        "docs/science.md says which there are.</p>"
    )


def _runs(page: StudyPage) -> str:
    axes = page.study.axes
    header = ("run", *axes, "state", "step", "tokens", "best NELBO", "at epoch", "last NELBO", "")
    rows = [(escape(run.name), _cells(run, axes)) for run in page.runs]
    return f'<div class="runs">{table_of_html(header, rows)}</div>'


def _cells(run: RunLine, axes: Sequence[str]) -> list[str]:
    links = [
        f'<a href="{quote(link)}">{text}</a>'
        for link, text in ((run.folder, "folder"), (run.report, "report"))
        if link is not None
    ]
    state = escape(f"{run.state}: {run.reason}" if run.reason else run.state)
    return [
        *(escape(run.labels[axis]) for axis in axes),
        f'<span class="state-failed">{state}</span>'
        if run.state in ("failed", "killed")
        else state,
        *(ABSENT if run.step is None else f"{run.step:,}",),
        *(ABSENT if run.tokens is None else short(run.tokens),),
        *(ABSENT if run.best is None else f"{run.best:.4f}",),
        *(ABSENT if run.best_epoch is None else f"{run.best_epoch:.4g}",),
        *(ABSENT if run.last is None else f"{run.last:.4f}",),
        " ".join(links),
    ]


def _commands(page: StudyPage) -> str:
    config = page.config
    place = ["--study", config.study, "--output_dir", config.output_dir]
    commands = [["study", "run", *place], ["study", "report", *place]]
    text = "\n".join(shlex.join(["megatron-dlm", *words]) for words in commands)
    if config.results is not None:
        again = ["megatron-dlm", "study", "report", *place, "--results", config.results]
        text = f"# from the table alone\n{shlex.join(again)}\n# from nothing\n{text}"
    return f"<pre>{escape(text)}</pre>"


def _provenance(page: StudyPage) -> str:
    made_from = ", ".join(
        f"{name} ({count} runs)" for name, count in commits(page.results.rows).items()
    )
    rows = [
        ("study", [page.config.study]),
        ("table", [f"{page.results.source}, {len(page.results.rows):,} rows"]),
        ("commits", [made_from]),
    ]
    text = Path(page.config.study).read_text(encoding="utf-8", errors="replace")
    return (
        table(["", ""], rows)
        + f"<details><summary>The study file</summary><pre>{escape(text)}</pre></details>"
    )
