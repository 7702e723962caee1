"""The commands that a Markdown document shows."""

from __future__ import annotations

import re
import shlex

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
