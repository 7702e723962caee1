"""The expert bias is in checkpoints: a run that goes on balances as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rank_pool import RankPool
from resume_run import checkpoint_tensors, write_shards
from test_resume import check_metrics, killed_after_five, train

FLAGS = [
    "--objective.kind=masked",
    "--model.moe.num_experts=4",
    "--model.moe.ffn_hidden_size=32",
    "--model.moe.score_function=sigmoid",
    "--model.moe.expert_bias=true",
    "--model.moe.expert_bias_update_rate=0.05",
]
EP2 = [*FLAGS, "--parallel.expert_model_parallel_size=2"]


def test_expert_bias_goes_on(ranks: RankPool, tmp_path: Path) -> None:
    """Stopped at EP2 and continued alone, ten steps end where they do without a stop."""
    shards = write_shards(tmp_path / "shards")
    whole = tmp_path / "whole"
    metrics = train(ranks, shards, whole, EP2, num_ranks=2)
    again = killed_after_five(whole, tmp_path / "again")
    check_metrics(train(ranks, shards, again, FLAGS, num_ranks=1), metrics, tolerance=1e-6)
    ours, theirs, before = (
        biases(ranks, run, step) for run, step in ((again, 10), (whole, 10), (whole, 5))
    )
    assert len(theirs) == 4  # layers
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
        assert values.dtype == np.float32
        assert before[name].any()
        assert (values != before[name]).any()


def biases(ranks: RankPool, run: Path, step: int) -> dict[str, np.ndarray]:
    path = run / "checkpoints" / f"iter_{step:07d}"
    [tensors] = ranks.run(checkpoint_tensors, str(path), num_ranks=1)
    return {name: values for name, values in tensors.items() if name.endswith(".expert_bias")}
