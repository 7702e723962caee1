"""Rewrite the golden curves of this folder from the code as it is now."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]

from golden_run import DIRECTORY, OBJECTIVES, golden_curve  # noqa: E402
from rank_pool import RankPool  # noqa: E402


def main() -> None:
    with RankPool(size=1) as ranks:
        for objective in OBJECTIVES:
            (curve,) = ranks.run(golden_curve, objective, num_ranks=1)
            lines = [f"{nelbo!r} {grad_norm!r}\n" for nelbo, grad_norm in curve]
            (DIRECTORY / f"{objective}.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
