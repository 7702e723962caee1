"""Every command that a document shows exists, and its flags parse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from shell_blocks import commands, own_arguments
from sources import ROOT, name_of

from megatron_dlm import cli
from megatron_dlm.config.parse import parse

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS += sorted((ROOT / "examples").rglob("*.md"))


def parses(arguments: list[str]) -> bool:
    if arguments[0].startswith("--"):
        return arguments[0] in ("--help", "--version")
    if cli.is_group(arguments[0]) and arguments[1:] == ["--help"]:
        return True
    name, rest = cli.split_command(arguments)
    config_class = cli._load(cli.COMMANDS[name][1])
    flags = [word for word in rest if word not in ("--help", "--print_config")]
    flags = cli.with_named(name, flags)
    parse(config_class, flags, prog=name)
    return True


def test_readme_is_there_and_shows_the_two_commands() -> None:
    shown = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert ["make", "quickstart"] in shown
    assert any((own_arguments(words) or [""])[0] == "train" for words in shown)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_of_the_document(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
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
