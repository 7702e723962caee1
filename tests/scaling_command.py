"""The `scaling` commands as a user runs them, in this process."""

from __future__ import annotations

import pytest

from megatron_dlm import cli

Capture = pytest.CaptureFixture[str]


def scaling(command: str, **flags: object) -> int:
    words = ["scaling", command]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(each) for each in values)]
    return cli.main(words)


def refused(capsys: Capture, command: str, **flags: object) -> str:
    """The one line on stderr."""
    capsys.readouterr()
    assert scaling(command, **flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megatron-dlm scaling {command}: error: ")
    return line
