"""Workers end with an error of their own, with one of another, and with their reader."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from mixed_corpus import MixedCorpus, make_mixed_corpus

from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.inputs.input_plan import Job, find_files, plan_digest, plan_jobs
from megatron_dlm.data.preprocessing.job_workers import run_jobs
from megatron_dlm.data.preprocessing.recipe import Recipe
from megatron_dlm.data.preprocessing.stop_request import Stopped, StopRequest
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> MixedCorpus:
    return make_mixed_corpus(tmp_path_factory.mktemp("corpus"))


Work = tuple[dict[int, Job], PreprocessConfig, Recipe]


@pytest.fixture
def work(corpus: MixedCorpus, tmp_path: Path) -> Work:
    """What `preprocess` would give the workers."""
    config = PreprocessConfig(
        corpus.files, str(tmp_path / "text"), corpus.tokenizer, shard_size_bytes=30_000
    )
    jobs = plan_jobs(find_files(config.input), job_bytes=config.shard_size_bytes)
    tokenizer = load_tokenizer(corpus.tokenizer)
    recipe = Recipe(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        normalization=tokenizer.metadata.normalization,
        eod_id=tokenizer.eod_id,
        mask_id=tokenizer.mask_id,
        text_field=config.text_field,
        minimum_characters=1,
        validation_fraction=0.0,
        shard_size_bytes=config.shard_size_bytes,
        inputs_sha256=plan_digest(jobs),
        num_jobs=len(jobs),
    )
    return dict(enumerate(jobs)), config, recipe


def never() -> None:
    pass


def children() -> set[int]:
    """Workers of this process; the tracker that multiprocessing starts once is none."""
    own = os.getpid()
    found = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in found}
    return {child for child, command in commands.items() if b"spawn_main" in command}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_reports_add_up(work: Work, corpus: MixedCorpus, num_workers: int) -> None:
    before = children()
    reports = list(run_jobs(*work, num_workers=num_workers, check=never))
    assert sorted(r.job for r in reports if r.progress is None) == list(work[0])
    steps = [report.progress for report in reports if report.progress is not None]
    assert sum(step.documents for step in steps) == len(corpus.texts)
    assert sum(step.tokens for step in steps) > len(corpus.texts)
    assert {report.encoder for report in reports} == {reports[0].encoder}
    assert children() == before


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_defect_keeps_its_traceback(work: Work, num_workers: int) -> None:
    jobs, config, recipe = work
    broken = replace(recipe, vocab_size="many")  # type: ignore[arg-type]
    before = children()
    with pytest.raises((RuntimeError, TypeError), match=r"TypeError|not supported") as caught:
        list(run_jobs(jobs, config, broken, num_workers=num_workers, check=never))
    if num_workers > 1:
        assert 'shard_writer.py"' in str(caught.value)
    assert children() == before


def test_a_tokenizer_that_changes_meanwhile(work: Work) -> None:
    jobs, config, recipe = work
    with pytest.raises(ValueError, match=r"tokenizer .* changed meanwhile"):
        list(
            run_jobs(jobs, config, replace(recipe, tokenizer_sha256=""), num_workers=2, check=never)
        )


@pytest.mark.parametrize("num_workers", [1, 2])
def test_nobody_works_on_when_nobody_listens(work: Work, tmp_path: Path, num_workers: int) -> None:
    before = children()
    with closing(run_jobs(*work, num_workers=num_workers, check=never)) as reports:
        next(reports)
    assert children() == before
    assert not list(tmp_path.glob("*.tmp"))
    assert len(list(tmp_path.glob("*.manifest.json"))) < len(work[0])


def raised(action: Callable[[], None]) -> int | None:
    try:
        action()
    except Stopped as stopped:
        return stopped.number
    return None


def test_a_stop_signal_waits_until_it_is_asked_for_and_a_second_one_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert raised(stop.check) is None
        os.kill(os.getpid(), signal.SIGINT)
        assert raised(stop.check) == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal comes in its own time
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def enter() -> None:
        with StopRequest() as stop:
            stop.check()
            assert signal.getsignal(signal.SIGTERM) is before
        done.set()

    done = threading.Event()
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert done.is_set()
