"""The `plan` command: closed forms, corpus sizes, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from megatron_dlm import cli
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.commands import PlanConfig
from megatron_dlm.config.hardware import GPUS
from megatron_dlm.config.keys import leaf_types
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.schema import DataConfig, RunConfig, TrainConfig
from megatron_dlm.data.storage.dataset import write_dataset
from megatron_dlm.data.storage.shard_writer import ShardWriter
from megatron_dlm.models.accounting import count_parameters, training_flops_per_token
from megatron_dlm.scaling.plan_run import make_plan

RUN = RunConfig(
    model=ModelConfig(vocab_size=1000, seq_length=128),
    train=TrainConfig(tokens=1_024_000, global_batch_size=16),
    data=DataConfig(unique_tokens=10_240),
)
MACHINE = PlanConfig(num_gpus=4, peak_flops=1e12, mfu=0.25)


def test_time_is_flops_over_speed() -> None:
    plan = make_plan(RUN, MACHINE)
    flops = training_flops_per_token(RUN.model, RUN.objective).total
    assert plan.length is not None
    assert plan.length.steps == 500
    assert plan.length.epochs == 100.0
    assert plan.length.training_flops == pytest.approx(flops * 1_024_000)
    assert plan.length.seconds == pytest.approx(flops * 1_024_000 / (4 * 1e12 * 0.25))
    assert plan.length.flops_6nd == 6.0 * count_parameters(RUN.model).total * 1_024_000
    assert plan.tokens_per_second * plan.length.seconds == pytest.approx(1_024_000)


def with_data(train: dict[str, float], **length: Any) -> RunConfig:
    return dataclasses.replace(
        RUN,
        data=DataConfig(train=train),
        train=TrainConfig(global_batch_size=16, **length),
    )


def write_shard(prefix: Path, lengths: list[int], vocab_size: int = 1000) -> None:
    with ShardWriter(prefix, vocab_size=vocab_size, mask_id=3) as writer:
        writer.add_documents(np.full(sum(lengths), 7), lengths)
        writer.publish()


def test_corpus_size_comes_from_the_list_of_shards_and_from_manifests(tmp_path: Path) -> None:
    """The shards themselves may lie on another machine."""
    write_shard(tmp_path / "a_0", [1000, 500])
    write_shard(tmp_path / "a_1", [1500])
    write_dataset(tmp_path / "a", [tmp_path / "a_0", tmp_path / "a_1"])
    write_shard(tmp_path / "b", [1096])
    for path in [*tmp_path.glob("*.bin"), *tmp_path.glob("*.idx")]:
        path.unlink()
    prefixes = {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 2.0}
    plan = make_plan(with_data(prefixes, epochs=3), MACHINE)
    assert plan.length is not None
    assert plan.length.unique_tokens == 4096
    assert plan.length.steps == 6  # 3 * 32 windows of 128 in batches of 16
    assert plan.data == []


def test_unknown_corpus_stops_epochs_only(tmp_path: Path) -> None:
    prefixes = {str(tmp_path / "none"): 1.0}
    with pytest.raises(ValueError, match=r"corpus size is unknown; give data\.unique_tokens"):
        make_plan(with_data(prefixes, epochs=3), MACHINE)
    length = make_plan(with_data(prefixes, steps=3), MACHINE).length
    assert length is not None
    assert (length.steps, length.epochs) == (3, None)


@pytest.mark.parametrize("kind", ["manifest", "dataset"])
def test_corrupt_manifest_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"a.{kind}.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"a\.{kind}\.json is not a (shard manifest|list of)"):
        make_plan(with_data({str(tmp_path / "a"): 1.0}, steps=3), MACHINE)


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_data_that_is_here_is_opened(
    tmp_path: Path, packing: Literal["concat", "document"], capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of windows is the run's own, and every dataset has its row."""
    write_shard(tmp_path / "low", [1000] * 10)
    write_shard(tmp_path / "high", [300] * 10)
    prefixes = {str(tmp_path / "low"): 1.0, str(tmp_path / "high"): 1.0}
    config = with_data(prefixes, epochs=2)
    objective = dataclasses.replace(config.objective, mask_token_id=3)
    data = dataclasses.replace(config.data, packing=packing)
    plan = make_plan(dataclasses.replace(config, objective=objective, data=data), MACHINE)
    # concat: 10,000 / 128 and 3,000 / 128; document: pieces of 128 and then of 127 new tokens.
    windows = {"concat": [79, 24], "document": [80, 30]}[packing]
    assert plan.length is not None
    assert plan.length.unique_tokens == 13_000
    assert plan.length.steps == -(-2 * sum(windows) // 16)
    num_samples = 16 * plan.length.steps
    assert plan.length.epochs == num_samples / sum(windows)
    assert [row.name for row in plan.data] == ["low", "high"]
    assert [row.samples for row in plan.data] == [num_samples // 2] * 2
    epochs = [row.epochs for row in plan.data]
    assert epochs == [num_samples / 2 / count for count in windows]
    assert [row.seen_tokens for row in plan.data] == [10_000, 3_000]

    flags = ["plan", "--model.vocab_size=1000", "--model.seq_length=128", "--train.epochs=2"]
    flags += ["--objective.mask_token_id=3", f"--data.train={json.dumps(prefixes)}"]
    assert cli.main([*flags, f"--data.packing={packing}"]) == 0
    printed = capsys.readouterr().out
    assert "what the run takes from its data" in printed
    assert "10,000" in printed


def test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [1000], vocab_size=1001)
    with pytest.raises(ValueError, match="vocabulary of 1001, the model one of 1000"):
        make_plan(with_data({str(tmp_path / "a"): 1.0}, steps=3), MACHINE)


def test_impossible_layout_is_refused() -> None:
    config = dataclasses.replace(RUN, parallel=ParallelConfig(tensor_model_parallel_size=4))
    assert make_plan(config, MACHINE).data_parallel_size == 1
    with pytest.raises(ValueError, match="world size is 6"):
        make_plan(config, dataclasses.replace(MACHINE, num_gpus=6))


def test_every_device_of_the_table_can_be_named() -> None:
    assert leaf_types(PlanConfig)["device"].__args__ == tuple(GPUS)


def test_command_prints_and_writes_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "plan.json"
    argv = ["plan", "--config", "preset:sdl_1b", "--data.unique_tokens", "1000000000"]
    argv += ["--train.epochs", "96", "--plan.num_gpus", "8", "--plan.output", str(output)]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert "1.086 B" in text
    assert "183,106" in text
    assert "twice the causal" in " ".join(text.split())
    written = json.loads(output.read_text())
    assert written["length"]["steps"] == 183_106
    assert written["memory_bytes"]["optimizer"] > 0
    assert list(tmp_path.iterdir()) == [output]


def test_experts_are_planned_with_what_a_token_meets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    example = Path(__file__).parents[3] / "examples" / "configs" / "moe" / "8b1a_1b_96e_masked.yaml"
    output = tmp_path / "plan.json"
    argv = ["plan", "--config", "preset:sdl_1b", "--config", str(example), "--plan.num_gpus=16"]
    assert cli.main([*argv, f"--plan.output={output}"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "parameters │ 7.71 B" in text
    assert "active │ 1.09 B │ 8 of 88 experts" in text
    assert "DP 16, EP 8" in text
    written = json.loads(output.read_text())
    count = written["parameters"]
    total = sum(count[name] for name in ("embedding", "layers", "final_norm", "output_layer"))
    active = total - count["idle_experts"]
    assert written["length"]["flops_6nd"] == 6.0 * active * written["length"]["tokens"]
    # A rank has 11 of 88 experts; the 2 ranks that hold the same ones share their optimizer.
    experts = count["idle_experts"] / 80 * 88
    assert written["memory_bytes"]["gradients"] == 4 * (total - experts * 7 / 8)
    assert written["memory_bytes"]["optimizer"] == pytest.approx(12 * total / 16)


def test_layout_that_cannot_hold_the_experts_is_refused() -> None:
    moe = MoEConfig(num_experts=6)
    config = dataclasses.replace(
        RUN,
        model=dataclasses.replace(RUN.model, moe=moe),
        parallel=ParallelConfig(expert_model_parallel_size=4),
    )
    with pytest.raises(ValueError, match=r"num_experts 6 is not a multiple of .*size 4"):
        make_plan(config, MACHINE)


def test_memory_options_are_named_beside_their_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    argv = ["plan", "--config", "preset:sdl_1b", "--parallel.grad_reduce_in_fp32=false"]
    argv += ["--parallel.optimizer_cpu_offload_fraction=0.5"]
    argv += ["--model.recompute_granularity=selective", "--model.recompute_modules=[mlp,layernorm]"]
    assert cli.main(argv) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "gradients │ 2.17 GB │ bf16" in text
    assert "sharded over DP; 50% on the host" in text
    assert "recompute of mlp, layernorm" in text
