"""The `data split` command: documents held out for validation, chosen by the hash of their ids.

The output has the layout of a preprocess run (see `shard_set`): each job reads a few shards and
writes PREFIX_{job}_{part} and PREFIX_valid_{job}_{part}.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dlm.config.data_commands import SplitConfig
from megatron_dlm.data.commands.shard_workers import map_shards
from megatron_dlm.data.commands.split_job import SIDES, Share, SplitJob, run_split_job
from megatron_dlm.data.preprocessing.shard_set import (
    finish,
    is_output,
    numbered_shards,
    remove_shards,
    shard_prefix,
    valid_prefix,
)
from megatron_dlm.data.storage.dataset import (
    Facts,
    ShardEntry,
    dataset_path,
    describe,
    refuse_shard_named_like_list,
)
from megatron_dlm.data.storage.dataset_names import find_shards
from megatron_dlm.data.storage.manifest import Manifest
from megatron_dlm.data.storage.shards import Shard
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer


def split(config: SplitConfig) -> None:
    """Write PREFIX and PREFIX_valid; a stopped command goes on when it is run again.

    Raises ValueError where a side would be empty, or where other shards have the prefix.
    """
    jobs = plan_split(config)
    totals: dict[str, Share] = {side: Share() for side in SIDES}
    splitting = map_shards(
        run_split_job,
        jobs,
        sizes_bytes=[job.size_bytes for job in jobs],
        workers=config.workers,
        label="splitting",
    )
    for shares in splitting:
        totals = {side: total + shares[side] for side, total in totals.items()}
    num_documents = sum(share.documents for share in totals.values())
    for side, share in totals.items():
        if share.tokens == 0:
            remove_shards(config.output_prefix)
            raise ValueError(
                f"no text fell to the {side} side: {num_documents} documents are too few for "
                f"fraction {config.fraction}; change it or give more"
            )
    missing = finish(config.output_prefix)
    assert missing == [], missing
    _print_totals(totals, config)


def plan_split(config: SplitConfig) -> list[SplitJob]:
    """The work, after everything that would refuse it; a function of the shards alone."""
    entries, facts = describe(find_shards(config.input))
    entries = [entry for entry in entries if entry.documents]
    facts, final_id = _complete(entries, facts, config.tokenizer)
    sums = [entry.bin_sha256 or Shard(entry.prefix).fingerprint() for entry in entries]
    recipe = {
        "shards": sums,
        "facts": asdict(facts),
        "fraction": config.fraction,
        "shard_size_bytes": config.shard_size_bytes,
    }
    recipe_sha256 = _sha256(recipe)
    _refuse_other_shards(entries, recipe_sha256, config)
    # Text that is a side of an earlier split is new text: its other side is not in it.
    origin_sha256 = facts.origin_sha256
    if origin_sha256 is None or facts.held_out is not None:
        origin_sha256 = _sha256([origin_sha256 or sums, asdict(facts)["held_out"]])
    groups = list(_groups(entries, config.shard_size_bytes))
    return [
        SplitJob(
            number=number,
            num_jobs=len(groups),
            entries=tuple(group),
            facts=facts,
            final_id=final_id,
            output_prefix=config.output_prefix,
            fraction=config.fraction,
            shard_size_bytes=config.shard_size_bytes,
            origin_sha256=origin_sha256,
            recipe_sha256=recipe_sha256,
        )
        for number, group in enumerate(groups)
    ]


def _complete(
    entries: Sequence[ShardEntry], facts: Facts, tokenizer: str | None
) -> tuple[Facts, int | None]:
    """What the new manifests say, and the id that does not count at the end of a document."""
    bare = [entry.prefix for entry in entries if entry.bin_sha256 is None]
    if tokenizer is None:
        if bare:
            raise ValueError(
                f"shard {bare[0]} has no manifest that tells its vocabulary; give --tokenizer"
            )
        return facts, facts.eod_id
    opened = load_tokenizer(tokenizer)
    if facts.tokenizer_sha256 not in (None, opened.sha256):
        raise ValueError(
            f"tokenizer {tokenizer} is not the one that made the shards: its hash is "
            f"{opened.sha256}, theirs {facts.tokenizer_sha256}; give that one, or leave it out"
        )
    if not bare:
        return facts, facts.eod_id
    # Nothing says that every document of a shard without a manifest ends in this id.
    known = replace(
        facts,
        vocab_size=opened.vocab_size,
        tokenizer_sha256=opened.sha256,
        eod_id=None,
        mask_id=opened.mask_id,
    )
    return known, opened.eod_id


def _groups(entries: Sequence[ShardEntry], size_bytes: int) -> Iterator[list[ShardEntry]]:
    """Consecutive shards that together have the size of a new one, or more."""
    group: list[ShardEntry] = []
    for entry in entries:
        group.append(entry)
        if sum(member.bin_bytes for member in group) >= size_bytes:
            yield group
            group = []
    if group:
        yield group


def _refuse_other_shards(
    entries: Sequence[ShardEntry], recipe_sha256: str, config: SplitConfig
) -> None:
    """The output may neither replace what is read nor mix with other shards."""
    prefix = config.output_prefix
    for entry in entries:
        if is_output(Path(f"{entry.prefix}.manifest.json"), prefix):
            raise ValueError(
                f"output_prefix {prefix} names the input shard {entry.prefix}; choose another"
            )
    for name in (prefix, valid_prefix(prefix)):
        refuse_shard_named_like_list(name)
    if config.overwrite:
        remove_shards(prefix)
        return
    remedy = "choose another output_prefix, or give --overwrite true to remove it"
    for name in (prefix, valid_prefix(prefix)):
        there = [shard_prefix(name, *place) for place in numbered_shards(name)]
        for shard in there:
            if _recipe_of(shard) != recipe_sha256:
                raise ValueError(
                    f"shard {shard} was made of other shards or with other settings; {remedy}"
                )
        if dataset_path(name).exists() and not there:
            raise ValueError(f"{dataset_path(name)} lists other shards; {remedy}")


def _recipe_of(shard: str) -> str | None:
    manifest = Manifest.read(shard)
    return manifest.origin.recipe_sha256 if manifest and manifest.origin else None


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _print_totals(totals: Mapping[str, Share], config: SplitConfig) -> None:
    documents = sum(share.documents for share in totals.values())
    tokens = sum(share.tokens for share in totals.values())
    table = Table(title=f"split by document hash, fraction {config.fraction:g}")
    table.add_column("dataset", overflow="fold")
    for name in ("documents", "share", "tokens", "share"):
        table.add_column(name, justify="right")
    names = {"train": config.output_prefix, "valid": valid_prefix(config.output_prefix)}
    for side, name in names.items():
        share = totals[side]
        table.add_row(
            name,
            f"{share.documents:,}",
            f"{share.documents / documents:.4%}",
            f"{share.tokens:,}",
            f"{share.tokens / tokens:.4%}",
        )
    console = Console()
    console.print(table)
    lines = [f"--data.{side} '{{{os.fspath(name)}: 1.0}}'" for side, name in names.items()]
    console.print("use it with " + " ".join(lines), markup=False, soft_wrap=True, highlight=False)
