"""Subcommand -> configuration class -> function. Nothing is imported before it is needed.

User errors (ValueError, OSError) become one line on stderr and exit status 2; anything else is a
defect and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from megatron_dlm import __version__
from megatron_dlm.runtime.errors import AgreedError

# name: (help line, configuration class, function of one configuration)
COMMANDS = {
    "train": (
        "train a model, or go on with an interrupted run",
        "megatron_dlm.config.schema:RunConfig",
        "megatron_dlm.training.entry:train",
    ),
    "tokenizer": (
        "train a SentencePiece tokenizer",
        "megatron_dlm.config.commands:TokenizerConfig",
        "megatron_dlm.data.tokenizer_training:train_tokenizer",
    ),
    "preprocess": (
        "turn text into shards",
        "megatron_dlm.config.commands:PreprocessConfig",
        "megatron_dlm.data.preprocess:preprocess",
    ),
    "plan": (
        "parameters, FLOPs, memory and time of a configuration",
        "megatron_dlm.config.commands:PlanRunConfig",
        "megatron_dlm.scaling.plan_run:plan_run",
    ),
    "quickstart": (
        "the whole story on an embedded corpus, in minutes on a laptop",
        "megatron_dlm.config.commands:QuickstartConfig",
        "megatron_dlm.launch.quickstart:quickstart",
    ),
}

# Checks that run before torch is imported; each returns the configuration to go on with.
CHECKS = {"train": "megatron_dlm.config.validate:prepare"}

# torchrun ends all ranks as soon as one has ended: the silent ones let rank 0 speak first.
_LET_RANK_0_SPEAK_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"megatron-dlm {__version__}")
        return 0
    name, *rest = arguments
    try:
        config = _configure(name, rest)
    except (ValueError, OSError) as error:
        # Every rank sees the same configuration: one of them speaks.
        return _refuse(name, error, is_speaker=_rank() == 0)
    if config is None:
        return 0
    try:
        _load(COMMANDS[name][2])(config)
    except (ValueError, OSError) as error:
        # An error that all ranks agreed on is told once; one rank's own error by that rank.
        is_speaker = not isinstance(error, AgreedError) or _rank() == 0
        return _refuse(name, error, is_speaker=is_speaker)
    return 0


def _configure(name: str, arguments: list[str]) -> Any:
    """The checked configuration of a command; None when it was only to be printed."""
    if name not in COMMANDS:
        from megatron_dlm.config.keys import suggestion

        raise ValueError(
            f"unknown command{suggestion(name, COMMANDS)} (have: {', '.join(COMMANDS)})"
        )
    print_only = "--print_config" in arguments
    arguments = [argument for argument in arguments if argument != "--print_config"]
    parse = _load("megatron_dlm.config.parse:parse")
    config = parse(_load(COMMANDS[name][1]), arguments, prog=f"megatron-dlm {name}")
    if print_only:
        if _rank() == 0:
            print(_dump_resolved(config), end="")
        return None
    return _load(CHECKS[name])(config) if name in CHECKS else config


def _load(location: str) -> Any:
    module, _, name = location.partition(":")
    return getattr(import_module(module), name)


def _dump_resolved(config: Any) -> str:
    from megatron_dlm.config.derive import resolve
    from megatron_dlm.config.parse import dump
    from megatron_dlm.config.schema import RunConfig

    return dump(resolve(config) if isinstance(config, RunConfig) else config)


def _overview() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, (text, _, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megatron-dlm COMMAND [--config FILE.yaml] [--key value ...]",
            "",
            "Autoregressive and diffusion language models, trained alike on Megatron Core.",
            "",
            "commands:",
            *lines,
            "",
            "`megatron-dlm COMMAND --help` documents every key; `--print_config` prints the",
            "configuration that a command would use. On several ranks:",
            "  torchrun --nproc-per-node 4 -m megatron_dlm train --config FILE.yaml",
        ]
    )


def _refuse(name: str, error: ValueError | OSError, *, is_speaker: bool) -> int:
    if isinstance(error, ValueError) and not _is_raised_here(error):
        raise error
    if not is_speaker:
        time.sleep(_LET_RANK_0_SPEAK_SECONDS)
    else:
        rank = _rank()
        place = f" (rank {rank})" if rank else ""
        message = " ".join(str(error).split())
        print(f"megatron-dlm {name}{place}: error: {message}", file=sys.stderr)
    return 2


def _is_raised_here(error: BaseException) -> bool:
    """Whether our own code raised it: a ValueError from inside a library is a defect, not input."""
    traceback = error.__traceback__
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__", "")).split(".")[0] == "megatron_dlm"


def _rank() -> int:
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdigit() else 0
