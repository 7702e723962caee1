"""Every command that a document shows exists, and its flags parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from sources import ROOT, name_of

from megatron_dlm import cli
from megatron_dlm.config.parse import parse

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS += sorted((ROOT / "examples").rglob("*.md"))
_SHELL = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SEPARATORS = {"&&", "||", "|", ";", ">", ">>", "2>&1", "&"}


def commands(text: str) -> list[list[str]]:
    """Word lists of all simple commands in the shell blocks of a document."""
    found: list[list[str]] = []
    for block in _SHELL.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line.removeprefix("$ "), comments=True), ";"]:
                if word not in _SEPARATORS:
                    words.append(word)
                    continue
                found += [words] if words else []
                words = []
    return found


def own_arguments(words: list[str]) -> list[str] | None:
    """What follows `megatron-dlm` or `-m megatron_dlm`; None for another program."""
    for place, word in enumerate(words):
        if word.rpartition("/")[2] == "megatron-dlm":
            return words[place + 1 :]
        if word == "megatron_dlm" and place and words[place - 1] == "-m":
            return words[place + 1 :]
    return None


def parses(arguments: list[str]) -> bool:
    name, *rest = arguments
    if name.startswith("--"):
        return name in ("--help", "--version")
    config_class = cli._load(cli.COMMANDS[name][1])
    flags = [word for word in rest if word not in ("--help", "--print_config")]
    parse(config_class, flags, prog=name)
    return True


def test_readme_is_there_and_shows_the_two_commands() -> None:
    shown = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert ["make", "quickstart"] in shown
    assert any((own_arguments(words) or [""])[0] == "train" for words in shown)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_of_the_document(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(path.read_text(encoding="utf-8")):
        arguments = own_arguments(words)
        if arguments is not None:
            assert parses(arguments), words
        elif words[0] == "make":
            asked = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
            assert asked <= targets, words


def test_the_reader_of_shell_blocks() -> None:
    text = "a\n```bash\nmake quickstart  # a note\n$ X=1 torchrun -m megatron_dlm \\\n"
    text += "  train && ls\n```\n"
    found = commands(text)
    assert found == [
        ["make", "quickstart"],
        ["X=1", "torchrun", "-m", "megatron_dlm", "train"],
        ["ls"],
    ]
    assert [own_arguments(words) for words in found] == [None, ["train"], None]
