"""Kills training again and again, at moments drawn at random, and demands the same numbers.

    python tools/fault_campaign.py --kills 100 --seed 1

Every run is killed until its share of kills is used up, goes on from what is on the disk each time,
and must end with the metrics and the weights of a run that nobody touched, bit for bit. After every
kill no half-written checkpoint may pass for whole, none that was whole may be lost, and no process
of the ranks may be left.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fault_runs import PHASES, SCENARIOS, Job, Kill, Scenario, make_corpus, settings_of
from forked_command import run, warm_up

from megatron_dlm.checkpoint.find import find_checkpoint
from megatron_dlm.checkpoint.tensor_reader import TensorReader
from megatron_dlm.config.checks import require
from megatron_dlm.config.parse import parse

_TIMES = ("seconds", "per_second", "mfu", "wait", "time", "memory", "eta")
"""Metrics with one of these in their name tell of the machine, not of the model."""
# The kernel ends writers with their rank; only a busy machine takes a moment.
_SURVIVORS_SECONDS = 10.0


@dataclass(frozen=True)
class CampaignConfig:
    """Kill training at random moments; every run must end as if nothing had happened."""

    kills: int = 100
    """Kills in all, spread over the scenarios."""
    kills_per_run: int = 5
    """Kills of one run before it may go on to its end."""
    seed: int = 1
    """Seed of the moments, the signals and their targets."""
    bound_seconds: float = 75.0
    """Within this time after a kill every rank must have ended: it waits 45 s for ranks that were
    killed before they appeared, and a second for all others."""
    output_dir: str | None = None
    """Folder for the runs and campaign.json; default: one that is removed if all is well."""

    def __post_init__(self) -> None:
        for name in ("kills", "kills_per_run", "bound_seconds"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}; it must be greater than 0")


class Failure(Exception):
    """A promise that was broken."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every promise held, 1 if one was broken, 2 for wrong flags."""
    try:
        config = parse(CampaignConfig, sys.argv[1:] if argv is None else argv, "fault_campaign.py")
    except (ValueError, OSError) as error:
        print(f"fault_campaign.py: error: {error}", file=sys.stderr)
        return 2
    root = Path(config.output_dir or tempfile.mkdtemp(prefix="faults_")).resolve()
    root.mkdir(parents=True, exist_ok=True)
    warm_up(("train", "tokenizer", "preprocess", "checkpoint verify"))
    make_corpus(root / "corpus")
    kills, failures = _campaign(config, root)
    _tell(kills, failures)
    record = {"seed": config.seed, "kills": [vars(kill) for kill in kills], "failures": failures}
    (root / "campaign.json").write_text(json.dumps(record, indent=1))
    if failures or config.output_dir:
        print(f"runs and campaign.json are in {root}")
    else:
        shutil.rmtree(root)
    return 1 if failures else 0


def _campaign(config: CampaignConfig, root: Path) -> tuple[list[Kill], list[str]]:
    references: dict[str, Path] = {}
    kills: list[Kill] = []
    failures: list[str] = []
    number = 0
    while len(kills) < config.kills:
        scenario = SCENARIOS[number % len(SCENARIOS)]
        random_ = random.Random(f"{config.seed} {number}")
        directory = root / f"run_{number:03d}"
        job = Job(scenario, directory, settings_of(scenario, root / "corpus", directory))
        count = min(config.kills_per_run, config.kills - len(kills))
        try:
            if scenario.name not in references:
                references[scenario.name] = _reference(scenario, root)
            _killed_run(config, job, random_, count=count, kills=kills)
            _compare(references[scenario.name], directory)
            shutil.rmtree(directory)
        except Failure as failure:
            failures.append(f"run {number} ({scenario.name}): {failure}")
            print(f"FAILED {failures[-1]}", flush=True)
        number += 1
        print(f"{len(kills)} kills, {number} runs, {len(failures)} failures", flush=True)
    return kills, failures


def _reference(scenario: Scenario, root: Path) -> Path:
    directory = root / f"reference_{scenario.name}"
    job = Job(scenario, directory, settings_of(scenario, root / "corpus", directory))
    job.start()
    if any(status != 0 for status in job.wait(600)):
        raise Failure(f"the undisturbed run failed: {job.errors()}")
    return directory


def _killed_run(
    config: CampaignConfig, job: Job, random_: random.Random, *, count: int, kills: list[Kill]
) -> None:
    whole: set[int] = set()
    for attempt in range(10 * count):
        is_last = attempt >= count
        job.start()
        if is_last:
            statuses = job.wait(600)
            if any(status != 0 for status in statuses):
                raise Failure(f"it did not go on to its end: {statuses} {job.errors()}")
            return
        kill = job.kill_at(random_.choice(PHASES), random_)
        statuses = job.wait(config.bound_seconds)
        if kill is None:  # it had ended before the moment came
            if any(status != 0 for status in statuses):
                raise Failure(f"it ended by itself with {statuses}: {job.errors()}")
            return
        kills.append(kill)
        _check_end(kill, statuses, job)
        whole = _check_checkpoints(job.directory, whole, kill)


def _check_end(kill: Kill, statuses: Sequence[int | None], job: Job) -> None:
    if None in statuses:
        raise Failure(f"{kill}: a rank was still there: {statuses} {job.errors()}")
    if left := job.survivors(_SURVIVORS_SECONDS):
        raise Failure(f"{kill}: the ranks ended, processes of theirs did not: {', '.join(left)}")
    # Before the program can answer a signal, the signal ends it, as a kill does.
    is_too_early = kill.phase == "start" and -signal.SIGTERM in statuses
    if kill.signal == "TERM" and not is_too_early and any(status != 0 for status in statuses):
        raise Failure(f"{kill}: a stop must end with 0, not {statuses}: {job.errors()}")


def _check_checkpoints(directory: Path, before: set[int], kill: Kill) -> set[int]:
    """The steps that are there now; each is sound and the newest of before is among them."""
    folder = directory / "checkpoints"
    found = {int(path.name[5:]) for path in folder.glob("iter_*") if path.name[5:].isdigit()}
    if before and max(before) not in found and (not found or max(found) < max(before)):
        raise Failure(f"{kill}: checkpoint {max(before)} is lost, {sorted(found)} are left")
    if found:
        log = directory.with_suffix(".verify")
        # One by one: the rest of an interrupted save lies beside them, and says so by its name.
        paths = [str(folder / f"iter_{step:07d}") for step in sorted(found)]
        arguments = ["checkpoint", "verify", "--checkpoint", *paths]
        outcome = run(arguments, log, timeout_seconds=300)
        log.unlink()
        log.with_suffix(".err").unlink(missing_ok=True)
        if outcome.status != 0:
            raise Failure(f"{kill}: a damaged checkpoint passes for whole: {outcome.errors}")
    return found


def _compare(reference: Path, directory: Path) -> None:
    wanted, got = _metrics(reference), _metrics(directory)
    if wanted != got:
        keys = sorted(key for key in wanted | got if wanted.get(key) != got.get(key))
        first = keys[0]
        raise Failure(f"{first}: {got.get(first)} instead of {wanted.get(first)}")
    theirs, ours = (_tensors(path) for path in (reference, directory))
    different = [name for name in theirs if ours.get(name) != theirs[name]]
    if different or theirs.keys() != ours.keys():
        raise Failure(f"tensors of the last checkpoint differ: {different}")


def _metrics(directory: Path) -> dict[tuple[int, str], dict[str, float]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    found = {}
    for entry in map(json.loads, lines):
        key = (entry.pop("step"), entry.pop("split"))
        if key in found:
            raise Failure(f"{key} is reported twice")
        found[key] = {
            name: value for name, value in entry.items() if not any(word in name for word in _TIMES)
        }
    return found


def _tensors(directory: Path) -> dict[str, str]:
    """Name -> digest of every tensor of the last checkpoint, moments of the optimizer included."""
    reader = TensorReader(find_checkpoint(directory).path)
    digests = {}
    for name, stored in reader.tensors.items():
        values = reader.rows(name, None, 0, stored.shape[0])
        digests[name] = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    return digests


def _tell(kills: Sequence[Kill], failures: Sequence[str]) -> None:
    targets = sorted({f"{kill.signal} {kill.target}" for kill in kills})
    print(f"\n| hit during | {' | '.join(targets)} | all |")
    print("|---" * (len(targets) + 2) + "|")
    for phase in [*PHASES, "all"]:
        chosen = [kill for kill in kills if phase in (kill.phase, "all")]
        counts = Counter(f"{kill.signal} {kill.target}" for kill in chosen)
        print(f"| {phase} | {' | '.join(str(counts[name]) for name in targets)} | {len(chosen)} |")
    print(f"\n{len(kills)} kills, {len(failures)} broken promises, {os.cpu_count()} cores")


if __name__ == "__main__":
    sys.exit(main())
