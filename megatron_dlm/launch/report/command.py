"""`megatron-dlm report`: read the runs, write the page."""

from __future__ import annotations

from pathlib import Path

from megatron_dlm.config.report_command import ReportConfig
from megatron_dlm.launch.report.page import render
from megatron_dlm.launch.report.run_files import read_runs
from megatron_dlm.runtime.files import write_whole

_DEFAULT_NAME = "report.html"


def report(config: ReportConfig) -> None:
    """Write the report and say where; raises ValueError for what is no run."""
    runs = read_runs(config.run)
    output = _output(config)
    page = render(runs, max_points=config.max_points)
    output.parent.mkdir(parents=True, exist_ok=True)
    # A path that is no UTF-8 must not cost the report.
    write_whole(output, page.encode("utf-8", errors="replace"))
    for run in runs:
        for warning in run.warnings:
            print(f"warning: {run.name}: {warning}")
    of_what = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    print(f"report of {of_what}: {output} ({len(page) / 1000:,.0f} kB); open it in a browser")


def _output(config: ReportConfig) -> Path:
    if config.output is None:
        return Path(config.run[0] if len(config.run) == 1 else ".") / _DEFAULT_NAME
    output = Path(config.output)
    if output.is_dir():
        raise ValueError(f"output {output} is a directory; name a file, such as report.html")
    return output
