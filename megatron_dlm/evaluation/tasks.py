"""lm-eval's tasks from our own command line, and how far right options lie from wrong ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Table

from megatron_dlm.config.evaluation_commands import EvaluateConfig
from megatron_dlm.evaluation.likelihood import MaskDraws
from megatron_dlm.evaluation.lm_eval_adapter import MegatronDLM
from megatron_dlm.evaluation.report import announce, model_facts, with_error, write_json
from megatron_dlm.hf.load import LoadedModel
from megatron_dlm.runtime.files import write_whole

_TASK_SAMPLES = 128


@dataclass(frozen=True)
class DeltaNLL:
    """Mean over questions of: mean NLL of the wrong options minus NLL of the right one.

    Errors are standard errors over the questions; NaN for one question.
    """

    nats: float
    standard_error: float
    nats_per_byte: float
    """With every option's NLL divided by its bytes, as options differ in length."""
    nats_per_byte_standard_error: float
    num_questions: int


def evaluate_tasks(config: EvaluateConfig, model: LoadedModel, console: Console) -> None:
    """Run the tasks, print their scores, write tasks.json and samples_TASK.jsonl."""
    manager = open_tasks(config.task_names, config.include_path)
    draws = MaskDraws(config.num_samples or _TASK_SAMPLES, config.enumerate_masks, config.seed)
    adapter = MegatronDLM.of(
        model,
        draws=draws,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
    )
    found = simple_evaluate(
        model=adapter,
        tasks=config.task_names,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        batch_size=config.batch_size,
        task_manager=manager,
        log_samples=True,
    )
    assert found is not None, "one process"
    samples = found.pop("samples")
    deltas = {name: delta for name, rows in samples.items() if (delta := delta_nll(rows))}
    console.print(_table(found["results"], deltas))
    if config.output_dir is None:
        return
    directory = Path(config.output_dir)
    report = {
        **model_facts(model),
        "settings": config.task_settings,
        "results": found["results"],
        "delta_nll": {name: asdict(delta) for name, delta in deltas.items()},
        "lm_eval": {name: value for name, value in found.items() if name != "results"},
    }
    write_json(directory / "tasks.json", json.loads(json.dumps(report, default=str)))
    for name, rows in samples.items():
        lines = [json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows]
        write_whole(directory / f"samples_{name.replace('/', '_')}.jsonl", "".join(lines))
    announce(console, directory)


def open_tasks(names: Sequence[str], include_path: Sequence[str]) -> TaskManager:
    """What knows all the names; ValueError for those that lm-eval and include_path do not have."""
    if include_path:
        own = TaskManager(include_path=list(include_path), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own  # lm-eval's own thousands of files take seconds to read
    manager = _all_tasks(tuple(include_path))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists them, "
            "include_path adds folders of your own"
        )
    return manager


@cache
def _all_tasks(include_path: tuple[str, ...]) -> TaskManager:
    return TaskManager(include_path=list(include_path) or None)


def delta_nll(samples: Sequence[Mapping[str, Any]]) -> DeltaNLL | None:
    """From lm-eval's samples of one task; None where it has no options of which one is right."""
    gaps, gaps_per_byte = [], []
    for sample in samples:
        answers, right = sample["filtered_resps"], _right_option(sample)
        if right is None or not 0 <= right < len(answers) or len(answers) < 2:
            continue
        nll = [-float(log_prob) for log_prob, _ in answers]
        sizes = [max(1, len(text.encode())) for _, text in sample["arguments"][: len(answers)]]
        gaps.append(_gap(nll, right))
        gaps_per_byte.append(
            _gap([value / size for value, size in zip(nll, sizes, strict=True)], right)
        )
    if not gaps:
        return None
    return DeltaNLL(
        *_mean_and_error(gaps), *_mean_and_error(gaps_per_byte), num_questions=len(gaps)
    )


def _gap(values: Sequence[float], right: int) -> float:
    return fmean(value for option, value in enumerate(values) if option != right) - values[right]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), error


def _right_option(sample: Mapping[str, Any]) -> int | None:
    """Number of the right option, if the answers are likelihoods of options at all."""
    answers = sample["filtered_resps"]
    if not all(isinstance(answer, (tuple, list)) and len(answer) == 2 for answer in answers):
        return None
    target = sample["target"]
    if isinstance(target, str):
        options = [text.strip() for _, text in sample["arguments"]]
        return options.index(target.strip()) if target.strip() in options else None
    return target if isinstance(target, int) else None


def _table(results: Mapping[str, Mapping[str, Any]], deltas: Mapping[str, DeltaNLL]) -> Table:
    table = Table("task", "metric", "value", box=None)
    for name, values in results.items():
        for key, value in values.items():
            metric, _, rule = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not rule:
                continue
            error = values.get(f"{metric}_stderr,{rule}")
            error = error if isinstance(error, float) else None
            shown = metric if rule == "none" else f"{metric} ({rule})"
            table.add_row(name, shown, with_error(float(value), error))
        if name in deltas:
            delta = deltas[name]
            per_byte = with_error(delta.nats_per_byte, delta.nats_per_byte_standard_error)
            table.add_row(name, "delta NLL, nats", with_error(delta.nats, delta.standard_error))
            table.add_row(name, "delta NLL, nats/byte", per_byte)
    return table
