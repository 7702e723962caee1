"""Totals of the metrics: exact means, one process and several."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_dlm.training.metrics import Metrics


def term(total: float, count: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(total), torch.tensor(count)


def test_mean_over_all_terms_then_empty():
    metrics = Metrics(["loss", "nelbo", "unused"], "cpu")
    metrics.add({"loss": term(6.0, 3), "nelbo": term(9.0, 3)})
    metrics.add({"loss": term(10.0, 1)})
    assert metrics.reduce() == {"loss": 4.0, "nelbo": 3.0}
    assert metrics.reduce() == {}


def test_sums_of_fp32_terms_do_not_depend_on_their_order():
    terms = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e4
    means = set()
    for order in (range(1000), reversed(range(1000))):
        metrics = Metrics(["loss"], "cpu")
        for place in order:
            metrics.add({"loss": (terms[place], torch.tensor(1, dtype=torch.int32))})
        means.add(metrics.reduce()["loss"])
    assert means == {terms.double().sum().item() / 1000}


def test_integer_counts_and_terms_with_gradient():
    metrics = Metrics(["loss"], "cpu")
    total = torch.tensor(2.0, requires_grad=True)
    metrics.add({"loss": (total * 3, torch.tensor(4, dtype=torch.int32))})
    assert metrics.reduce() == {"loss": 1.5}


def test_unknown_name_is_refused():
    with pytest.raises(KeyError):
        Metrics(["loss"], "cpu").add({"accuracy": term(1.0, 1)})


def test_pending_changes_nothing_and_restores():
    metrics = Metrics(["loss", "nelbo"], "cpu")
    metrics.add({"loss": term(0.1, 7)})
    pending = metrics.pending()
    assert pending == {"loss": [torch.tensor(0.1).item(), 7.0], "nelbo": [0.0, 0.0]}
    resumed = Metrics(["nelbo", "loss"], "cpu")
    resumed.add({"loss": term(99.0, 1)})  # forgotten by restore
    resumed.restore({**pending, "renamed": [1.0, 1.0]}, owner=True)
    for half in (metrics, resumed):
        half.add({"loss": term(0.3, 2)})
    assert metrics.reduce() == resumed.reduce()


def _totals_of_rank() -> list[dict]:
    rank = dist.get_rank()
    metrics = Metrics(["loss", "nelbo"], "cpu")
    metrics.add({"loss": term(1.0 + rank, 1)})
    if rank == 1:
        metrics.add({"nelbo": term(5.0, 2)})
    pending = metrics.pending()
    metrics.restore(pending, owner=rank == 0)  # what a resumed run does
    return [pending, metrics.reduce(), metrics.reduce()]


def test_all_ranks_get_the_mean_over_all_ranks(ranks):
    for pending, first, second in ranks.run(_totals_of_rank, num_ranks=2):
        assert pending == {"loss": [3.0, 2.0], "nelbo": [5.0, 2.0]}
        assert first == {"loss": 1.5, "nelbo": 2.5}
        assert second == {}
