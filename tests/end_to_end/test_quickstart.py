"""The quickstart, shortened: all files, what a second start skips, what stops it early."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from command_line import Ended, Job, latest, metrics, start

from megatron_dlm.config.commands import QuickstartConfig
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.launch.quickstart import quickstart

STEPS = 6


def start_quickstart(directory: Path, **changes: object) -> Job:
    settings = {"output_dir": directory / "out", "steps": STEPS, "unique_tokens": 4096, **changes}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return start(["quickstart", *flags], directory / "log")


def run_quickstart(directory: Path) -> Ended:
    return start_quickstart(directory).end(timeout=280)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    directory = tmp_path_factory.mktemp("quickstart")
    return directory, run_quickstart(directory)


def test_everything_is_there(finished: tuple[Path, Ended]) -> None:
    directory, ended = finished
    assert ended.code == 0, ended.errors
    root = directory / "out"
    assert (root / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = (root / "samples.txt").read_text()
    assert samples.count("=== autoregressive") == samples.count("=== masked") == 4
    for name in ("ar", "masked"):
        assert max(metrics(root / name)) == STEPS
        assert max(metrics(root / name, "valid")) == STEPS
    for part in ("curves.png", "samples.txt", "ar.yaml", "tokenizer", "Try next"):
        assert part in ended.output
    assert not list(root.rglob("*.tmp"))


def test_both_runs_differ_in_the_objective_only(finished: tuple[Path, Ended]) -> None:
    root = finished[0] / "out"
    ar, masked = (
        parse(RunConfig, ["--config", str(root / f"{name}.yaml")], "test")
        for name in ("ar", "masked")
    )
    assert (ar.objective.kind, masked.objective.kind) == ("autoregressive", "masked")
    for section in ("model", "data", "optimizer", "schedule", "parallel", "validation"):
        assert getattr(ar, section) == getattr(masked, section)


def test_text_that_is_held_out_is_not_trained_on(finished: tuple[Path, Ended]) -> None:
    corpus = finished[0] / "out" / "corpus"
    train, valid = (
        set((corpus / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "valid")
    )
    assert len(train) > len(valid) > 100
    assert not train & valid


def test_a_second_start_repeats_nothing(finished: tuple[Path, Ended]) -> None:
    directory, first = finished
    root = directory / "out"
    kept = [path for path in root.rglob("*") if path.is_file() and path.name != "curves.png"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    second = run_quickstart(directory)
    assert second.code == 0, second.errors
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert first.output.count("\n$ ") == 5
    assert second.output.count("\n$ ") == 0


def test_a_stop_signal_saves_and_ends_without_a_traceback(
    finished: tuple[Path, Ended], tmp_path: Path
) -> None:
    root = tmp_path / "out"
    for part in ("corpus", "tokenizer", "data"):
        shutil.copytree(finished[0] / "out" / part, root / part)
    job = start_quickstart(tmp_path, steps=100_000)
    job.wait_for(lambda: (root / "ar" / "metrics.jsonl").exists() and bool(metrics(root / "ar")))
    job.process.send_signal(signal.SIGTERM)
    ended = job.end()
    assert ended.code == 128 + signal.SIGTERM
    assert "Traceback" not in ended.errors
    assert "the same command goes on from here" in ended.output
    assert latest(root / "ar") >= 10
    assert not (root / "masked").exists()


def test_a_failing_step_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    (tmp_path / "out" / "tokenizer" / "thesis.txt").write_text("do not touch")
    ended = run_quickstart(tmp_path)
    assert ended.code == 2
    said = ended.error_lines()
    assert "thesis.txt" in said[0]
    assert said[1].startswith("megatron-dlm quickstart: error: `megatron-dlm ... tokenizer` ended")


def test_ranks_that_cannot_share_the_batch(tmp_path: Path) -> None:
    config = QuickstartConfig(output_dir=str(tmp_path / "out"), num_ranks=3)
    with pytest.raises(ValueError, match="num_ranks is 3"):
        quickstart(config)
    assert not (tmp_path / "out").exists()
