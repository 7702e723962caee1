"""The tables of a report: what runs were, how far they came, and in what they differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_dlm.launch.report.curves import Table
from megatron_dlm.launch.report.run_files import RunFiles
from megatron_dlm.scaling.short_numbers import with_unit

ABSENT = "—"
# Where the files of a run lie is no setting of it.
_NO_DIFFERENCE = ("train.output_dir",)


def facts_table(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """(label, one text per run); a row that says nothing of any run is left out."""
    rows: list[tuple[str, Callable[[RunFiles], str | None]]] = [
        ("state", _state),
        ("state written", _state_time),
        ("step", _step),
        ("training loss, last", lambda run: _last(run, "train", "loss")),
        ("training NELBO, last", lambda run: _last(run, "train", "nelbo")),
        ("validation NELBO, best", _best_validation),
        ("validation NELBO, last", lambda run: _last(run, "valid", "nelbo")),
        ("tokens", lambda run: _axis(run, "tokens", short)),
        ("epochs", lambda run: _axis(run, "epoch", "{:.4g}".format)),
        ("tokens per second, median", lambda run: _median(run, "tokens_per_second", short)),
        ("waiting for data, median", lambda run: _median(run, "data_wait_share", "{:.2%}".format)),
        ("model FLOPs utilisation, median", lambda run: _median(run, "mfu", "{:.1%}".format)),
        ("peak memory of rank 0", _memory),
        ("parameters", lambda run: _fact(run, "num_parameters", short)),
        ("active parameters", lambda run: _fact(run, "num_active_parameters", short)),
        ("training FLOPs, planned", lambda run: _fact(run, "training_flops", "{:.3g}".format)),
        ("unique tokens", lambda run: _fact(run, "unique_tokens", short)),
        ("objective", lambda run: _setting(run, "objective.kind")),
        ("device", lambda run: _fact(run, "device", str)),
        ("ranks", lambda run: _fact(run, "world_size", str)),
        ("host", lambda run: _fact(run, "host", str)),
        ("commit", _commit),
        ("packages", _packages),
        ("first event", lambda run: _time(run, 0)),
        ("last event", lambda run: _time(run, -1)),
        ("directory", lambda run: str(run.path)),
    ]
    found = [(label, [tell(run) or ABSENT for run in runs]) for label, tell in rows]
    return [(label, texts) for label, texts in found if set(texts) != {ABSENT}]


def differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """(dotted key, one value per run) of the settings in which the runs differ, in their order."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [(key, [_setting(run, key) or ABSENT for run in runs]) for key in keys]
    return [
        (key, texts) for key, texts in rows if len(set(texts)) > 1 and key not in _NO_DIFFERENCE
    ]


def short(number: float) -> str:
    """12.3M for 12,345,678."""
    return with_unit(number)


def columns_of(run: RunFiles, split: str, metric: str) -> tuple[Table, np.ndarray] | None:
    """The table that holds a metric, and its values."""
    for table in run.tables:
        if table.split == split and metric in table.columns:
            return table, table.columns[metric]
    return None


def _state(run: RunFiles) -> str | None:
    state, reason = run.status.get("state"), run.status.get("reason")
    if state is None:
        return None
    return f"{state}: {reason}" if reason else str(state)


def _state_time(run: RunFiles) -> str | None:
    """A job that was killed leaves "running" behind: how old that is, tells."""
    time = run.status.get("time")
    return time if isinstance(time, str) else None


def _step(run: RunFiles) -> str | None:
    steps = [table.axes["step"][-1] for table in run.tables]
    last = max(steps) if steps else run.status.get("step")
    if not isinstance(last, (int, float)):
        return None
    planned = run.facts.get("steps")
    of_all = f" of {planned:,}" if isinstance(planned, int) else ""
    return f"{last:,.0f}{of_all}"


def _last(run: RunFiles, split: str, metric: str) -> str | None:
    found = columns_of(run, split, metric)
    if found is None:
        return None
    values = found[1][~np.isnan(found[1])]
    return f"{values[-1]:.4f}" if len(values) else None


def _best_validation(run: RunFiles) -> str | None:
    found = columns_of(run, "valid", "nelbo")
    if found is None or np.isnan(found[1]).all():
        return None
    table, values = found
    row = int(np.nanargmin(values))
    return f"{values[row]:.4f} at step {table.axes['step'][row]:,.0f}"


def _axis(run: RunFiles, axis: str, form: Callable[[float], str]) -> str | None:
    values = [float(np.nanmax(table.axes[axis])) for table in run.tables if not _empty(table, axis)]
    return form(max(values)) if values else None


def _empty(table: Table, axis: str) -> bool:
    return bool(np.isnan(table.axes[axis]).all())


def _median(run: RunFiles, metric: str, form: Callable[[float], str]) -> str | None:
    found = columns_of(run, "train", metric)
    if found is None or np.isnan(found[1]).all():
        return None
    return form(float(np.nanmedian(found[1])))


def _memory(run: RunFiles) -> str | None:
    found = columns_of(run, "train", "peak_memory_bytes")
    if found is None or np.isnan(found[1]).all():
        return None
    return f"{np.nanmax(found[1]) / 2**30:.2f} GiB"


def _fact(run: RunFiles, key: str, form: Callable[[Any], str]) -> str | None:
    value = run.facts.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or (form is not str and not is_number):
        return None
    return form(value)


def _commit(run: RunFiles) -> str | None:
    commit = run.facts.get("commit")
    if not isinstance(commit, str):
        return None
    return commit[:12] + (
        " with uncommitted changes" if run.facts.get("uncommitted_changes") else ""
    )


def _packages(run: RunFiles) -> str | None:
    packages = run.facts.get("packages")
    if not isinstance(packages, Mapping):
        return None
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _time(run: RunFiles, place: int) -> str | None:
    return f"{run.events[place].time:%Y-%m-%d %H:%M:%S} UTC" if run.events else None


def _setting(run: RunFiles, key: str) -> str | None:
    if key not in run.config:
        return None
    value = run.config[key]
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
