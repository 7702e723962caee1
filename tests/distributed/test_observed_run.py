"""A real run with everything that can be watched switched on, and its report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from rank_pool import RankPool
from resume_run import train_in_ranks, write_shards

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.launch.report.run_files import read_runs
from megatron_dlm.launch.report.summary import facts_table
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.training.events import EventKind

BASE = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16},
    "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
    "validation": {"interval_steps": 2, "num_samples": 12},
    "checkpoint": {"interval_steps": 2},
    "logging": {
        "interval_steps": 1,
        "norms_interval_steps": 2,
        "histogram_interval_steps": 4,
        "noise_level_buckets": 5,
    },
}
RANGES = ("0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0")


@pytest.fixture(scope="module", name="runs")
def _runs(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run on one rank and on two."""
    directory = tmp_path_factory.mktemp("observed")
    shards = write_shards(directory / "shards")
    found = {}
    for num_ranks in (1, 2):
        found[num_ranks] = directory / f"run_{num_ranks}"
        ranks.run(train_in_ranks, BASE, shards, found[num_ranks], [], num_ranks=num_ranks)
    return found


def entries(run: Path, split: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in lines if entry["split"] == split]


def test_norms_come_when_they_are_due(runs):
    for entry in entries(runs[1], "train"):
        norms = {name for name in entry if "_norm_" in name}
        parts = ("embedding", "layer_0", "layer_1", "final_layernorm")
        wanted = {f"{kind}_norm_{part}" for kind in ("grad", "param") for part in parts}
        assert norms == (wanted if entry["step"] % 2 == 0 else set())
        assert entry["peak_memory_bytes"] > 1e8
        if norms:
            squares = sum(entry[f"grad_norm_{part}"] ** 2 for part in parts)
            assert squares**0.5 == pytest.approx(entry["grad_norm"], rel=1e-5)


def test_two_ranks_report_the_same(runs):
    for split in ("train", "valid"):
        ours, theirs = entries(runs[2], split), entries(runs[1], split)
        assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
        for mine, wanted in zip(ours, theirs, strict=True):
            for name, value in wanted.items():
                if "norm" in name or "noise" in name or name in ("loss", "nelbo"):
                    assert mine[name] == pytest.approx(value, rel=1e-5), name


def test_validation_reports_the_loss_by_noise_level(runs):
    for entry in entries(runs[1], "valid"):
        profile = [entry[f"nll_at_noise_{name}"] for name in RANGES]
        assert min(profile) <= entry["masked_nll"] <= max(profile)
        assert min(profile) > 0
    assert not any("noise" in name for entry in entries(runs[1], "train") for name in entry)


def test_the_board_shows_histograms(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(runs[2] / "tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    tags = board.Tags()
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    for kind in ("gradient", "parameter"):
        (event,) = board.Histograms(f"{kind}/{name}")
        assert event.step == 4
    number = board.Histograms("parameter/embedding.word_embeddings.weight")[0].histogram_value.num
    assert number == 96 * 32
    assert "train/grad_norm_layer_1" in tags["scalars"]
    assert "valid/nll_at_noise_0.8-1.0" in tags["scalars"]
    assert "config/text_summary" in tags["tensors"]


def test_the_report_reads_it(runs):
    found = read_runs([str(run) for run in runs.values()])
    assert [run.name for run in found] == ["run_1", "run_2"]
    assert [list(run.warnings) for run in found] == [[], []]
    kinds = [event.kind for event in found[0].events]
    assert kinds == ["start", "save", "save", "end"]
    facts = dict(facts_table(found))
    assert facts["state"] == ["finished", "finished"]
    assert facts["step"] == ["4 of 4", "4 of 4"]
    assert facts["ranks"] == ["1", "2"]


def documented() -> set[str]:
    """First cells of all tables of the guide, one name each."""
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_metric_is_in_the_guide(runs):
    names = {
        name for split in ("train", "valid") for entry in entries(runs[1], split) for name in entry
    }
    for config in (
        ObjectiveConfig(kind="autoregressive"),
        ObjectiveConfig(kind="hybrid"),
        ObjectiveConfig(kind="block"),
    ):
        names |= set(
            build_objective(
                config,
                vocab_size=10,
                mask_token_id=9,
                batch_size=4,
                training=False,
                num_noise_buckets=10,
            ).metric_names
        )
    known = documented()
    for name in names - {"step", "split"}:
        shown = re.sub(r"(at_noise)_.*", r"\1_LOW-HIGH", name)
        shown = re.sub(r"^(grad|param)_norm_.*", r"\1_norm_PART", shown)
        assert shown in known, name


def test_every_event_is_in_the_guide():
    assert set(get_args(EventKind)) <= documented()
