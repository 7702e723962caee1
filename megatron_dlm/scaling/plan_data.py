"""The part of `plan` that looks at the data, where it lies on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from megatron_dlm.config.schema import RunConfig
from megatron_dlm.data.corpus import Corpus, TierReport
from megatron_dlm.data.open_corpus import open_split
from megatron_dlm.data.storage.dataset import dataset_path, read_list
from megatron_dlm.data.storage.manifest import Manifest


def open_training_data(config: RunConfig) -> Corpus | None:
    """The corpus of a resolved run; None where its shards are not here, as on a login machine.

    Raises ValueError where they are here and do not fit the run.
    """
    prefixes = list(config.data.train)
    if not prefixes or not all(_is_here(prefix) for prefix in prefixes):
        return None
    return open_split(config, "train")


def announced_tokens(config: RunConfig) -> int | None:
    """Unique tokens of the run: data.unique_tokens, else what the lists of shards and manifests
    say, also where the shards are not here; None where one does not say."""
    if config.data.unique_tokens is not None:
        return config.data.unique_tokens
    sizes = [_announced(prefix) for prefix in config.data.train]
    known = [size for size in sizes if size is not None]
    return sum(known) if known and len(known) == len(sizes) else None


def _announced(prefix: str) -> int | None:
    if dataset_path(prefix).is_file():
        return sum(entry.tokens for entry in read_list(prefix)[0])
    manifest = Manifest.read(prefix)
    return manifest.tokens if manifest else None


def data_table(rows: Sequence[TierReport]) -> Table:
    """What the run takes from each dataset."""
    table = Table(title="what the run takes from its data")
    for name in ("dataset", "weight", "tokens", "unique", "samples", "epochs", "sees"):
        table.add_column(name, justify="left" if name == "dataset" else "right", overflow="fold")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.weight:g}",
            f"{row.available_tokens:,}",
            f"{row.unique_tokens:,}",
            f"{row.samples:,}",
            f"{row.epochs:.4g}",
            f"{row.seen_tokens:,}",
        )
    return table


def _is_here(prefix: str) -> bool:
    shards = [prefix]
    if dataset_path(prefix).is_file():
        shards = [entry.prefix for entry in read_list(prefix)[0]]
    return all(Path(f"{shard}.idx").is_file() for shard in shards)
