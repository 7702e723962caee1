"""Damages every kind of input at random and demands success or one line that says what is wrong.

    python tools/fuzz_inputs.py --mutations 1000 --seed 1

A finding is a traceback, a crash, a hang, an error of many lines, or damage that a reader with
checksums accepted. Each is kept with its damaged files and its command line. The same seed damages
the same bytes; only the inputs are made anew, by the package's own commands.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from forked_command import Outcome, run, warm_up
from fuzz_mutations import damaged
from fuzz_targets import TARGETS, Target, arguments_of, make_inputs

from megatron_dlm.config.checks import require
from megatron_dlm.config.parse import parse

_COMMANDS = (
    *("train", "tokenizer", "preprocess", "data verify", "data inspect", "export", "import"),
    *("generate", "checkpoint verify"),
)


@dataclass(frozen=True)
class FuzzConfig:
    """Damage inputs at random; each must end in success or in one line."""

    mutations: int = 1000
    """Damaged inputs, spread evenly over the kinds of input."""
    seed: int = 1
    """Seed of all damage."""
    targets: list[str] = field(default_factory=list)
    """Only these kinds of input; default: all."""
    only: int | None = None
    """Only the mutation of this number, as a finding names it."""
    timeout_seconds: float = 60.0
    """Longer is a hang."""
    memory_bytes: int = 16 * 1024**3
    """Address space of one command: nobody's typing error may take the machine with it."""
    output_dir: str | None = None
    """Folder for inputs, findings and summary.json; default: one that is removed if all is well."""

    def __post_init__(self) -> None:
        require(self.mutations > 0, f"mutations is {self.mutations}; it must be greater than 0")
        known = [target.name for target in TARGETS]
        for name in self.targets:
            require(name in known, f"targets: {name} is none of {', '.join(known)}")


@dataclass(frozen=True)
class Trial:
    """One damaged input and what came of it."""

    number: int
    target: str
    file: str
    mutation: str
    arguments: list[str]
    verdict: str
    """refused or accepted; else what was found: traceback, crash, hang, talkative, silent."""
    status: int | None
    message: str


def main(argv: Sequence[str] | None = None) -> int:
    """0 if nothing was found, 1 if something was, 2 for wrong flags."""
    try:
        config = parse(FuzzConfig, sys.argv[1:] if argv is None else argv, "fuzz_inputs.py")
    except (ValueError, OSError) as error:
        print(f"fuzz_inputs.py: error: {error}", file=sys.stderr)
        return 2
    given = config.output_dir
    root = Path(given or tempfile.mkdtemp(prefix="fuzz_")).resolve()
    os.environ["HF_MODULES_CACHE"] = str(root / "modules")
    warm_up(_COMMANDS)
    inputs = root / "inputs"
    make_inputs(inputs)
    trials = _run_all(config, root, inputs)
    findings = [trial for trial in trials if trial.verdict not in ("refused", "accepted")]
    _tell(trials)
    summary = {"seed": config.seed, "trials": [asdict(trial) for trial in trials]}
    (root / "summary.json").write_text(json.dumps(summary, indent=1))
    if findings or given:
        print(f"inputs, findings and summary.json are in {root}")
    else:
        shutil.rmtree(root)
    return 1 if findings else 0


def _run_all(config: FuzzConfig, root: Path, inputs: Path) -> list[Trial]:
    targets = [target for target in TARGETS if not config.targets or target.name in config.targets]
    numbers = range(config.mutations) if config.only is None else [config.only]
    trials = []
    for number in numbers:
        trial = _try_one(config, number, targets[number % len(targets)], root, inputs)
        trials.append(trial)
        if trial.verdict not in ("refused", "accepted"):
            print(f"{trial.verdict}: mutation {number}, {trial.mutation} in {trial.file}: ", end="")
            print(f"{trial.message[-300:]}", flush=True)
    return trials


def _try_one(config: FuzzConfig, number: int, target: Target, root: Path, inputs: Path) -> Trial:
    # By number and target, so that a finding is found again alone.
    random_ = random.Random(f"{config.seed} {target.name} {number}")
    here = root / "findings" / f"{number:05d}"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(inputs / target.folder, here)
    files = target.files(inputs)
    chosen = random_.choice(files)
    name, changed = damaged(chosen.read_bytes(), random_)
    file = here / chosen.relative_to(inputs / target.folder)
    file.write_bytes(changed)
    reader = random_.choice(target.readers)
    arguments = arguments_of(reader, root=inputs, here=here)
    os.chdir(here)
    outcome = run(
        arguments,
        here / "output.log",
        timeout_seconds=config.timeout_seconds,
        memory_bytes=config.memory_bytes,
    )
    os.chdir(root)
    must_notice = reader.notices_all and not _says_the_same(chosen.read_bytes(), changed)
    verdict = _judge(outcome, must_notice=must_notice)
    message = (outcome.errors.strip() or outcome.output.strip())[-2000:]
    if verdict in ("refused", "accepted"):
        shutil.rmtree(here)
    where = str(chosen.relative_to(inputs))
    return Trial(number, target.name, where, name, arguments, verdict, outcome.status, message)


def _says_the_same(data: bytes, changed: bytes) -> bool:
    """Whether both are JSON and differ in white space only, which no checksum of values notices."""
    try:
        return bool(json.loads(data) == json.loads(changed))
    except (ValueError, RecursionError):
        return False


def _judge(outcome: Outcome, *, must_notice: bool) -> str:
    if outcome.status is None:
        return "hang"
    if outcome.status < 0:
        return "crash"
    if "Traceback (most recent call last)" in outcome.errors + outcome.output:
        return "traceback"
    if outcome.status == 0:
        return "silent" if must_notice else "accepted"
    errors = [line for line in outcome.errors.splitlines() if ": error: " in line]
    return "refused" if len(errors) == 1 else "talkative"


def _tell(trials: Sequence[Trial]) -> None:
    verdicts = sorted({trial.verdict for trial in trials})
    print(f"{'input':<24}" + "".join(f"{verdict:>11}" for verdict in verdicts))
    for name in dict.fromkeys(trial.target for trial in trials):
        counts = Counter(trial.verdict for trial in trials if trial.target == name)
        print(f"{name:<24}" + "".join(f"{counts[verdict]:>11}" for verdict in verdicts))
    counts = Counter(trial.verdict for trial in trials)
    print(f"{'all':<24}" + "".join(f"{counts[verdict]:>11}" for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
