"""The `data count` command: documents, tokens, windows and epochs, from lists and indices alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dlm.config.data_commands import CountConfig
from megatron_dlm.data.commands.report_file import in_bytes, prepare_report, write_report
from megatron_dlm.data.storage.dataset import Dataset, open_dataset
from megatron_dlm.data.storage.dataset_names import find_datasets


def count(config: CountConfig) -> None:
    """Print totals, and write them to `output` if given."""
    prepare_report(config.output)
    datasets = [open_dataset(name) for name in find_datasets(config.input)]
    budget = reckon(config, datasets)
    content = {
        "datasets": {dataset.prefix: totals([dataset]) for dataset in datasets},
        "sum": totals(datasets),
        "budget": budget,
    }
    write_report(config.output, content)
    console = Console()
    print_datasets(console, datasets)
    for name, value in budget.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
        console.print(f"{name.replace('_', ' ')}: {text}", highlight=False)


def totals(datasets: Sequence[Dataset]) -> dict[str, int]:
    """Sums over datasets; bytes are those of .bin and .idx."""
    entries = [entry for dataset in datasets for entry in dataset.entries]
    return {
        "shards": len(entries),
        "documents": sum(entry.documents for entry in entries),
        "tokens": sum(entry.tokens for entry in entries),
        "bytes": sum(entry.bin_bytes + entry.idx_bytes for entry in entries),
    }


def reckon(config: CountConfig, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """Windows and epochs that a training run will see.

    Raises ValueError where the budget is more than there is, or is for a blend, whose weights
    divide it.
    """
    tokens = [dataset.num_tokens for dataset in datasets]
    if config.unique_tokens is not None:
        if len(datasets) > 1:
            raise ValueError(
                f"unique_tokens is {config.unique_tokens}, but {len(datasets)} datasets are named; "
                "count one of them: the weights of a blend divide its budget"
            )
        if config.unique_tokens > tokens[0]:
            raise ValueError(
                f"unique_tokens is {config.unique_tokens}, but {datasets[0].prefix} holds "
                f"{tokens[0]}; lower it, or give more text"
            )
        tokens = [config.unique_tokens]
    num_unique = sum(tokens)
    known: dict[str, Any] = {"unique_tokens": num_unique}
    if config.seq_length is not None:
        # Each token is scored once in an epoch: the last window of a dataset holds the rest.
        known["windows_per_epoch"] = sum(-(-size // config.seq_length) for size in tokens)
    if config.train_tokens is not None and num_unique:
        known["epochs"] = config.train_tokens / num_unique
    return known if len(known) > 1 or config.unique_tokens is not None else {}


def print_datasets(console: Console, datasets: Sequence[Dataset]) -> None:
    """A line for each dataset, and their sum."""
    table = Table(show_footer=len(datasets) > 1)
    total = totals(datasets)
    table.add_column("dataset", footer="sum", overflow="fold")
    for name in ("shards", "documents", "tokens"):
        table.add_column(name, footer=f"{total[name]:,}", justify="right")
    table.add_column("on disk", footer=in_bytes(total["bytes"]), justify="right")
    for dataset in datasets:
        mine = totals([dataset])
        counts = [f"{mine[name]:,}" for name in ("shards", "documents", "tokens")]
        table.add_row(dataset.prefix, *counts, in_bytes(mine["bytes"]))
    console.print(table)
