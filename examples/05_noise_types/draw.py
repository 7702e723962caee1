"""Draw the validation bounds of runs that differ in their noise, and print their order."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_dlm.scaling.plots import plot_validation_curves

NOISE_TYPES = ("masked", "low_uniform", "balanced", "high_uniform", "uniform")


def main(root: Path) -> None:
    runs = {noise: root / noise / "metrics.jsonl" for noise in NOISE_TYPES}
    summary = plot_validation_curves(
        {noise: path for noise, path in runs.items() if path.is_file()},
        root / "nelbo.png",
        title="Five noise types at toy size",
        subtitle="hybrid diffusion: upper bound on the validation NLL (NELBO)",
    )
    print(f"{'noise':14}{'last NELBO [nats/token]':>26}{'best':>10}")
    for noise, last in sorted(summary.last.items(), key=lambda item: item[1].nats_per_token):
        best = summary.best[noise].nats_per_token
        print(f"{noise:14}{last.nats_per_token:>26.4f}{best:>10.4f}")
    print(f"curves: {root / 'nelbo.png'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: draw.py DIRECTORY, which holds one run per noise type")
    main(Path(sys.argv[1]))
