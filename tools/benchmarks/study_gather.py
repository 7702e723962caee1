"""`study gather` on the folders of many made-up runs, against reading every line with json.loads.

Each run has the files that `megatron-dlm train` leaves: config.yaml, run.json, status.json and a
metrics.jsonl with reports of training and validation. The peer reads every metrics.jsonl line by
line with the standard library's json, keeps the rows of the split, adds three labels and writes
them with csv.DictWriter: the table without settings or facts of runs. Both are timed in turn in
processor time and wall time; the ratio says how many times the peer's time ours takes.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measure import environment, print_environment, write_json

from megatron_dlm.config.parse import dump
from megatron_dlm.scaling.study import Study, read_study
from megatron_dlm.scaling.study_results import gather_runs, write_table

_STUDY = """
name: many_runs
base: base.yaml
axes:
  objective: {{ar: {{objective.kind: autoregressive}}, masked: {{objective.kind: masked}}}}
  unique: {{u1: {{data.unique_tokens: 1600}}, u2: {{data.unique_tokens: 3200}}}}
  seed:
{seeds}
"""
_BASE = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 16, vocab_size: 50}
objective: {mask_token_id: 49}
data: {train: {text: 1.0}}
train: {steps: 20000, global_batch_size: 4, precision: fp32, device: cpu}
"""


@dataclass(frozen=True)
class Timing:
    """Seconds of one way, fastest round."""

    wall_seconds: float
    cpu_seconds: float


def main() -> None:
    arguments = _arguments()
    facts = environment()
    print_environment(facts)
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        folder = Path(name)
        study = _write_runs(folder, arguments)
        size = sum(path.stat().st_size for path in folder.rglob("metrics.jsonl"))
        print(f"{len(study.runs)} runs, {size / 1e6:,.0f} MB of metrics.jsonl")
        for split in ("valid", "all"):
            for suffix in (".csv", ".parquet"):
                result = _compare(study, folder, split, suffix, arguments.rounds)
                results.append(result)
                print(_line(result))
    write_json(arguments.json, {"environment": facts, "results": results})


def _compare(study: Study, folder: Path, split: str, suffix: str, rounds: int) -> dict[str, Any]:
    ours, peer = [], []
    output = folder / f"results{suffix}"
    for _ in range(rounds):
        ours.append(_timed(lambda: _gather(study, folder, split, output)))
        peer.append(_timed(lambda: _plain(study, folder, split, folder / "plain.csv")))
    best = {name: _fastest(timings) for name, timings in (("gather", ours), ("plain", peer))}
    return {"split": split, "format": suffix, **{name: asdict(t) for name, t in best.items()}}


def _gather(study: Study, folder: Path, split: str, output: Path) -> None:
    gathered = gather_runs(study, folder, split=split)
    assert not gathered.warnings, gathered.warnings[:3]
    write_table(gathered.table, output)


def _plain(study: Study, folder: Path, split: str, output: Path) -> None:
    """What a script of a few lines does."""
    rows = []
    for run in study.runs:
        path = folder / "runs" / run.name / "metrics.jsonl"
        with path.open(encoding="utf-8") as file:
            reports = [json.loads(line) for line in file]
        found = [row for row in reports if split in ("all", row["split"])]
        rows += [{"run": run.name, **run.labels, **row} for row in found]
    names = dict.fromkeys(name for row in rows for name in row)
    with output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)


def _timed(work: Callable[[], None]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def _fastest(timings: list[Timing]) -> Timing:
    return Timing(
        min(timing.wall_seconds for timing in timings),
        min(timing.cpu_seconds for timing in timings),
    )


def _line(result: dict[str, Any]) -> str:
    ours, peer = result["gather"], result["plain"]
    return (
        f"{result['split']:>5} {result['format']:<8} gather {ours['wall_seconds']:6.2f} s "
        f"({ours['cpu_seconds']:.2f} s of processor), json.loads "
        f"{peer['wall_seconds']:6.2f} s ({peer['cpu_seconds']:.2f} s): "
        f"{ours['cpu_seconds'] / peer['cpu_seconds']:.2f} times its processor time"
    )


def _write_runs(folder: Path, arguments: argparse.Namespace) -> Study:
    """The folders of all runs, each with its own numbers."""
    num_seeds = math.ceil(arguments.runs / 4)
    seeds = "\n".join(f"    s{n}: {{train.seed: {n}}}" for n in range(num_seeds))
    (folder / "base.yaml").write_text(_BASE)
    (folder / "study.yaml").write_text(_STUDY.format(seeds=seeds))
    study = read_study(folder / "study.yaml")
    templates: dict[tuple[str, str], str] = {}
    for run in study.runs:
        path = folder / "runs" / run.name
        path.mkdir(parents=True)
        setting = (run.labels["objective"], run.labels["unique"])
        if setting not in templates:  # parsing a thousand configurations would take minutes
            one = replace(study, runs=(run,))
            (config,) = one.configs(Path("OUTPUT")).values()
            templates[setting] = dump(config).replace(f"OUTPUT/{run.name}", "OUTPUT")
        text = templates[setting].replace("OUTPUT", str(path))
        seed = run.labels["seed"][1:]
        (path / "config.yaml").write_text(text.replace("\n  seed: 0\n", f"\n  seed: {seed}\n", 1))
        (path / "run.json").write_text(json.dumps(_facts(), indent=1))
        (path / "metrics.jsonl").write_text(_metrics(arguments, random.Random(run.name)))
    return study


def _facts() -> dict[str, Any]:
    return {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "uncommitted_changes": False,
        "packages": {"torch": "2.0", "megatron-core": "0.16.1", "numpy": "2.0"},
        "num_parameters": 1_234_567,
        "training_flops_per_token": 7_400_000.0,
        "unique_tokens": 3200,
    }


def _metrics(arguments: argparse.Namespace, numbers: random.Random) -> str:
    lines = []
    every = arguments.train_rows // arguments.valid_rows
    for row in range(1, arguments.train_rows + 1):
        place = {"tokens": row * 6400, "epoch": row * 2.0, "unique_tokens": 3200}
        loss = 3 + numbers.random()
        values = {name: numbers.random() for name in _TRAIN_METRICS}
        line = {"step": row * 40, "split": "train", "loss": loss, "nelbo": loss, **values, **place}
        lines.append(json.dumps(line, separators=(",", ":")))
        if row % every == 0:
            levels = (f"nll_at_noise_{n / 10:.1f}-{(n + 1) / 10:.1f}" for n in range(10))
            profile = {name: 5 * numbers.random() for name in levels}
            line = {"step": row * 40, "split": "valid", "loss": loss, "nelbo": loss, **profile}
            lines.append(json.dumps({**line, **place}, separators=(",", ":")))
    return "\n".join(lines) + "\n"


_TRAIN_METRICS = (
    *("masked_share", "masked_nll", "grad_norm", "lr", "tokens_per_second", "data_wait_share"),
    *("peak_memory_bytes", "skipped_share"),
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="runs (default: %(default)s)")
    parser.add_argument("--valid-rows", type=int, default=50, help="of a run (default: 50)")
    parser.add_argument("--train-rows", type=int, default=500, help="of a run (default: 500)")
    parser.add_argument("--rounds", type=int, default=3, help="of each way (default: 3)")
    parser.add_argument("--directory", help="where the runs are written (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
