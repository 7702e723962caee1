"""Norms and histograms are those of whole parameters, on every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from opened import GLOBAL_BATCH, opened_model
from rank_pool import RankPool
from tiny_run import Layout, layout, model_config, token_batch

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.schema import LoggingConfig, OptimizerConfig
from megatron_dlm.training.histogram import EDGES

DENSE = model_config(untie_embeddings_and_output_weights=True)
TIED = model_config()
EXPERTS = model_config(moe=MoEConfig(num_experts=4, ffn_hidden_size=24))
LAYOUTS = [
    (TIED, layout("TP2", 2, tp=2)),
    (TIED, layout("PP2", 2, pp=2)),
    (DENSE, layout("DP2 overlapped", 2, overlap_grad_reduce=True, overlap_param_gather=True)),
    (DENSE, layout("TP2 + SP x PP2 + VPP2", 4, tp=2, pp=2, sp=True, vpp=2)),
    (EXPERTS, layout("EP2", 2, ep=2)),
]


def inspect_layout(where: Layout, model: ModelConfig) -> dict[str, Any]:
    """What an inspection says before the first update, and the norm that the update reports."""
    from megatron_dlm.training.inspection import Inspection
    from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_dlm.training.step import run_micro_batches

    with opened_model(where.parallel, model) as opened:
        chunks, parallel = opened.chunks, opened.parallel
        wrapped = wrap_data_parallel(chunks, where.parallel, parallel)
        # Clipped hard: the norms are those before clipping.
        optimizer = build_optimizer(
            wrapped,
            OptimizerConfig(clip_grad=1e-3),
            overlap_param_gather=where.parallel.overlap_param_gather,
        )
        setup = opened.pass_of(wrapped)
        logging = LoggingConfig(
            interval_steps=1, norms_interval_steps=2, histogram_interval_steps=4
        )
        inspection = Inspection(logging, optimizer, setup)
        size, rank = parallel.data.size, parallel.data.rank
        starts = range(rank * where.micro_batch, GLOBAL_BATCH, where.micro_batch * size)
        batches = [
            token_batch(start, where.micro_batch, model.seq_length, documents=False)
            for start in starts
        ]
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        run_micro_batches(setup, batches, forward_only=False)
        assert inspection.of(1) is None
        assert set(inspection.report()) == {"peak_memory_bytes"}
        inspection.of(4)()
        report, histograms = inspection.report(), inspection.histograms()
        inspection.of(2)()
        assert norms_of(inspection.report()) == norms_of(report)
        assert (inspection.report().keys(), inspection.histograms()) == ({"peak_memory_bytes"}, {})
        whole = {
            kind: {
                name: (value.main_grad if kind == "gradient" else value).detach().numpy().copy()
                for name, value in chunks[0].named_parameters()
            }
            for kind in ("gradient", "parameter")
        }
        _, grad_norm, _ = optimizer.step()
    return {
        "report": report,
        "histograms": {
            name: (found.total, found.sum_of_squares, np.array(found.counts))
            for name, found in histograms.items()
        },
        "whole": whole,
        "grad_norm": float(grad_norm),
    }


def norms_of(report: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in report.items() if "norm" in key}


@pytest.fixture(scope="module", name="one_rank")
def _one_rank(ranks: RankPool):
    results: dict[int, dict[str, Any]] = {}

    def result(model: ModelConfig) -> dict[str, Any]:
        if id(model) not in results:
            where = layout("one", 1, micro=4)
            results[id(model)] = ranks.run(inspect_layout, where, model, num_ranks=1)[0]
        return results[id(model)]

    return result


@pytest.mark.parametrize(("model", "where"), LAYOUTS, ids=lambda value: getattr(value, "name", ""))
def test_every_layout_says_the_same(ranks: RankPool, one_rank, model, where) -> None:
    wanted = one_rank(model)
    for result in ranks.run(inspect_layout, where, model, num_ranks=where.num_ranks):
        norms = norms_of(result["report"])
        assert norms == pytest.approx(norms_of(wanted["report"]), rel=1e-5)
        assert result["histograms"].keys() == wanted["histograms"].keys()
        for name, (total, squares, counts) in wanted["histograms"].items():
            ours = result["histograms"][name]
            assert ours[1] == pytest.approx(squares, rel=1e-4), name
            assert ours[0] == pytest.approx(total, abs=1e-4 * squares**0.5 * counts.sum() ** 0.5)
            assert ours[2].sum() == counts.sum(), name
            if name.startswith("parameter/"):  # bit-equal, so every one is in its range
                np.testing.assert_array_equal(ours[2], counts)


@pytest.mark.parametrize("model", [TIED, DENSE], ids=["tied", "untied"])
def test_one_rank_against_numpy(one_rank, model) -> None:
    result = one_rank(model)
    report, whole = result["report"], result["whole"]
    for label, kind in (("grad_norm", "gradient"), ("param_norm", "parameter")):
        squares: dict[str, float] = {}
        for name, values in whole[kind].items():
            layer = name.removeprefix("decoder.").split(".")
            key = f"layer_{layer[1]}" if layer[0] == "layers" else layer[0]
            squares[key] = squares.get(key, 0.0) + float((values.astype(np.float64) ** 2).sum())
            histogram = result["histograms"][f"{kind}/{name}"]
            assert histogram[2].sum() == values.size
            assert histogram[0] == pytest.approx(values.astype(np.float64).sum(), abs=1e-6)
        wanted = {f"{label}_{key}": value**0.5 for key, value in squares.items()}
        assert {key: value for key, value in report.items() if key.startswith(label)} == (
            pytest.approx(wanted, rel=1e-6)
        )
    # Together they are the norm that the update reports.
    total = sum(value**2 for key, value in report.items() if key.startswith("grad_norm"))
    assert total**0.5 == pytest.approx(result["grad_norm"], rel=1e-5)
    assert result["grad_norm"] > 1e-3
    layers = {f"grad_norm_layer_{number}" for number in range(model.num_layers)}
    assert layers < report.keys()


def test_ranges_are_those_of_the_edges(one_rank) -> None:
    result = one_rank(TIED)
    name = "embedding.word_embeddings.weight"
    values, edges = result["whole"]["parameter"][name].reshape(-1), np.float32(EDGES)
    counts = result["histograms"][f"parameter/{name}"][2]
    for place in np.flatnonzero(counts):
        low = edges[place - 1] if place else -np.inf
        high = edges[place] if place < len(edges) else np.inf
        assert counts[place] == ((values > low) & (values <= high)).sum()
