"""The `data verify` command: every shard sound, and no document on both sides of a split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from megatron_dlm.config.data_commands import VerifyConfig
from megatron_dlm.data.commands.report_file import prepare_report, write_report
from megatron_dlm.data.commands.shard_check import (
    Rules,
    ShardTask,
    ShardVerdict,
    check_shard,
    refuse_changed,
)
from megatron_dlm.data.commands.shard_workers import map_shards
from megatron_dlm.data.commands.shared_documents import SharedDocuments, find_shared
from megatron_dlm.data.storage.dataset import dataset_path, open_dataset, overlaps, read_list
from megatron_dlm.data.storage.dataset_names import find_datasets
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer


def verify(config: VerifyConfig) -> None:
    """Print what was checked; ValueError if a shard is damaged or text is on both sides."""
    prepare_report(config.output)
    names = find_datasets([*config.input, *config.against])
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    rules = Rules()
    if tokenizer is not None:
        rules = Rules(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
    tasks = {name: _tasks(name, rules, index_only=config.index_only) for name in names}
    every = [task for listed in tasks.values() for task in listed]
    reading = map_shards(
        check_shard,
        every,
        sizes_bytes=[_size_bytes(task, config) for task in every],
        workers=config.workers,
        label="verifying",
    )
    console = Console()
    verdicts: list[ShardVerdict] = []
    for verdict in reading:
        verdicts.append(verdict)
        if verdict.problem:
            console.print(
                f"{verdict.prefix}: {verdict.problem}", style="red", markup=False, soft_wrap=True
            )
    damaged = [verdict for verdict in verdicts if verdict.problem]
    content = {
        "shards": [asdict(verdict) for verdict in verdicts],
        "num_damaged": len(damaged),
        "shared": None,
    }
    write_report(config.output, content)
    _print_table(console, tasks, verdicts)
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {len(verdicts)} shards are damaged; the first: {damaged[0].problem}"
        )
    if config.against:
        num_train = len(find_datasets(config.input))
        shared = _shared(
            names[:num_train],
            names[num_train:],
            eod_id=tokenizer.eod_id if tokenizer is not None else None,
            workers=config.workers,
        )
        write_report(config.output, {**content, "shared": asdict(shared)})
        _refuse_shared(console, shared, config)


def _tasks(name: str, rules: Rules, *, index_only: bool) -> list[ShardTask]:
    """The shards of a dataset, opened by none: a damaged one must not hide the others."""
    if not dataset_path(name).is_file():
        if not os.path.exists(f"{name}.idx"):
            open_dataset(name)  # says what is missing
        return [ShardTask(name, rules=rules, index_only=index_only)]
    entries, facts = read_list(name)
    refuse_changed(dataset_path(name))
    return [ShardTask(entry.prefix, entry, facts, rules, index_only) for entry in entries]


def _size_bytes(task: ShardTask, config: VerifyConfig) -> int:
    path = f"{task.prefix}.{'idx' if config.index_only else 'bin'}"
    return os.stat(path).st_size if os.path.exists(path) else 0


def _shared(
    train_names: Sequence[str], valid_names: Sequence[str], *, eod_id: int | None, workers: int
) -> SharedDocuments:
    """Documents that are on both sides."""
    train, valid = ([open_dataset(name) for name in names] for names in (train_names, valid_names))
    for first, second, what in overlaps(train, valid):
        raise ValueError(
            f"{first.prefix} and {second.prefix} overlap: both hold {what}; hold documents out "
            "with `megatron-dlm data split`"
        )
    return find_shared(train, valid, eod_id=eod_id, workers=workers)


def _print_table(
    console: Console, tasks: dict[str, list[ShardTask]], verdicts: Sequence[ShardVerdict]
) -> None:
    table = Table(title="verified")
    for name, justify in (("dataset", "left"), ("shards", "right"), ("documents", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("tokens", justify="right")
    table.add_column("checked", overflow="fold")
    table.add_column("verdict")
    begin = 0
    for name, listed in tasks.items():
        mine = verdicts[begin : begin + len(listed)]
        begin += len(listed)
        sound = [verdict for verdict in mine if verdict.problem is None]
        num_damaged = len(mine) - len(sound)
        table.add_row(
            name,
            f"{len(mine):,}",
            f"{sum(verdict.documents for verdict in sound):,}",
            f"{sum(verdict.tokens for verdict in sound):,}",
            _checked(sound),
            f"[red]{num_damaged} damaged[/red]" if num_damaged else "[green]sound[/green]",
        )
    console.print(table)


def _checked(verdicts: Sequence[ShardVerdict]) -> str:
    """What was checked in all shards, and what only in those that say enough of themselves."""
    if not verdicts:
        return ""
    names = ("index", "list", "ids", "ends", "checksums")
    counts = {name: sum(name in verdict.checked for verdict in verdicts) for name in names}
    total = len(verdicts)
    return ", ".join(
        name if count == total else f"{name} of {count}" for name, count in counts.items() if count
    )


def _refuse_shared(console: Console, shared: SharedDocuments, config: VerifyConfig) -> None:
    if shared.num_valid_documents == 0:
        console.print(
            f"no document of {', '.join(config.against)} occurs in {', '.join(config.input)} "
            f"({shared.compared_documents:,} compared, empty ones left out)",
            markup=False,
            soft_wrap=True,
        )
        return
    raise ValueError(
        f"{shared.num_valid_documents} documents of {', '.join(config.against)} occur in "
        f"{', '.join(config.input)} too, {shared.num_train_documents} times; the first: "
        f"{shared.example}; hold documents out with `megatron-dlm data split`"
    )
