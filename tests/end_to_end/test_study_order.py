"""`study run`: order, failures, and every way in which it may end early. Real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_corpus import TinyCorpus

from megatron_dlm import cli
from megatron_dlm.scaling.run_state import owner_of, state_of
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


def wait_for(process: subprocess.Popen[str], *runs: Path) -> None:
    """Until all of these have reported."""
    deadline = time.monotonic() + 240
    while not all((run / "metrics.jsonl").exists() for run in runs):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


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
        wait_for(process, *runs)
        # What a terminal sends when it is closed; SIGTERM and Ctrl-C are the same to us.
        process.send_signal(signal.SIGHUP)
        told, wrong = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGHUP, told + wrong
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
    last = max(saved.values()) + 2
    for run, step in saved.items():
        assert json.loads((run / "run.json").read_text())["resumed_from_step"] == step
        assert steps(run) == list(range(1, last + 1))

    # What is finished is no run of a study that says something else.
    write_study(tmp_path, tiny_corpus, axes, steps=last + 1)
    with running(study) as process:
        told, wrong = process.communicate(timeout=240)
    assert process.returncode == 2, told + wrong
    assert (
        f"finished runs are not those of the study: s1, s2, s3: were trained with train.steps "
        f"{last}, the study says {last + 1}; give another output_dir, or remove the folders of "
        "these runs under"
    ) in wrong
    assert steps(runs[0])[-1] == last


def test_only_must_name_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.yaml").write_text(
        "set: {model.vocab_size: 9, objective.mask_token_id: 8, train.steps: 9}\n"
        "axes: {seed: {s1: {train.seed: 1}, s2: {train.seed: 2}}}\n"
    )
    place = ["--study", str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["study", "run", *place, "--only", "s3,s4"]) == 2
    message = "only s3, s4: no run has that in its name (have: s1, s2)"
    assert message in capsys.readouterr().err


def test_only_needs_the_parent_finished(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    axes = '  stage: {constant: {}, decay: {train.start_from: "{runs}/constant"}}'
    study = write_study(tmp_path, tiny_corpus, axes, steps=6)
    place = ["--study", str(study), "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-m", "megatron_dlm", "study", "run", *place, "--only", "decay"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert answer.returncode == 2
    assert "not started: decay needs constant" in answer.stdout
    assert not (tmp_path / "out/runs").exists()


def test_no_run_outlives_it_when_nobody_reads_what_it_says(
    tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """`study run | head`: the next line that it prints ends it, and its runs save."""
    axes = "  length: {long: {train.steps: 100000}, short: {train.steps: 40}}"
    study = write_study(tmp_path, tiny_corpus, axes, steps=1)
    long = tmp_path / "out/runs/long"
    with running(study) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(3):  # how many runs, and that two of them begin
            assert process.stdout.readline()
        process.stdout.close()
        wrong = process.stderr.read()
        assert process.wait(240) == 2
    assert "Broken pipe" in wrong
    assert state_of(tmp_path / "out/runs/short").state == "finished"
    found = state_of(long)
    assert found.state == "preempted"
    assert owner_of(long) is None
    if found.step:
        assert (long / f"checkpoints/iter_{found.step:07d}").is_dir()


def test_runs_of_a_killed_runner_are_waited_for(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """Its runs go on without it. They are not failures, and what needs them still starts."""
    axes = """
  stage: {constant: {}, decay: {train.start_from: "{runs}/constant", train.steps: 204}}
"""
    study = write_study(tmp_path, tiny_corpus, axes, steps=200)
    constant = tmp_path / "out/runs/constant"
    with running(study) as process:
        wait_for(process, constant)
        owner = owner_of(constant)
        assert owner is not None
        os.kill(owner.pid, signal.SIGSTOP)  # so that it is still there when the next one looks
        process.kill()
        process.communicate()
    try:
        assert state_of(constant).state == "running"
        with running(study) as process:
            assert process.stdout is not None
            assert "2 runs, 0 of them finished" in process.stdout.readline()
            wanted = f"waiting for constant, which is trained by process {owner.pid} on "
            assert process.stdout.readline().startswith(wanted)
            os.kill(owner.pid, signal.SIGCONT)
            told, wrong = process.communicate(timeout=290)
        assert process.returncode == 0, told + wrong
        assert told.splitlines() == ["finished: constant", "begins: decay", "finished: decay"]
    finally:
        if owner_of(constant) == owner:
            os.kill(owner.pid, signal.SIGKILL)
