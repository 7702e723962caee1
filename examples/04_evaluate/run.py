"""Score an autoregressive and a masked model on the same shards and tasks, side by side.

    make quickstart                       # trains both and makes the tasks, once
    python examples/04_evaluate/run.py

Needs megatron-dlm's extras [eval] and [plot]; no network. `--help` lists other models and data.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TASKS = ("next_line", "library_text", "say_it_again")


def main() -> None:
    arguments = read_arguments()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    models = {"autoregressive": arguments.ar, "masked": arguments.masked}
    results = {name: evaluate(path, output / name, arguments) for name, path in models.items()}
    print(f"{'':28}{'autoregressive':>24}{'masked':>24}")
    for row in results["autoregressive"]:
        print(f"{row:28}" + "".join(f"{results[name][row]:>24}" for name in models))
    print(f"\nthe loss at every noise level: {output / 'masked' / 'noise_levels.png'}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score two models on the same text.")
    parser.add_argument("--ar", default="quickstart/ar", help="autoregressive model")
    parser.add_argument("--masked", default="quickstart/masked", help="masked model")
    parser.add_argument("--data", default="quickstart/data/valid", help="prefix of shards")
    parser.add_argument("--tasks", default="quickstart/tasks", help="folder of the tasks")
    parser.add_argument("--output", default="runs/04_evaluate", help="where results go")
    parser.add_argument("--limit", default="100", help="windows and examples to score")
    return parser.parse_args()


def evaluate(model: str, output: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """Run `megatron-dlm evaluate`; returns the numbers of its JSON files, as text."""
    command = [sys.executable, "-m", "megatron_dlm", "evaluate", "--model", model]
    command += ["--data", arguments.data, "--limit", arguments.limit, "--output_dir", str(output)]
    command += ["--tasks", ",".join(TASKS), "--include_path", arguments.tasks]
    # The data of the tasks are local: nothing has to be asked of the network.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    log = output.parent / f"{output.name}.log"
    with log.open("w") as stream:
        ended = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    if ended.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()}")
    (data,) = json.loads((output / "data.json").read_text())["data"]
    tasks = json.loads((output / "tasks.json").read_text())
    return rows(data, tasks)


def rows(data: dict[str, Any], tasks: dict[str, Any]) -> dict[str, str]:
    results, delta = tasks["results"], tasks["delta_nll"]["next_line"]
    accuracy = results["next_line"]
    return {
        "nats per token": with_error(data, "nats_per_token", "standard_error"),
        "  is": {"nll": "exact", "nelbo": "an upper bound"}[data["metric"]],
        "bits per byte": with_error(data, "bits_per_byte", "bits_per_byte_standard_error"),
        "next_line: accuracy": with_error(accuracy, "acc_norm,none", "acc_norm_stderr,none"),
        "next_line: delta NLL, nats": with_error(delta, "nats", "standard_error"),
        "library_text: bits per byte": f"{results['library_text']['bits_per_byte,none']:.3f}",
        "say_it_again: accuracy": f"{results['say_it_again']['exact_match,none']:.3f}",
    }


def with_error(values: dict[str, Any], name: str, error: str) -> str:
    return f"{values[name]:.3f} ± {values[error]:.3f}"


if __name__ == "__main__":
    main()
