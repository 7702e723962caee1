"""The loss of one run in two precisions, drawn over each other: does FP8 learn what bf16 learns?

    python tools/benchmarks/fp8_curves.py --output-dir fp8_curves -- --config run.yaml

trains the run that the flags behind `--` describe (as `megatron-dlm train` takes them) once in bf16
and once in fp8, from the same weights on the same data with the same noise, then writes curves.png
and curves.json: the difference of the training loss per logged step and its mean over the last
quarter. A run that is already there goes on. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

Curve = dict[int, float]
"""Step -> training loss, nats per token."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = _arguments(argv)
    curves = {}
    for precision in arguments.precisions:
        run = arguments.output_dir / precision
        status = train(run, precision, arguments.flags, num_ranks=arguments.ranks)
        if status != 0:
            print(f"fp8_curves.py: error: the {precision} run ended with {status}", file=sys.stderr)
            return 2
        curves[precision] = read_curve(run / "metrics.jsonl")
    summary = compare(curves)
    text = json.dumps(summary, indent=1) + "\n"
    (arguments.output_dir / "curves.json").write_text(text, encoding="utf-8")
    draw(curves, arguments.output_dir / "curves.png")
    print(
        f"{summary['second']} - {summary['first']}: {summary['mean_difference_at_end']:+.5f} nats "
        f"per token over the last {summary['steps_at_end']} logged steps "
        f"({summary['relative_at_end']:+.3%} of the loss), at most "
        f"{summary['largest_difference']:.5f} at step {summary['largest_at_step']}"
    )
    print(f"written to {arguments.output_dir}: curves.png, curves.json")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--output-dir", type=Path, required=True)
    options.add_argument(
        "--precisions", nargs=2, default=["bf16", "fp8"], choices=["fp32", "bf16", "fp8"]
    )
    options.add_argument("--ranks", type=int, default=1, help="processes (%(default)s)")
    options.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of `megatron-dlm train`")
    return options.parse_args(argv)


def train(run: Path, precision: str, flags: Sequence[str], *, num_ranks: int) -> int:
    """Train to the end; the exit status of the command."""
    command = [sys.executable, "-m", "megatron_dlm"]
    if num_ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
        command = [sys.executable, *launcher, "-m", "megatron_dlm"]
    own = ["--train.precision", precision, "--train.output_dir", str(run)]
    return subprocess.run([*command, "train", *flags, *own], check=False).returncode


def read_curve(path: Path) -> Curve:
    """Of metrics.jsonl."""
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if entry["split"] == "train"}


def compare(curves: Mapping[str, Curve]) -> dict[str, object]:
    """The second curve minus the first, where both have a step."""
    (first, left), (second, right) = curves.items()
    steps = sorted(left.keys() & right.keys())
    if not steps:
        raise ValueError(f"the runs {first} and {second} have no logged step in common")
    differences = [right[step] - left[step] for step in steps]
    end = steps[-max(1, len(steps) // 4) :]
    mean = sum(right[step] - left[step] for step in end) / len(end)
    largest = max(range(len(steps)), key=lambda number: abs(differences[number]))
    return {
        "first": first,
        "second": second,
        "steps_at_end": len(end),
        "mean_difference_at_end": mean,
        "relative_at_end": mean / (sum(left[step] for step in end) / len(end)),
        "largest_difference": abs(differences[largest]),
        "largest_at_step": steps[largest],
        "differences": dict(zip(steps, differences, strict=True)),
    }


def draw(curves: Mapping[str, Curve], path: Path) -> None:
    """Both curves above, their difference below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, curve in curves.items():
        above.plot(list(curve), list(curve.values()), label=name, linewidth=1)
    (first, left), (second, right) = curves.items()
    steps = sorted(left.keys() & right.keys())
    below.plot(steps, [right[step] - left[step] for step in steps], color="black", linewidth=1)
    below.axhline(0.0, color="grey", linewidth=0.5)
    above.set_ylabel("training loss, nats per token")
    below.set_ylabel(f"{second} - {first}")
    below.set_xlabel("step")
    above.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
