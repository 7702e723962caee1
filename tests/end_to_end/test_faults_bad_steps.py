"""NaN and loss spikes: stop, or go back and leave the bad batches out.

The data is one token over and over, with a few documents of noise: what a window of those does to
the loss is a real spike.
"""

from __future__ import annotations

import itertools
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import arguments, metrics, published, run_here, start_ranks
from tiny_corpus import TinyCorpus

from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import prepare
from megatron_dlm.data.storage.shard_writer import ShardWriter
from megatron_dlm.training.status import read_status

NUM_STEPS = 40
_SETTINGS = {
    "data__tokenizer": None,
    "data__valid": {},
    "model__vocab_size": 64,
    "model__num_layers": 1,
    "objective__kind": "autoregressive",
    "train__steps": NUM_STEPS,
    "schedule__kind": "constant",
    "optimizer__lr": 1e-2,
    "checkpoint__interval_steps": 3,
    "checkpoint__keep_last": 2,
    "recovery__on_bad_step": "rollback",
    "recovery__spike_factor": 3.0,
    "recovery__spike_window_steps": 4,
    "recovery__max_rollbacks": 10,
}


@pytest.fixture(scope="module")
def spiky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of such a dataset."""
    prefix = tmp_path_factory.mktemp("spiky") / "train"
    random = np.random.default_rng(7)
    with ShardWriter(prefix, vocab_size=64) as writer:
        for number in range(330):
            is_noise = number % 110 == 50
            writer.add_document(random.integers(1, 60, 32) if is_noise else np.full(32, 5))
        writer.publish()
    return prefix


def command(corpus: TinyCorpus, spiky: Path, run: Path, **changes: Any) -> list[str]:
    settings = {**_SETTINGS, "data__train": {str(spiky): 1.0}, **changes}
    return arguments(corpus, run, **settings)


@pytest.fixture(scope="module")
def rolled_back(
    spiky: Path, tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that was never interrupted and rolled back by itself."""
    run = tmp_path_factory.mktemp("rolled_back") / "run"
    assert run_here(command(tiny_corpus, spiky, run)) == 0
    assert len(rollbacks(run)) >= 2, "the data has spikes"
    return run


def rollbacks(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["kind"] == "rollback"]


def numbers(run: Path) -> dict[int, tuple[float, ...]]:
    names = ("loss", "grad_norm", "lr", "tokens", "epoch")
    return {
        step: tuple(entry[name] for name in names if name in entry)
        for step, entry in metrics(run).items()
    }


def trained_on(flags: list[str], batch_numbers: list[int]) -> list[tuple[float, float]]:
    """Loss and gradient norm of every update of a run that never sees other batches."""
    from megatron_dlm.data.loader import read_micro_batch
    from megatron_dlm.runtime.device import open_device
    from megatron_dlm.runtime.parallel import parallel_context
    from megatron_dlm.training.optimizer import set_learning_rate
    from megatron_dlm.training.run_directory import RunDirectory
    from megatron_dlm.training.schedule import learning_rate
    from megatron_dlm.training.setup import open_run, open_sources
    from megatron_dlm.training.step import train_step

    config = prepare(parse(RunConfig, flags, "test"))
    device, directory = open_device("cpu"), RunDirectory(config.train.output_dir)
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    found = []
    with parallel_context(config.parallel, device) as parallel, ExitStack() as held:
        sources = open_sources(config, directory, parallel, held)
        run = open_run(config, sources, directory, device=device, parallel=parallel)
        for step, number in enumerate(batch_numbers, start=1):
            first = (number - 1) * size
            samples = range(first, first + size, micro)
            batch = [read_micro_batch(sources.corpus, sample, micro) for sample in samples]
            rate = learning_rate(step, sources.num_steps, config.optimizer, config.schedule)
            set_learning_rate(run.optimizer, rate)
            norm = train_step(run.training, run.optimizer, batch)
            found.append((run.training.metrics.reduce()["loss"], norm))
    return found


def test_rollback_equals_a_run_that_never_saw_the_skipped_batches(
    spiky: Path, tiny_corpus: TinyCorpus, rolled_back: Path, tmp_path: Path
) -> None:
    skipped = rollbacks(rolled_back)[-1]["skipped"]
    left_out = {batch for first, last in skipped for batch in range(first, last + 1)}
    assert left_out
    taken = itertools.islice((n for n in itertools.count(1) if n not in left_out), NUM_STEPS)
    expected = trained_on(command(tiny_corpus, spiky, tmp_path / "other")[1:], list(taken))
    found = metrics(rolled_back)
    assert list(found) == list(range(1, NUM_STEPS + 1)), "every update is reported once"
    assert [(entry["loss"], entry["grad_norm"]) for entry in found.values()] == expected


def test_rollback_is_explained(rolled_back: Path) -> None:
    for event in rollbacks(rolled_back):
        # The newest checkpoint, of every third step, and what came after it.
        assert event["to_step"] == (event["step"] - 1) // 3 * 3
        assert (
            "times the mean of the 4 steps before it (recovery.spike_factor 3)" in event["reason"]
        )
    first = rollbacks(rolled_back)[0]
    assert first["skipped"] == [[first["to_step"] + 1, first["step"]]]
    log = (rolled_back / "train.log").read_text()
    assert f"{first['reason']}: back to step {first['to_step']}, batches" in log
    status = read_status(rolled_back)
    assert status is not None
    assert (status.state, status.step, status.reason) == ("finished", NUM_STEPS, None)


def test_interrupted_and_resumed_it_gives_the_same_numbers(
    spiky: Path, tiny_corpus: TinyCorpus, rolled_back: Path, tmp_path: Path
) -> None:
    """Stopped before, between and after the rollbacks; in the middle of the window, too."""
    run = tmp_path / "run"
    first, *_, last = rollbacks(rolled_back)
    stops = sorted({first["to_step"] - 1, first["step"] + 1, last["step"], NUM_STEPS})
    for stop in stops:
        assert run_here(command(tiny_corpus, spiky, run, train__steps=stop)) == 0
    assert numbers(run) == numbers(rolled_back)


def test_a_start_that_died_right_after_a_rollback_is_continued_without_the_bad_batches(
    spiky: Path, tiny_corpus: TinyCorpus, rolled_back: Path, tmp_path: Path
) -> None:
    """Nothing was saved since then but rollbacks.json."""
    run = tmp_path / "run"
    recorded = json.loads((rolled_back / "rollbacks.json").read_text())
    first = recorded[0]
    assert len(recorded) == len(rollbacks(rolled_back))
    flags = command(tiny_corpus, spiky, run)
    assert run_here([*flags, f"--train.steps={first['to_step']}"]) == 0
    (run / "rollbacks.json").write_text(json.dumps([first]))
    assert run_here(flags) == 0
    assert numbers(run) == numbers(rolled_back)
    assert [event["step"] for event in rollbacks(run)] == [past["step"] for past in recorded[1:]]
    assert json.loads((run / "rollbacks.json").read_text()) == recorded


def test_rollbacks_of_all_starts_count(
    spiky: Path,
    tiny_corpus: TinyCorpus,
    rolled_back: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    first = rollbacks(rolled_back)[0]
    flags = command(tiny_corpus, spiky, run, recovery__max_rollbacks=2)
    assert run_here([*flags, f"--train.steps={first['to_step']}"]) == 0
    earlier = [{"step": 1, "to_step": 0, "skipped": []}] * 2
    (run / "rollbacks.json").write_text(json.dumps(earlier))
    assert run_here(flags) == 2
    expected = f"{first['reason']}, after 2 rollbacks of this run (recovery.max_rollbacks)"
    assert expected in capsys.readouterr().err
    (run / "rollbacks.json").write_text('[{"step": 1}]')
    assert run_here(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: {run}/rollbacks.json is damaged (KeyError('to_step')); restore it" in line


def test_two_ranks_roll_back_alike_with_and_without_overlap(
    spiky: Path, tiny_corpus: TinyCorpus, rolled_back: Path, tmp_path: Path
) -> None:
    """And as one rank does, but for rounding, which Adam makes much of where gradients vanish."""
    overlap = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
    overlap |= {"checkpoint__asynchronous": True}
    found = []
    for name, changes in (("plain", {}), ("overlap", overlap)):
        run = tmp_path / name
        for job in start_ranks(
            command(tiny_corpus, spiky, run, **changes), tmp_path / f"log_{name}"
        ):
            ended = job.end()
            assert ended.code == 0, ended.errors
        skipped = [event["skipped"] for event in rollbacks(run)]
        assert skipped == [event["skipped"] for event in rollbacks(rolled_back)]
        found.append(numbers(run))
    assert found[0] == found[1]
    for step, expected in numbers(rolled_back).items():
        assert found[0][step] == pytest.approx(expected, rel=2e-2), step


def test_spike_ends_the_run_where_it_is_asked_to(
    spiky: Path,
    tiny_corpus: TinyCorpus,
    rolled_back: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert run_here(command(tiny_corpus, spiky, run, recovery__on_bad_step="stop")) == 2
    error = capsys.readouterr().err.strip()
    first = rollbacks(rolled_back)[0]
    assert f"error: {first['reason']}; the newest checkpoint is untouched" in error
    assert len(error.splitlines()) == 1
    assert max(metrics(run)) == first["step"] - 1
    status = read_status(run)
    assert status is not None
    assert (status.state, status.step) == ("failed", first["step"] - 1)
    assert first["reason"] in str(status.reason)


def test_divergence_ends_after_the_last_rollback(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    changes = {"optimizer__lr": 1e30, "checkpoint__interval_steps": 1, "optimizer__clip_grad": 0.0}
    changes |= {"recovery__on_bad_step": "rollback", "recovery__max_rollbacks": 2}
    assert run_here(arguments(tiny_corpus, run, **changes)) == 2
    error = capsys.readouterr().err
    assert "after 2 rollbacks of this run (recovery.max_rollbacks); lower optimizer.lr" in error
    assert len(rollbacks(run)) == 2
    assert all("gradient norm is" in event["reason"] for event in rollbacks(run))
    step = rollbacks(run)[-1]["to_step"]
    assert published(run)[-1] == step == max(metrics(run))


def test_nothing_to_go_back_to(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"optimizer__lr": 1e30, "optimizer__clip_grad": 0.0}
    changes |= {"checkpoint__interval_steps": 1000, "recovery__on_bad_step": "rollback"}
    assert run_here(arguments(tiny_corpus, tmp_path / "run", **changes)) == 2
    assert "there is no checkpoint of this run to go back to" in capsys.readouterr().err
