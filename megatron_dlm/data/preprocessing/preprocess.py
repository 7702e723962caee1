"""The command `megatron-dlm preprocess`: text files to a dataset of shards, parallel, resumable.

plan (input_plan) -> jobs -> workers (job_workers) -> shards (shard_job) -> PREFIX.dataset.json
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing

from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.inputs.input_plan import Job, find_files, plan_digest, plan_jobs
from megatron_dlm.data.preprocessing.array_task import array_task
from megatron_dlm.data.preprocessing.job_workers import run_jobs
from megatron_dlm.data.preprocessing.progress import ProgressDisplay
from megatron_dlm.data.preprocessing.recipe import Recipe
from megatron_dlm.data.preprocessing.shard_set import (
    claim,
    finish,
    is_done,
    is_output,
    numbered_shards,
    remove_shards,
    whole_parts,
)
from megatron_dlm.data.preprocessing.shard_summary import Summary, in_words, totals
from megatron_dlm.data.preprocessing.stop_request import Stopped, StopRequest
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer
from megatron_dlm.runtime.processes import num_cores


def preprocess(config: PreprocessConfig) -> None:
    """The command: `make_dataset`, and what came of it on stdout."""
    make_dataset(config).print()


def make_dataset(config: PreprocessConfig) -> Summary:
    """Write the shards that are not there yet, and list them when all are: see PreprocessConfig.

    Raises ValueError and OSError before anything is written where the configuration, the tokenizer
    or the inputs do not allow it, and at text that cannot be read; SystemExit when it is stopped.
    The same call goes on behind the last whole shard of every job.
    """
    prefix, task = config.output_prefix, array_task(config, os.environ)
    jobs = _plan(config)
    recipe = _recipe(config, jobs)
    if config.overwrite:
        remove_shards(prefix)
    claim(prefix, recipe)
    mine = [number for number in range(len(jobs)) if task.has(number)]
    todo = {n: jobs[n] for n in mine if not is_done(whole_parts(prefix, n, recipe.sha256))}
    facts = _run(todo, config, recipe) if todo else {"work": "nothing to do, all was done before"}
    if task.count > 1:
        facts["array task"] = f"{task.index} of {task.count}, {len(mine)} of {len(jobs)} jobs"
    sides = totals(prefix, mine, recipe)
    if task.count == 1 and not any(side.documents for side in sides):
        remove_shards(prefix)
        raise ValueError(
            f"input holds no document of at least {config.minimum_characters} characters (left "
            f"out: {in_words(sides[0].left_out)}); lower minimum_characters or name other files"
        )
    missing = finish(prefix) if numbered_shards(prefix) else list(range(len(jobs)))
    return Summary(sides, facts, missing)


def _plan(config: PreprocessConfig) -> list[Job]:
    """The jobs of all array tasks; what an earlier run wrote is no input."""
    found = find_files(config.input)
    files = [path for path in found if not is_output(path, config.output_prefix)]
    if not files:
        raise ValueError(f"input holds only what preprocess wrote: {found[0]}; name files of text")
    return plan_jobs(files, job_bytes=config.shard_size_bytes)


def _recipe(config: PreprocessConfig, jobs: Sequence[Job]) -> Recipe:
    tokenizer = load_tokenizer(config.tokenizer)
    if config.append_eod and tokenizer.eod_id is None:
        raise ValueError(
            f"tokenizer {config.tokenizer} has no end-of-document token; name one with "
            f"`megatron-dlm tokenizer --existing {config.tokenizer} --eod_token TOKEN`, or add "
            "--append_eod false"
        )
    return Recipe(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        normalization=tokenizer.metadata.normalization,
        eod_id=tokenizer.eod_id if config.append_eod else None,
        mask_id=tokenizer.mask_id,
        text_field=config.text_field,
        minimum_characters=config.minimum_characters,
        validation_fraction=config.validation_fraction,
        shard_size_bytes=config.shard_size_bytes,
        inputs_sha256=plan_digest(jobs),
        num_jobs=len(jobs),
    )


def _run(todo: Mapping[int, Job], config: PreprocessConfig, recipe: Recipe) -> dict[str, str]:
    """Run the jobs; rows of the summary."""
    num_workers = min(config.workers or num_cores(), len(todo))
    encoder = ""
    try:
        with (
            StopRequest() as stop,
            ProgressDisplay(todo) as display,
            closing(
                run_jobs(todo, config, recipe, num_workers=num_workers, check=stop.check)
            ) as reports,
        ):
            for report in reports:
                display.add(report)
                encoder = report.encoder
    except Stopped as stopped:
        name = signal.Signals(stopped.number).name
        print(f"stopped by {name}; the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + stopped.number) from None
    rate = display.num_bytes / 1e6 / display.seconds
    work = f"{display.seconds:,.1f} seconds, {rate:,.1f} MB/s, workers: {num_workers}"
    return {"work": work, "encoder": encoder}
