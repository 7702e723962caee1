"""Print loss and router load of the two runs, step by step, from their metrics.jsonl."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RUNS = ("token_choice", "expert_choice")
COLUMNS = {
    "nelbo": "NELBO",
    "moe_load_max_over_mean": "busiest",
    "moe_load_min_over_mean": "idlest",
    "moe_entropy": "entropy",
    "moe_experts_per_token": "experts",
    "moe_experts_per_token_std": "spread",
    "moe_dropped_share": "dropped",
}
NUM_ROWS = 6


def main(root: Path) -> None:
    for name in RUNS:
        train, valid = (entries(root / name, split) for split in ("train", "valid"))
        print(f"{name}: NELBO on held-out text {valid[-1]['nelbo']:.4f} nats per token")
        print("  step" + "".join(f"{title:>10}" for title in COLUMNS.values()))
        for entry in spread(train, NUM_ROWS):
            numbers = "".join(f"{entry[key]:>10.3f}" for key in COLUMNS)
            print(f"{entry['step']:>6}{numbers}")
    print(
        "busiest, idlest: tokens of that expert over the mean of all; entropy: 1 for a router that"
    )
    print(
        "favours nobody; experts, spread: per token, mean and deviation; dropped: share without any"
    )


def entries(run: Path, split: str) -> list[dict[str, Any]]:
    """Of one split, by step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["split"] == split]


def spread(found: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """About `count` of them, the first and the last among them."""
    last = len(found) - 1
    numbers = sorted({round(last * n / (count - 1)) for n in range(count)})
    return [found[number] for number in numbers]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: show.py DIRECTORY, which holds the runs token_choice and expert_choice")
    main(Path(sys.argv[1]))
