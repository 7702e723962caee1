"""`megatron-dlm study report`: from the tidy table to figures and one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dlm.config.study_commands import StudyReportConfig
from megatron_dlm.launch.study_report.page import Figure, StudyPage, render
from megatron_dlm.launch.study_report.runs import run_lines
from megatron_dlm.runtime.files import write_whole
from megatron_dlm.scaling.figures.default import default_figures
from megatron_dlm.scaling.figures.drawn import Drawn
from megatron_dlm.scaling.figures.kinds import draw_figure
from megatron_dlm.scaling.results import Results, read_results
from megatron_dlm.scaling.study import Study, read_study
from megatron_dlm.scaling.study_results import gather_runs, write_table


def report_study(config: StudyReportConfig) -> None:
    """Write the figures, their numbers and index.html; say what they show.

    A figure that cannot be drawn (no run of it has reported yet) has its reason in the page, and
    is named by the ValueError at the end.
    """
    folder = Path(config.output_dir)
    study = read_study(Path(config.study))
    table = _table(config, study, folder)
    folder.mkdir(parents=True, exist_ok=True)
    declared = study.figures or default_figures(study)
    figures, failures = [], []
    for name, spec in declared.items():
        try:
            drawn = draw_figure(name, spec, table.results, study, folder)
        except ValueError as error:
            failures.append(str(error))
            figures.append(Figure(name, None, str(error)))
            continue
        _tell(drawn)
        figures.append(Figure(name, drawn, ""))
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
    print(f"{folder / 'index.html'}: {len(figures) - len(failures)} figures; open it in a browser")
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(figures)} figures cannot be drawn: {'; '.join(failures)}"
        )


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
    return _Table(Results(kept, results.source), warnings)


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
