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
from megatron_dlm.runtime.errors import AgreedError, is_users

# name, of one or two words: (help line, configuration class, function of one configuration)
COMMANDS = {
    "train": (
        "train a model, or go on with an interrupted run",
        "megatron_dlm.config.schema:RunConfig",
        "megatron_dlm.training.entry:train",
    ),
    "tokenizer": (
        "train a tokenizer, or adopt one with a mask token",
        "megatron_dlm.config.commands:TokenizerConfig",
        "megatron_dlm.data.tokenization.tokenizer_training:train_tokenizer",
    ),
    "preprocess": (
        "turn text into shards",
        "megatron_dlm.config.commands:PreprocessConfig",
        "megatron_dlm.data.preprocessing.preprocess:preprocess",
    ),
    "data inspect": (
        "show what shards hold: lengths, ids, decoded text",
        "megatron_dlm.config.data_commands:InspectConfig",
        "megatron_dlm.data.commands.inspection:inspect",
    ),
    "data count": (
        "count documents, tokens, windows and epochs",
        "megatron_dlm.config.data_commands:CountConfig",
        "megatron_dlm.data.commands.counting:count",
    ),
    "data verify": (
        "check shards and name the first bad document",
        "megatron_dlm.config.data_commands:VerifyConfig",
        "megatron_dlm.data.commands.verification:verify",
    ),
    "data split": (
        "hold documents out for validation",
        "megatron_dlm.config.data_commands:SplitConfig",
        "megatron_dlm.data.commands.split:split",
    ),
    "data merge": (
        "make one dataset of many shards",
        "megatron_dlm.config.data_commands:MergeConfig",
        "megatron_dlm.data.commands.merge:merge",
    ),
    "plan": (
        "parameters, FLOPs, memory and time of a configuration",
        "megatron_dlm.config.commands:PlanRunConfig",
        "megatron_dlm.scaling.plan_run:plan_run",
    ),
    "generate": (
        "text from a model, or from several side by side",
        "megatron_dlm.config.generation_commands:GenerateConfig",
        "megatron_dlm.generation.generate:generate",
    ),
    "evaluate": (
        "loss on shards, with error bars; scores on lm-eval's tasks",
        "megatron_dlm.config.evaluation_commands:EvaluateConfig",
        "megatron_dlm.evaluation.evaluate:evaluate",
    ),
    "export": (
        "write a checkpoint as a Hugging Face directory, and prove it equal",
        "megatron_dlm.config.hf_commands:ExportConfig",
        "megatron_dlm.hf.export:export",
    ),
    "import": (
        "make a Hugging Face model the first checkpoint of a run",
        "megatron_dlm.config.hf_commands:ImportConfig",
        "megatron_dlm.hf.importing:import_model",
    ),
    "checkpoint inspect": (
        "what a checkpoint holds: step, model, tensors, files",
        "megatron_dlm.config.checkpoint_commands:CheckpointInspectConfig",
        "megatron_dlm.checkpoint.inspection:inspect",
    ),
    "checkpoint verify": (
        "read every file of checkpoints and compare its checksum",
        "megatron_dlm.config.checkpoint_commands:CheckpointVerifyConfig",
        "megatron_dlm.checkpoint.inspection:verify",
    ),
    "checkpoint prune": (
        "delete old checkpoints of a run",
        "megatron_dlm.config.checkpoint_commands:CheckpointPruneConfig",
        "megatron_dlm.checkpoint.pruning:prune",
    ),
    "checkpoint average": (
        "average the weights of several checkpoints into a new one",
        "megatron_dlm.config.checkpoint_commands:CheckpointAverageConfig",
        "megatron_dlm.checkpoint.averaging:average",
    ),
    "checkpoint upcycle": (
        "make a dense checkpoint the start of a run with experts",
        "megatron_dlm.config.upcycle_command:UpcycleConfig",
        "megatron_dlm.checkpoint.upcycling:upcycle",
    ),
    "report": (
        "curves, settings and events of runs in one HTML file",
        "megatron_dlm.config.report_command:ReportConfig",
        "megatron_dlm.launch.report.command:report",
    ),
    "study plan": (
        "expand a study into its runs, and say what they cost",
        "megatron_dlm.config.study_commands:StudyPlanConfig",
        "megatron_dlm.scaling.study_plan:plan_study",
    ),
    "study run": (
        "train the runs of a study on this machine, side by side",
        "megatron_dlm.config.study_commands:StudyRunConfig",
        "megatron_dlm.launch.study_runner:run_study",
    ),
    "study status": (
        "how far every run of a study is",
        "megatron_dlm.config.study_commands:StudyStatusConfig",
        "megatron_dlm.scaling.study_results:status_study",
    ),
    "study gather": (
        "collect the results of a study in one table",
        "megatron_dlm.config.study_commands:StudyGatherConfig",
        "megatron_dlm.scaling.study_results:gather_study",
    ),
    "study report": (
        "figures and tables of a study in one page",
        "megatron_dlm.config.study_commands:StudyReportConfig",
        "megatron_dlm.launch.study_report.command:report_study",
    ),
    "scaling fit": (
        "fit a scaling law to results, with intervals",
        "megatron_dlm.config.scaling_commands:ScalingFitConfig",
        "megatron_dlm.scaling.fit_command:fit_scaling",
    ),
    "scaling recommend": (
        "what to train with so much data and compute, and which law says so",
        "megatron_dlm.config.scaling_commands:ScalingRecommendConfig",
        "megatron_dlm.scaling.recommend_command:recommend_scaling",
    ),
    "scaling flops": (
        "training FLOPs by every convention, and what generating costs",
        "megatron_dlm.config.scaling_commands:ScalingFlopsConfig",
        "megatron_dlm.scaling.flops_command:flops_scaling",
    ),
    "slurm render": (
        "write the job script of a run",
        "megatron_dlm.config.slurm_commands:SlurmRenderConfig",
        "megatron_dlm.launch.slurm.render:render",
    ),
    "slurm submit": (
        "write the job script of a run and submit it, or a chain of jobs",
        "megatron_dlm.config.slurm_commands:SlurmSubmitConfig",
        "megatron_dlm.launch.slurm.submit:submit",
    ),
    "slurm status": (
        "jobs, step, loss and remaining time of runs",
        "megatron_dlm.config.slurm_commands:SlurmStatusConfig",
        "megatron_dlm.launch.slurm.status:status",
    ),
    "slurm follow": (
        "show the reports of a run as they come",
        "megatron_dlm.config.slurm_commands:SlurmFollowConfig",
        "megatron_dlm.launch.slurm.follow:follow",
    ),
    "slurm cancel": (
        "end the jobs of a run after they have saved",
        "megatron_dlm.config.slurm_commands:SlurmCancelConfig",
        "megatron_dlm.launch.slurm.cancel:cancel",
    ),
    "quickstart": (
        "the whole story on an embedded corpus, in minutes on a laptop",
        "megatron_dlm.config.commands:QuickstartConfig",
        "megatron_dlm.launch.quickstart:quickstart",
    ),
}

# The flag that words in front of all flags belong to.
POSITIONAL = {"report": "--run"}

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
    if is_group(arguments[0]) and arguments[1:] in ([], ["-h"], ["--help"]):
        print(_overview(arguments[0]))
        return 0 if arguments[1:] else 2
    name, rest = split_command(arguments)
    try:
        return _run(name, rest)
    except KeyboardInterrupt:
        print(f"megatron-dlm {name}: interrupted", file=sys.stderr)
        return 130


def _run(name: str, rest: list[str]) -> int:
    """The exit status of one command."""
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


def is_group(word: str) -> bool:
    """Whether commands of two words begin with this one."""
    return any(name.startswith(f"{word} ") for name in COMMANDS)


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the command, of one or two words, and its flags."""
    num_words = 1 + is_group(arguments[0])
    return " ".join(arguments[:num_words]), list(arguments[num_words:])


def with_named(name: str, arguments: Sequence[str]) -> list[str]:
    """The flags of a command whose first words may stand without their flag."""
    if name in POSITIONAL and arguments and not arguments[0].startswith("--"):
        return [POSITIONAL[name], *arguments]
    return list(arguments)


def _configure(name: str, arguments: list[str]) -> Any:
    """The checked configuration of a command; None when it was only to be printed."""
    if name not in COMMANDS:
        from megatron_dlm.config.keys import suggestion

        group = name.partition(" ")[0]
        known = [known for known in COMMANDS if known.startswith(f"{group} ")] or list(COMMANDS)
        raise ValueError(f"unknown command{suggestion(name, known)} (have: {', '.join(known)})")
    arguments = with_named(name, arguments)
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


def _overview(group: str = "") -> str:
    first = f"{group} " if group else ""
    shown = {name: text for name, (text, _, _) in COMMANDS.items() if name.startswith(first)}
    width = max(len(name) for name in shown)
    command = f"{group} COMMAND" if group else "COMMAND"
    lines = [
        f"usage: megatron-dlm {command} [--config FILE.yaml] [--key value ...]",
        "",
        "Autoregressive and diffusion language models, trained alike on Megatron Core.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {text}" for name, text in shown.items()),
        "",
        f"`megatron-dlm {command} --help` documents every key; `--print_config` prints the",
        "configuration that a command would use.",
    ]
    if not group:
        lines[-1] += " On several ranks:"
        lines.append("  torchrun --nproc-per-node 4 -m megatron_dlm train --config FILE.yaml")
    return "\n".join(lines)


def _refuse(name: str, error: ValueError | OSError, *, is_speaker: bool) -> int:
    if not is_users(error):
        raise error
    if not is_speaker:
        time.sleep(_LET_RANK_0_SPEAK_SECONDS)
    else:
        rank = _rank()
        place = f" (rank {rank})" if rank else ""
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"  # without the number of the error
        message = " ".join(text.split())
        print(f"megatron-dlm {name}{place}: error: {message}", file=sys.stderr)
    return 2


def _rank() -> int:
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdigit() else 0
