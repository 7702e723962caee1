"""The run directory: what it holds, and whether a run may continue in it."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_dlm import __version__
from megatron_dlm.checkpoint.run_lock import LOCK_NAME, RunLock
from megatron_dlm.config.parse import dump, parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.runtime.files import write_whole

_CONFIG_NAME, _RUN_NAME = "config.yaml", "run.json"
# What a continued run may change: the layout, the reporting, and how long it goes on.
_FREE_SECTIONS = ("parallel", "checkpoint", "validation", "logging", "recovery")
_FREE_FIELDS = {
    "train": (
        *("steps", "tokens", "epochs", "micro_batch_size"),
        *("device", "output_dir", "resume", "deterministic"),
    ),
    "model": (
        *("transformer_impl", "attention_backend"),
        *("recompute_granularity", "recompute_num_layers", "recompute_modules"),
    ),
    "data": ("train", "valid", "tokenizer"),  # files may move; their digest is compared instead
}
_PACKAGES = ("torch", "megatron-core", "numpy")


class RunDirectory:
    """Files of one run. Only rank 0 writes."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def lock(self) -> RunLock:
        """A context in which no other job uses the directory, which is made where it is missing.

        Raises ValueError when it cannot be written, and on entering while a job has it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(self._not_writable(error.strerror or str(error))) from None
        if not os.access(self.path, os.W_OK):
            raise ValueError(self._not_writable("no permission"))
        return RunLock(self.path)

    def open(self, config: RunConfig) -> None:
        """Make the locked directory ready.

        Raises ValueError when it holds a run of another configuration or cannot be written.
        """
        if config.train.resume == "never":
            try:
                self._set_aside()
            except OSError as error:
                raise ValueError(self._not_writable(error.strerror or str(error))) from None
        self._refuse_other_config(config)
        write_whole(self.path / _CONFIG_NAME, dump(config))

    def write_run_facts(self, facts: Mapping[str, Any]) -> None:
        """run.json: what this start of the run was made of."""
        content = {**_environment(), **facts}
        write_whole(self.path / _RUN_NAME, json.dumps(content, indent=1) + "\n")

    def _not_writable(self, reason: str) -> str:
        return f"train.output_dir {self.path} is not writable ({reason}); choose another"

    def _set_aside(self) -> None:
        """Move an old run into previous_N/ inside the directory; nothing is deleted."""
        if not (self.path / _CONFIG_NAME).exists():
            return
        numbers = [int(old.name.split("_")[1]) for old in self.path.glob("previous_[0-9]*")]
        target = self.path / f"previous_{max(numbers, default=0) + 1}"
        entries = [
            entry
            for entry in self.path.iterdir()
            if not entry.name.startswith("previous_") and entry.name != LOCK_NAME
        ]
        target.mkdir()
        # The config goes last: while it is still there, an interrupted move is repeated.
        for entry in sorted(entries, key=lambda entry: entry.name == _CONFIG_NAME):
            entry.rename(target / entry.name)

    def _refuse_other_config(self, config: RunConfig) -> None:
        path = self.path / _CONFIG_NAME
        if not path.exists():
            return
        # Parsed, so that keys which an older version did not have count with their defaults.
        old = asdict(parse(RunConfig, ["--config", str(path)], "megatron-dlm train"))
        for section, values in asdict(config).items():
            if section in _FREE_SECTIONS:
                continue
            for name, value in values.items():
                stored = old[section][name]
                if name not in _FREE_FIELDS.get(section, ()) and stored != value:
                    raise ValueError(
                        f"{self.path} holds a run with {section}.{name} {stored}, this one has "
                        f"{value}; choose another train.output_dir, or set train.resume never to "
                        "start anew (the old run is kept in previous_N/)"
                    )


def _environment() -> dict[str, Any]:
    return {
        "megatron_dlm": __version__,
        **_commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "host": socket.gethostname(),
        "command": sys.argv,
    }


def _commit() -> dict[str, object]:
    """The commit of the code that runs: said by a copy made for a job, else asked of git."""
    noted = Path(__file__).parents[2] / "commit.txt"
    if noted.is_file():
        described = noted.read_text(encoding="utf-8").strip()  # by git describe --dirty
        commit = described.removesuffix("-dirty")
        return {"commit": commit, "uncommitted_changes": commit != described}
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str | None:
    """Output of git in the source tree; None where this is no checkout."""
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
