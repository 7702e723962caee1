"""`megatron-dlm study report`: from the tidy table to figures and one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dlm.config.study_commands import StudyReportConfig
from megatron_dlm.launch.study_report.page import Figure, StudyPage, doubts, render
from megatron_dlm.launch.study_report.runs import run_lines
from megatron_dlm.runtime.files import write_whole
from megatron_dlm.scaling.contradictions import Contradictions
from megatron_dlm.scaling.figures.default import default_figures
from megatron_dlm.scaling.figures.drawn import Drawn
from megatron_dlm.scaling.figures.kinds import draw_figure
from megatron_dlm.scaling.results import Results, Row, read_results
from megatron_dlm.scaling.study import Study, read_study
from megatron_dlm.scaling.study_results import gather_runs, make_folder, write_table


def report_study(config: StudyReportConfig) -> None:
    """Write the figures, their numbers and index.html; say what they show.

    A figure that cannot be drawn (no run of it has reported yet) has its reason in the page, and
    is named by the ValueError at the end. So has one that fails by a mistake of this program, whose
    error is raised at the end.
    """
    folder = Path(config.output_dir)
    study = read_study(Path(config.study))
    table = _table(config, study, folder)
    make_folder(folder)
    figures, bug = _figures(study, table.results, folder)
    failures = [figure.error for figure in figures if figure.drawn is None]
    page = StudyPage(
        study=study,
        is_default=not study.figures,
        figures=figures,
        runs=run_lines(study, table.results, folder),
        results=table.results,
        warnings=table.warnings,
        config=config,
    )
    write_whole(folder / "index.html", render(page).encode("utf-8", errors="replace"))
    for warning in table.warnings:
        print(f"warning: {warning}")
    for doubt in doubts(page):
        print(doubt)
    print(f"{folder / 'index.html'}: {len(figures) - len(failures)} figures; open it in a browser")
    if bug is not None:
        raise bug
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(figures)} figures cannot be drawn: {'; '.join(failures)}"
        )


def _figures(study: Study, results: Results, folder: Path) -> tuple[list[Figure], Exception | None]:
    """All of them, drawn or with the reason why not, and the first error that is not the user's."""
    figures = []
    bug: Exception | None = None
    for name, spec in (study.figures or default_figures(study)).items():
        try:
            drawn = draw_figure(name, spec, results, study, folder)
        except ValueError as error:
            figures.append(Figure(name, None, str(error)))
            continue
        except Exception as error:  # what else was drawn is shown before it is raised
            bug = bug or error
            text = f"figure {name}: an error of this program: {type(error).__name__}: {error}"
            figures.append(Figure(name, None, text))
            continue
        _tell(drawn)
        figures.append(Figure(name, drawn, ""))
    return figures, bug


@dataclass(frozen=True)
class _Table:
    """The results of the study, and what is wrong with them."""

    results: Results
    warnings: list[str]


def _table(config: StudyReportConfig, study: Study, folder: Path) -> _Table:
    """The table that is given; else of what the runs have reported, written to results.csv."""
    if config.results is None:
        gathered = gather_runs(study, folder)
        output = folder / "results.csv"
        write_table(gathered.table, output)
        return _Table(Results(tuple(gathered.table.to_pylist()), str(output)), gathered.warnings)
    results = read_results(Path(config.results), text_columns=study.axes)
    known = {(study.name, run.name) for run in study.runs}
    kept = tuple(row for row in results.rows if (row["study"], row["run"]) in known)
    found = dict.fromkeys((row["study"], row["run"]) for row in results.rows)
    strange = [f"{run} of study {name}" for name, run in found if (name, run) not in known]
    if not kept:
        raise ValueError(
            f"results {config.results} has no run of study {study.name}; it holds "
            f"{', '.join(strange[:3]) or 'no row'}"
        )
    warnings = [
        f"{text} is in {config.results}, and not in the study; left out" for text in strange
    ]
    return _Table(Results(kept, results.source), warnings + _other_settings(study, kept, folder))


def _other_settings(study: Study, rows: Sequence[Row], folder: Path) -> list[str]:
    """Where the runs of a table are not what the study says, as far as its columns tell."""
    of_runs = {row["run"]: row for row in rows}
    found = Contradictions(study, folder / "runs")
    for run in study.runs:
        row = of_runs.get(run.name, {})
        found.add(run, {key: value for key, value in row.items() if value is not None})
    return found.lines()


def _tell(drawn: Drawn) -> None:
    table = Table(title=drawn.title)
    for column in drawn.header:
        table.add_column(column, overflow="fold")
    for row in drawn.rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)  # units stand in brackets
    console.print(table)
    for note in drawn.notes:
        console.print(f"  {note}", style="dim")
