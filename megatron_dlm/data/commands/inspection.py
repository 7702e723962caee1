"""The `data inspect` command: what shards hold, in numbers and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console

from megatron_dlm.config.data_commands import InspectConfig
from megatron_dlm.data.commands.counting import totals
from megatron_dlm.data.commands.inspection_tables import print_inspection
from megatron_dlm.data.commands.report_file import prepare_report, write_report
from megatron_dlm.data.commands.shard_tally import Tally, TallyTask, tally_shard
from megatron_dlm.data.commands.shard_workers import map_shards
from megatron_dlm.data.storage.dataset import Dataset, open_dataset
from megatron_dlm.data.storage.dataset_names import find_datasets
from megatron_dlm.data.storage.manifest import Manifest, total_text_bytes
from megatron_dlm.data.tokenization.tokenizer import Tokenizer, load_tokenizer

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def inspect(config: InspectConfig) -> None:
    """Print tables and text of every dataset, and write all numbers to `output` if given."""
    prepare_report(config.output)
    datasets = [open_dataset(name) for name in find_datasets(config.input)]
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    console = Console()
    found: dict[str, Any] = {}
    for dataset in datasets:
        _check_tokenizer(dataset, tokenizer, config)
        found[dataset.prefix] = inspect_dataset(dataset, tokenizer, config)
        print_inspection(console, found[dataset.prefix])
    write_report(config.output, {"datasets": found})


def inspect_dataset(
    dataset: Dataset, tokenizer: Tokenizer | None, config: InspectConfig
) -> dict[str, Any]:
    """All that the command says of one dataset, ready for JSON."""
    roles = _roles(dataset, tokenizer)
    facts = dataset.facts
    vocab_size = facts.vocab_size if tokenizer is None else tokenizer.vocab_size
    tally = _tally(dataset, vocab_size, roles.get("eod"), config)
    return {
        "dataset": dataset.prefix,
        **totals([dataset]),
        "dtypes": dict(tally.dtypes),
        "lengths": _lengths(tally.lengths),
        "ids": _ids(tally, vocab_size, roles, tokenizer),
        "facts": asdict(facts),
        **_from_manifests(dataset),
        "windows": _windows(dataset, tokenizer, config),
    }


def _check_tokenizer(dataset: Dataset, tokenizer: Tokenizer | None, config: InspectConfig) -> None:
    made_by = dataset.facts.tokenizer_sha256
    if tokenizer is not None and made_by not in (None, tokenizer.sha256):
        raise ValueError(
            f"tokenizer {config.tokenizer} did not make the ids of {dataset.prefix}: its hash is "
            f"{tokenizer.sha256}, that of the manifest {made_by}; give the right one"
        )


def _roles(dataset: Dataset, tokenizer: Tokenizer | None) -> dict[str, int]:
    """Role -> id of the special ids that are known."""
    known = {"eod": dataset.facts.eod_id, "mask": dataset.facts.mask_id}
    if tokenizer is not None:
        known = {name: getattr(tokenizer, f"{name}_id") for name in ("eod", "mask", "pad", "bos")}
    return {name: number for name, number in known.items() if number is not None}


def _tally(
    dataset: Dataset, vocab_size: int | None, eod_id: int | None, config: InspectConfig
) -> Tally:
    most = config.max_tokens
    if most is not None:
        most = -(-most // max(1, len(dataset.entries)))
    tasks = [TallyTask(entry.prefix, vocab_size, eod_id, most) for entry in dataset.entries]
    total = Tally()
    sizes_bytes = [entry.bin_bytes for entry in dataset.entries]
    if most is not None:
        sizes_bytes = [min(size, 4 * most) for size in sizes_bytes]
    counting = map_shards(
        tally_shard, tasks, sizes_bytes=sizes_bytes, workers=config.workers, label="counting"
    )
    for tally in counting:
        total.add(tally)
    return total


def _lengths(lengths: Counter[int]) -> dict[str, Any]:
    """Quantiles (the smallest length that so many documents do not exceed) and a histogram."""
    sizes = np.array(sorted(lengths), dtype=np.int64)
    counts = np.array([lengths[size] for size in sizes.tolist()], dtype=np.int64)
    num_documents = int(counts.sum())
    if num_documents == 0:
        return {"mean": None, "quantiles": {}, "longest": None, "empty": 0, "histogram": []}
    reached = np.cumsum(counts)
    places = np.searchsorted(reached, np.array(QUANTILES) * num_documents)
    bins = np.frexp(sizes)[1]  # 0 for 0, k for [2^(k-1), 2^k)
    histogram = [
        {
            "from": 0 if number == 0 else 1 << (number - 1),
            "to": 0 if number == 0 else (1 << number) - 1,
            "documents": int(counts[bins == number].sum()),
            "tokens": int((counts * sizes)[bins == number].sum()),
        }
        for number in range(int(bins.min()), int(bins.max()) + 1)
    ]
    return {
        "mean": float((counts * sizes).sum() / num_documents),
        "quantiles": {
            str(q): int(sizes[place]) for q, place in zip(QUANTILES, places, strict=True)
        },
        "longest": int(sizes[-1]),
        "empty": lengths[0],
        "histogram": histogram,
    }


def _ids(
    tally: Tally, vocab_size: int | None, roles: dict[str, int], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    names = {number: name for name, number in roles.items()}
    counts = tally.id_counts
    others = tokenizer.special_ids if tokenizer is not None else ()
    special = {
        name: {"id": number, "count": _count(counts, number)} for number, name in names.items()
    }
    for number in others:
        if number not in names and _count(counts, number):
            special[f"special {number}"] = {"id": number, "count": _count(counts, number)}
    return {
        "counted_tokens": tally.counted_tokens,
        "counted_documents": tally.counted_documents,
        "smallest": tally.smallest_id,
        "largest": tally.largest_id,
        "different": int((counts > 0).sum()),
        "vocab_size": vocab_size,
        "outside_vocabulary": None if vocab_size is None else tally.num_outside,
        "first_outside": None if vocab_size is None else tally.first_outside,
        "special": special,
        "documents_without_eod": tally.num_unended if "eod" in roles else None,
    }


def _count(counts: np.ndarray, number: int) -> int:
    return int(counts[number]) if number < len(counts) else 0


def _from_manifests(dataset: Dataset) -> dict[str, Any]:
    """Inputs and what was left out of them, over the shards that say so."""
    inputs: dict[str, None] = {}
    left_out: Counter[str] = Counter()
    manifests = [Manifest.read(entry.prefix) for entry in dataset.entries]
    for manifest in manifests:
        if manifest is not None:
            inputs.update(dict.fromkeys(source.file for source in manifest.sources))
            left_out.update(manifest.left_out)
    return {
        "without_manifest": manifests.count(None),
        "inputs": list(inputs),
        "left_out": dict(left_out),
        "text_bytes": total_text_bytes(manifests),
    }


def _windows(
    dataset: Dataset, tokenizer: Tokenizer | None, config: InspectConfig
) -> list[dict[str, Any]]:
    if dataset.num_tokens == 0:
        return []
    draw = np.random.default_rng(config.seed).integers(dataset.num_tokens, size=config.num_windows)
    return [_window(dataset, tokenizer, int(token), config.window_tokens) for token in draw]


def _window(
    dataset: Dataset, tokenizer: Tokenizer | None, token: int, num_tokens: int
) -> dict[str, Any]:
    """The stretch of a document from this token of the dataset on."""
    place = int(np.searchsorted(dataset.first_tokens, token, side="right")) - 1
    shard = dataset.shard(place)
    token -= int(dataset.first_tokens[place])
    document = shard.document_at(token)
    (start,), (length,) = shard.document_spans(np.array([document]))
    count = min(num_tokens, int(start + length) - token)
    ids: Sequence[int] = shard.tokens(token, count).tolist()
    return {
        "shard": shard.prefix,
        "document": document,
        "offset": token - int(start),
        "document_tokens": int(length),
        "ids": ids,
        "text": None if tokenizer is None else tokenizer.decode(ids),
    }
