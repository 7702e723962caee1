"""Studies whose settings meet, whose labels are files, and whose runs wait for each other."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_dlm import cli
from megatron_dlm.config.derive import resolve
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.models.accounting import count_parameters
from megatron_dlm.scaling.flops import training_flops
from megatron_dlm.scaling.study import read_study

BASE = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, seq_length: 16, vocab_size: 50}
objective: {mask_token_id: 49}
data: {train: {text: 1.0}, unique_tokens: 1601}
train: {steps: 100, global_batch_size: 4, precision: fp32, device: cpu}
schedule: {kind: constant, warmup_steps: 1}
"""
STUDY = """
name: branches
question: What does a decay add?
base: base.yaml
num_gpus: 2
axes:
  schedule:
    decayed:
      train.start_from: "{runs}/constant_{size}_{rate}/checkpoints/iter_0000080"
      schedule.kind: wsd
    constant: {}
    epochs: {train.steps: null, train.epochs: 2, train.start_from: "{runs}/constant_{size}_{rate}"}
  size:
    small: {config: small.yaml}
    wide: {config: [small.yaml, wide.yaml], model.num_layers: 4}
  rate: {r1: {}, r2: {}, r3: {}}
combined:
  - {at: {rate: r1}, set: {optimizer.lr: 0.1}}
  - {at: {rate: [r2, r3]}, set: {optimizer.lr: 0.2}}
  - {at: {rate: r2, size: [wide]}, set: {optimizer.lr: 0.3}}
leave_out:
  - {size: [small, wide], rate: r3}
  - {schedule: epochs, size: small}
"""
LINES = """\
# branches: What does a decay add?
constant_small_r1  --config base.yaml --config small.yaml --optimizer.lr 0.1
constant_small_r2  --config base.yaml --config small.yaml --optimizer.lr 0.2
constant_wide_r1  --config base.yaml --config small.yaml --config wide.yaml --model.num_layers 4 --optimizer.lr 0.1
constant_wide_r2  --config base.yaml --config small.yaml --config wide.yaml --model.num_layers 4 --optimizer.lr 0.3
# --array=4-9, once all runs above are finished:
decayed_small_r1  --config base.yaml --config small.yaml --train.start_from out/runs/constant_small_r1/checkpoints/iter_0000080 --schedule.kind wsd --optimizer.lr 0.1  # after constant_small_r1
decayed_small_r2  --config base.yaml --config small.yaml --train.start_from out/runs/constant_small_r2/checkpoints/iter_0000080 --schedule.kind wsd --optimizer.lr 0.2  # after constant_small_r2
decayed_wide_r1  --config base.yaml --config small.yaml --config wide.yaml --train.start_from out/runs/constant_wide_r1/checkpoints/iter_0000080 --schedule.kind wsd --model.num_layers 4 --optimizer.lr 0.1  # after constant_wide_r1
decayed_wide_r2  --config base.yaml --config small.yaml --config wide.yaml --train.start_from out/runs/constant_wide_r2/checkpoints/iter_0000080 --schedule.kind wsd --model.num_layers 4 --optimizer.lr 0.3  # after constant_wide_r2
epochs_wide_r1  --config base.yaml --config small.yaml --config wide.yaml --train.steps null --train.epochs 2 --train.start_from out/runs/constant_wide_r1 --model.num_layers 4 --optimizer.lr 0.1  # after constant_wide_r1
epochs_wide_r2  --config base.yaml --config small.yaml --config wide.yaml --train.steps null --train.epochs 2 --train.start_from out/runs/constant_wide_r2 --model.num_layers 4 --optimizer.lr 0.3  # after constant_wide_r2
"""  # noqa: E501


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the study's files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "small.yaml").write_text("model: {ffn_hidden_size: 48, num_layers: 3}")
    (tmp_path / "wide.yaml").write_text("model: {hidden_size: 64}")
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path


def test_the_list_is_in_waves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "plan", "--study", "study.yaml", "--output_dir", "out"]) == 0
    assert (folder / "out/sweep.txt").read_text() == LINES
    told = capsys.readouterr().out
    start = "LIST=out/sweep.txt SWEEP_DIR=out/runs sbatch --array="
    assert f"{start}0-3 slurm/sweep.sbatch\n" in told
    assert f"{start}4-9 --dependency=afterok:JOB slurm/sweep.sbatch" in told
    assert "2 GPUs a run" in told


def test_all_at_once_is_each_alone(folder: Path) -> None:
    study = read_study(Path("study.yaml"))
    configs = study.configs(Path("out/runs"), 2)
    assert list(configs) == [run.name for run in study.runs]
    for run in study.runs:
        flags = [*run.flags_in(Path("out/runs")), "--train.output_dir", f"out/runs/{run.name}"]
        assert configs[run.name] == resolve(parse(RunConfig, flags, "train"))
    wide = configs["decayed_wide_r2"]
    model = wide.model
    assert (model.hidden_size, model.ffn_hidden_size, model.num_layers) == (64, 48, 4)
    assert (wide.optimizer.lr, wide.schedule.kind) == (0.3, "wsd")
    assert configs["decayed_small_r2"].optimizer.lr == 0.2
    keys = {"model.hidden_size", "model.ffn_hidden_size", "model.num_layers", "optimizer.lr"}
    assert keys | {"train.start_from", "schedule.kind"} < set(study.settings)
    assert "config" not in study.settings


def test_a_branch_costs_what_it_trains(folder: Path) -> None:
    flags = ["--study", "study.yaml", "--output_dir", "out", "--gpu", "A100", "--mfu", "0.5"]
    assert cli.main(["study", "plan", *flags]) == 0
    plan = json.loads((folder / "out/plan.json").read_text())
    costs = {cost["name"]: cost for cost in plan["runs"]}
    tokens = {name: cost["tokens"] for name, cost in costs.items()}
    assert tokens["constant_small_r1"] == 100 * 64
    assert tokens["decayed_small_r1"] == 20 * 64
    # 1,601 tokens are 101 windows of 16 tokens; twice that in batches of 4 are 51 steps.
    assert costs["epochs_wide_r1"]["steps"] == 51
    assert tokens["epochs_wide_r1"] == 0  # its parent has taken 100 steps
    config = read_study(Path("study.yaml")).configs(Path("out/runs"), 2)["decayed_small_r1"]
    flops = training_flops(config.model, config.objective)
    cost = costs["decayed_small_r1"]
    assert cost["training_flops"] == pytest.approx(20 * 64 * flops.fine)
    assert cost["training_flops_six_n"] == pytest.approx(
        20 * 64 * 6 * count_parameters(config.model).total
    )
    assert cost["training_flops_six_p_and_attention"] == 20 * 64 * flops.six_p_and_attention
    assert cost["gpu_hours"] == pytest.approx(20 * 64 * flops.fine / (0.5 * 312e12) / 3600)
    assert plan["tokens"] == sum(tokens.values())
    assert plan["gpu_hours"] == pytest.approx(sum(cost["gpu_hours"] for cost in costs.values()))
    by_gpu = plan["gpu_hours_by_gpu"]
    assert by_gpu["A100"] == pytest.approx(plan["gpu_hours"])
    assert by_gpu["H100"] == pytest.approx(plan["gpu_hours"] * 312 / 989)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("at: {rate: r1}", "at: {rate: r9}"), "combined entry 1: at names rate: r9, which is"),
        (("at: {rate: r1}", "at: {speed: r1}"), "combined entry 1: at names speed, which is no"),
        (("at: {rate: r1}, set", "on: {rate: r1}, set"), "expected at: {axis: label} and set:"),
        (("set: {optimizer.lr: 0.1}", "set: {config: wide.yaml}"), "expected at: {axis: label}"),
        (("at: {rate: r1}", "at: {}"), "combined entry 1: at has {}; expected axis"),
        (("size: [small, wide], r", "size: [small, broad], r"), "entry 1 names size: broad"),
        (("num_gpus: 2", "set: {config: wide.yaml}"), "set has config; name files of every run"),
        (("num_gpus: 2", "num_gpus: two"), "num_gpus is 'two'; expected a whole number"),
        (("config: small.yaml", "config: 3"), "axes.size.small.config is 3; expected a file"),
        (("config: small.yaml", "config: little.yaml"), "little.yaml: cannot read the file"),
        (("constant_{size}_{rate}/", "constant_{size}/"), "constant_small, which is no run of"),
        (
            ("constant: {}", 'constant: {train.start_from: "{runs}/decayed_{size}_{rate}"}'),
            "these runs wait for each other: decayed_small_r1, ",
        ),
    ],
)
def test_refused(folder: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in STUDY
    (folder / "study.yaml").write_text(STUDY.replace(*change))
    with pytest.raises(ValueError, match=r"study|\.yaml") as caught:
        read_study(Path("study.yaml"))
    assert message in str(caught.value)


def test_a_study_of_510_runs_is_planned_in_seconds(folder: Path) -> None:
    """As large as the largest published one."""
    axes = {
        axis: {f"{axis}{n}": {key: start + n} for n in range(count)}
        for axis, key, start, count in (
            ("a", "model.ffn_hidden_size", 32, 17),
            ("b", "train.steps", 10, 6),
            ("c", "optimizer.lr", 1, 5),
        )
    }
    study = {"name": "many", "base": "base.yaml", "axes": axes}
    (folder / "many.yaml").write_text(json.dumps(study))
    started = time.process_time()
    assert cli.main(["study", "plan", "--study", "many.yaml", "--output_dir", "many"]) == 0
    assert time.process_time() - started < 20
    assert len(json.loads((folder / "many/plan.json").read_text())["runs"]) == 510
