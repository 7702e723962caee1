"""`megatron-dlm train` as the user starts it: in this process, as real ranks, or under torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkedCommand
from free_port import free_port
from tiny_corpus import TinyCorpus

START_SECONDS = 240.0
"""Far more than a start takes, even on a busy machine; a hang ends here."""
_ROOT = Path(__file__).parents[1]
_SETTINGS: dict[str, Any] = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_attention_heads": 4,
    "model.seq_length": 32,
    "objective.kind": "masked",
    "optimizer.lr": 3e-3,
    "schedule.warmup_steps": 2,
    "train.steps": 24,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.precision": "fp32",
    "train.device": "cpu",
    "checkpoint.interval_steps": 4,
    "checkpoint.keep_last": 0,
    "validation.interval_steps": 8,
    "validation.num_samples": 8,
    "logging.interval_steps": 1,
    "logging.tensorboard": False,
}


def arguments(corpus: TinyCorpus, output_dir: Path, **changes: Any) -> list[str]:
    """Flags of a tiny run; `section__key=value` changes one, None leaves it out."""
    settings = {
        **_SETTINGS,
        "data.train": {str(corpus.train): 1.0},
        "data.valid": {str(corpus.valid): 1.0},
        "data.tokenizer": str(corpus.tokenizer),
        "train.output_dir": str(output_dir),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return ["train", *(_flag(name, value) for name, value in settings.items() if value is not None)]


def _flag(name: str, value: Any) -> str:
    return f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}"


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    output: str
    errors: str

    def error_lines(self) -> list[str]:
        """What our command line says went wrong."""
        return [line for line in self.errors.splitlines() if line.startswith("megatron-dlm ")]


class Job:
    """One started process in its own process group, its output in files."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        program: Sequence[str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """`megatron-dlm arguments` under a `program`; in a fork if that is None."""
        self._log = log
        variables = {
            **os.environ,
            "PYTHONPATH": str(_ROOT),
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        self.process: subprocess.Popen[bytes] | ForkedCommand
        if program is None:
            self.process = ForkedCommand(arguments, log, variables)
            return
        with (
            log.with_suffix(".out").open("w") as output,
            log.with_suffix(".err").open("w") as errors,
        ):
            self.process = subprocess.Popen(
                [*program, "megatron_dlm", *arguments],
                stdout=output,
                stderr=errors,
                cwd=log.parent,
                env=variables,
                start_new_session=True,
            )

    def end(self, timeout: float = START_SECONDS) -> Ended:
        """Wait for it; a process that does not end in time is a failure, never a hang."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"no end after {timeout} s:\n{self._read('.out')}\n{self._read('.err')}")
        return Ended(code, self._read(".out"), self._read(".err"))

    def kill(self) -> None:
        """kill -9 of it and of all that it started."""
        for process in [*_descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()

    def wait_for(self, condition: Callable[[], bool], *, interval: float = 0.002) -> None:
        """Poll until the condition holds; fails if the process ends or takes too long before."""
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"waited in vain:\n{self._read('.out')}\n{self._read('.err')}")
            time.sleep(interval)

    def workers(self) -> list[int]:
        """Process ids of the ranks that torchrun started."""
        return _children(self.process.pid)

    def _read(self, suffix: str) -> str:
        return self._log.with_suffix(suffix).read_text()


def _children(process: int) -> list[int]:
    try:
        return [
            int(i) for i in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _descendants(process: int) -> Iterator[int]:
    for child in _children(process):
        yield child
        yield from _descendants(child)


def start(
    arguments: Sequence[str],
    log: Path,
    *,
    num_ranks: int = 1,
    wrapper: Sequence[str] = (),
    imports: bool = False,
) -> Job:
    """`python -m megatron_dlm ...`, under torchrun if there are several ranks.

    imports: training starts in a new interpreter, seconds later.
    """
    if arguments[0] == "train" and num_ranks == 1 and not wrapper and not imports:
        return Job(arguments, log)
    program = [*wrapper, sys.executable, "-m"]
    if num_ranks > 1:
        program += ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m"]
    return Job(arguments, log, program=program)


def start_ranks(
    arguments: Sequence[str],
    log: Path,
    *,
    num_ranks: int = 2,
    wrappers: dict[int, Sequence[str]] | None = None,
    imports: bool = False,
) -> list[Job]:
    """Ranks without a launcher: nobody kills the others when one fails, each ends by itself."""
    port = free_port()
    jobs = []
    for rank in range(num_ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        wrapper = (wrappers or {}).get(rank, () if imports else None)
        program = None if wrapper is None else [*wrapper, sys.executable, "-m"]
        place = log.with_name(f"{log.name}_rank{rank}")
        jobs.append(Job(arguments, place, program=program, environment=environment))
    return jobs


def run_here(arguments: Sequence[str]) -> int:
    """The same command in this process, one rank: seconds faster, the same code."""
    from megatron_dlm.cli import main

    return main(list(arguments))


def metrics(output_dir: Path, split: str = "train") -> dict[int, dict[str, float]]:
    """step -> what metrics.jsonl says of it."""
    entries = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    chosen = [entry for entry in entries if entry["split"] == split]
    steps = [entry["step"] for entry in chosen]
    assert steps == sorted(set(steps)), f"steps repeat or go back: {steps}"
    return {entry["step"]: entry for entry in chosen}


def assert_same_curves(first: Path, second: Path, *, tolerance: float = 1e-5) -> None:
    """Both runs logged the same steps with the same numbers, in training and in validation."""
    for split in ("train", "valid"):
        one, two = metrics(first, split), metrics(second, split)
        assert list(one) == list(two)
        for step, entry in one.items():
            for name in {"loss", "nelbo", "grad_norm", "lr", "tokens", "epoch"} & set(entry):
                assert two[step][name] == pytest.approx(entry[name], rel=tolerance, abs=0), (
                    f"{split} step {step} {name}"
                )


def published(output_dir: Path) -> list[int]:
    """Steps of the checkpoints that have their final name."""
    found = (output_dir / "checkpoints").glob("iter_*")
    return sorted(int(path.name[5:]) for path in found if path.name[5:].isdigit())


def latest(output_dir: Path) -> int:
    """Step in latest_checkpointed_iteration.txt; 0 before there is one."""
    path = output_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(path.read_text()) if path.exists() else 0
