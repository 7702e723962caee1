"""`study run`: runs that go on from others, runs that fail, a stop signal. Real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny_corpus import TinyCorpus

from megatron_dlm.training.status import read_status


def write_study(folder: Path, corpus: TinyCorpus, axes: str, *, steps: int) -> Path:
    path = folder / "study.yaml"
    path.write_text(f"""
name: order
set:
  model.num_layers: 1
  model.hidden_size: 32
  model.num_attention_heads: 2
  model.seq_length: 32
  data.tokenizer: {corpus.tokenizer}
  data.train: {{{corpus.train}: 1.0}}
  train.steps: {steps}
  train.global_batch_size: 4
  train.micro_batch_size: 4
  train.precision: fp32
  train.device: cpu
  schedule.kind: constant
  schedule.warmup_steps: 1
  checkpoint.interval_steps: 4
  checkpoint.keep_last: 0
  logging.interval_steps: 1
  logging.tensorboard: false
axes:
{axes}
""")
    return path


@contextmanager
def running(study: Path) -> Iterator[subprocess.Popen[str]]:
    """`study run` with two workers; whatever happens, its runs end with it."""
    place = ["--study", str(study), "--output_dir", str(study.parent / "out"), "--workers", "2"]
    command = [sys.executable, "-m", "megatron_dlm", "study", "run", *place]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate()


def steps(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_run_starts_when_its_parent_is_finished(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    axes = """
  stage:
    decay: {train.start_from: "{runs}/constant/checkpoints/iter_0000004", schedule.kind: wsd,
            schedule.decay_fraction: 0.3}
    constant: {}
    broken: {data.unique_tokens: 10000000000}
    lost: {train.start_from: "{runs}/broken"}
    lost2: {train.start_from: "{runs}/lost"}
"""
    with running(write_study(tmp_path, tiny_corpus, axes, steps=6)) as process:
        told, wrong = process.communicate(timeout=290)
    assert process.returncode == 2, told + wrong
    lines = [line for line in told.splitlines() if line.endswith((": decay", ": constant"))]
    assert lines == [
        "begins: constant",
        "finished: constant",
        "begins: decay",
        "finished: decay",
    ]
    assert "not started: lost needs broken" in told
    assert "not started: lost2 needs lost" in told
    assert "3 of 5 runs failed: broken, lost, lost2" in wrong
    assert steps(tmp_path / "out/runs/constant") == [1, 2, 3, 4, 5, 6]
    assert steps(tmp_path / "out/runs/decay") == [5, 6]


def test_a_stop_signal_saves_and_the_same_command_goes_on(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    axes = "  seed: {s1: {train.seed: 1}, s2: {train.seed: 2}, s3: {train.seed: 3}}"
    study = write_study(tmp_path, tiny_corpus, axes, steps=100_000)
    runs = [tmp_path / "out/runs" / name for name in ("s1", "s2")]
    with running(study) as process:
        deadline = time.monotonic() + 240
        while not all((run / "metrics.jsonl").exists() for run in runs):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        told, wrong = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM, told + wrong
    assert "stopped; the same command goes on from here" in told
    saved = {}
    for run in runs:
        status = read_status(run)
        assert status is not None
        assert status.state == "preempted"
        assert (run / f"checkpoints/iter_{status.step:07d}").is_dir()
        saved[run] = status.step
    assert not (tmp_path / "out/runs/s3").exists()

    write_study(tmp_path, tiny_corpus, axes, steps=max(saved.values()) + 2)
    with running(study) as process:
        told, wrong = process.communicate(timeout=290)
    assert process.returncode == 0, told + wrong
    assert told.count("finished: ") == 3
    for run, step in saved.items():
        assert json.loads((run / "run.json").read_text())["resumed_from_step"] == step
        assert steps(run) == list(range(1, max(saved.values()) + 3))


def test_only_needs_the_parent_finished(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    axes = '  stage: {constant: {}, decay: {train.start_from: "{runs}/constant"}}'
    study = write_study(tmp_path, tiny_corpus, axes, steps=6)
    place = ["--study", str(study), "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-m", "megatron_dlm", "study", "run", *place, "--only", "decay"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert answer.returncode == 2
    assert "not started: decay needs constant" in answer.stdout
    assert not (tmp_path / "out/runs").exists()
