"""Tiny training jobs of several real ranks, and how `fault_campaign.py` kills them."""

from __future__ import annotations

import os
import random
import signal
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forked_command import Outcome, finish, run, start
from free_port import free_port

PHASES = ("start", "step", "validation", "save", "publish", "retention")
_STEPS, _SAVE_STEPS, _VALIDATION_STEPS = 40, 4, 5
_GIVE_UP_SECONDS, _POLL_SECONDS = 120.0, 0.0005


@dataclass(frozen=True)
class Scenario:
    """A layout and a way of saving."""

    name: str
    num_ranks: int
    flags: tuple[str, ...]


SCENARIOS = (
    Scenario("dp2", 2, ()),
    Scenario("dp2_async", 2, ("--checkpoint.asynchronous", "true")),
    Scenario("tp2", 2, ("--parallel.tensor_model_parallel_size", "2")),
    Scenario(
        "pp2_async",
        2,
        ("--parallel.pipeline_model_parallel_size", "2", "--checkpoint.asynchronous", "true"),
    ),
    Scenario("alone", 1, ()),
)


@dataclass(frozen=True)
class Kill:
    """One kill as it happened."""

    scenario: str
    phase: str
    signal: str
    target: str
    """one or all: the ranks that got the signal."""


def make_corpus(directory: Path) -> None:
    """A tokenizer and shards of the standard library's own sources."""
    directory.mkdir(parents=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [str(library / name) for name in ("bisect.py", "heapq.py", "textwrap.py", "sched.py")]
    tokenizer = str(directory / "tokenizer")
    for arguments in (
        ["tokenizer", "--input", *sources, "--output_dir", tokenizer, "--vocab_size", "400"],
        [
            *("preprocess", "--input", *sources, "--tokenizer", tokenizer, "--workers", "1"),
            *("--output_prefix", str(directory / "text"), "--validation_fraction", "0.3"),
        ],
    ):
        outcome = run(arguments, directory / "made.log", timeout_seconds=300)
        if outcome.status != 0:
            raise RuntimeError(outcome.errors)


def settings_of(scenario: Scenario, corpus: Path, directory: Path) -> list[str]:
    """The command line of a run of 40 steps that saves every 4 and validates every 5."""
    settings = {
        "model.num_layers": 2,
        "model.hidden_size": 64,
        "model.num_attention_heads": 4,
        "model.seq_length": 64,
        "data.tokenizer": corpus / "tokenizer",
        "data.train": f"{{{corpus / 'text'}: 1.0}}",
        "data.valid": f"{{{corpus / 'text_valid'}: 1.0}}",
        "train.steps": _STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.precision": "fp32",
        "train.device": "cpu",
        # Until a rank is there, only this ends one that waits for it.
        "parallel.distributed_timeout_minutes": 0.75,
        "train.output_dir": directory,
        "schedule.warmup_steps": 4,
        "checkpoint.interval_steps": _SAVE_STEPS,
        "checkpoint.keep_last": 2,
        "validation.interval_steps": _VALIDATION_STEPS,
        "validation.num_samples": 8,
        "logging.interval_steps": 1,
        "logging.tensorboard": "false",
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return ["train", *flags, *scenario.flags]


@dataclass
class Job:
    """A run, and the ranks of its present start."""

    scenario: Scenario
    directory: Path
    arguments: list[str]
    _children: list[int] = field(default_factory=list)
    _logs: list[Path] = field(default_factory=list)
    _statuses: dict[int, int] = field(default_factory=dict)

    def start(self) -> None:
        """Fork the ranks anew; they find each other through a port of this machine."""
        self._children, self._logs, self._statuses = [], [], {}
        port = free_port()
        for rank in range(self.scenario.num_ranks):
            log = self.directory.with_suffix(f".rank{rank}.log")
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.scenario.num_ranks),
                "LOCAL_WORLD_SIZE": str(self.scenario.num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            if self.scenario.num_ranks == 1:
                environment = {"OMP_NUM_THREADS": "1"}
            for old in (log, log.with_suffix(".err")):
                old.unlink(missing_ok=True)
            self._children.append(start(self.arguments, log, environment=environment))
            self._logs.append(log)

    def kill_at(self, phase: str, random_: random.Random) -> Kill | None:
        """Wait for a moment of this phase and kill; None if every rank had ended before."""
        begins = self._begin_of(phase, random_)
        delay = random_.expovariate(1 / _MEAN_DELAY_SECONDS[phase])
        name, target = random_.choice(("KILL", "TERM")), random_.choice(("one", "all"))
        victims = self._children if target == "all" else [random_.choice(self._children)]
        deadline = time.monotonic() + _GIVE_UP_SECONDS
        while not begins():
            if self._all_ended() or time.monotonic() > deadline:
                return None
            time.sleep(_POLL_SECONDS)  # the cores are for the ranks
        time.sleep(delay)
        if self._all_ended():
            return None
        for victim in victims:
            if victim not in self._statuses:
                os.kill(victim, getattr(signal, f"SIG{name}"))
        return Kill(self.scenario.name, phase, name, target)

    def wait(self, seconds: float) -> list[int | None]:
        """Exit status of every rank; None for one that had to be killed when the time was over."""
        deadline = time.monotonic() + seconds
        ended: list[int | None] = []
        for child, log in zip(self._children, self._logs, strict=True):
            if child in self._statuses:
                ended.append(self._statuses[child])
                continue
            left = max(deadline - time.monotonic(), 0.01)
            now = time.monotonic()
            outcome: Outcome = finish(child, log, timeout_seconds=left, started=now)
            ended.append(outcome.status)
        return ended

    def survivors(self, seconds: float) -> list[str]:
        """What the ranks left running so long after they ended, in words; it is killed."""
        deadline = time.monotonic() + seconds
        while left := processes_of(self._children):
            if time.monotonic() > deadline:
                found = [f"{process} ({_text(Path(f'/proc/{process}/wchan'))})" for process in left]
                for process in left:
                    os.kill(process, signal.SIGKILL)
                return found
            time.sleep(0.05)
        return []

    def errors(self) -> str:
        """The end of what every rank wrote to stderr."""
        texts = [log.with_suffix(".err") for log in self._logs]
        return " | ".join(_text(path)[-1500:] for path in texts)

    def _all_ended(self) -> bool:
        for child in self._children:
            if child not in self._statuses:
                ended, raw = os.waitpid(child, os.WNOHANG)
                if ended:
                    self._statuses[child] = os.waitstatus_to_exitcode(raw)
        return len(self._statuses) == len(self._children)

    def _begin_of(self, phase: str, random_: random.Random) -> Callable[[], bool]:
        """Says, when asked again and again, whether the phase has begun."""
        checkpoints = self.directory / "checkpoints"
        marker = checkpoints / "latest_checkpointed_iteration.txt"
        if phase == "start":
            return lambda: True
        if phase in ("step", "validation"):
            first = self._last_step() + random_.randint(1, 6)
            if phase == "validation":
                first += -first % _VALIDATION_STEPS
            return lambda: self._last_step() >= first
        old = set(_unfinished(checkpoints))  # what an earlier kill left behind
        if phase == "save":
            return lambda: any(path not in old for path in _unfinished(checkpoints))
        if phase == "publish":
            return lambda: any(
                path not in old and (path / "megatron_dlm.json").exists()
                for path in _unfinished(checkpoints)
            )
        seen = _text(marker)
        return lambda: _text(marker) != seen

    def _last_step(self) -> int:
        lines = _text(self.directory / "metrics.jsonl").splitlines()
        return len([line for line in lines if '"train"' in line])


def processes_of(sessions: Sequence[int]) -> list[int]:
    """Processes of these sessions that run or wait, whoever is their parent now."""
    found = []
    for folder in Path("/proc").iterdir():
        # pid (name) state parent group session ...; a name may hold anything.
        stat = _text(folder / "stat") if folder.name.isdigit() else ""
        state, _, _, session = (stat.rpartition(")")[2].split() or ["Z", "", "", "0"])[:4]
        if int(session) in sessions and state not in "ZX":
            found.append(int(folder.name))
    return found


_MEAN_DELAY_SECONDS = {
    "start": 0.6,
    "step": 0.01,
    "validation": 0.01,
    "save": 0.02,
    "publish": 0.001,
    "retention": 0.002,
}


def _unfinished(checkpoints: Path) -> list[Path]:
    try:
        return [
            Path(entry.path)
            for entry in os.scandir(checkpoints)
            if entry.name.endswith(".unfinished")
        ]
    except FileNotFoundError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
