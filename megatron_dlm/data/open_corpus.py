"""Opens the datasets of a blend, checks that they fit the run, and splits the budget."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.tokenizer_metadata import read_tokenizer_metadata
from megatron_dlm.data.blend import Blend
from megatron_dlm.data.budget import split_budget
from megatron_dlm.data.corpus import Corpus, Tier
from megatron_dlm.data.document_order import (
    GROUP_DOCUMENTS,
    BudgetOrder,
    DocumentOrder,
    WholeOrder,
)
from megatron_dlm.data.order import Use, derive_key
from megatron_dlm.data.packing import DocumentWindows, StreamWindows, Windows
from megatron_dlm.data.storage.dataset import Dataset, open_dataset
from megatron_dlm.data.token_stream import TokenReader


@dataclass(frozen=True)
class CorpusSettings:
    """What a corpus is made with, apart from the datasets."""

    seq_length: int
    seed: int
    vocab_size: int
    mask_token_id: int | None
    unique_tokens: int | None = None
    tokenizer_sha256: str | None = None
    packing: Literal["concat", "pack", "document"] = "concat"
    resets_attention: bool = False
    """With `concat`; the other packings always keep to the documents."""


def open_split(config: RunConfig, split: Literal["train", "valid"]) -> Corpus:
    """The corpus of data.train, with its budget, or of data.valid, whole."""
    data, tokenizer = config.data, config.data.tokenizer
    assert config.model.vocab_size is not None, "resolve() fills vocab_size"
    settings = CorpusSettings(
        seq_length=config.model.seq_length,
        seed=data.seed,
        vocab_size=config.model.vocab_size,
        mask_token_id=config.objective.mask_token_id,
        unique_tokens=data.unique_tokens if split == "train" else None,
        tokenizer_sha256=read_tokenizer_metadata(tokenizer).sha256 if tokenizer else None,
        packing=data.packing,
        resets_attention=data.resets_attention,
    )
    return open_corpus(data.train if split == "train" else data.valid, settings)


def open_corpus(prefixes: Mapping[str, float], settings: CorpusSettings) -> Corpus:
    """Open a blend (prefix -> weight); ValueError where a dataset does not fit the settings.

    With `unique_tokens`, be it all of them, the weights split the budget, each dataset gives
    exactly its part in the order of budgets, and one epoch passes each of them once. Without, every
    dataset is whole and the weights set how often each is drawn. Only the lists of shards are read
    before the first sample or `prepare`, unless windows keep to documents and have to be counted.
    """
    if not prefixes:
        raise ValueError("no datasets are given; list path prefixes and weights under data.train")
    datasets = [open_dataset(prefix) for prefix in prefixes]
    for dataset in datasets:
        _check_facts(dataset, settings)
    weights = list(prefixes.values())
    sizes = _sizes(datasets, weights, settings.unique_tokens)
    names = _short_names(list(prefixes))
    tiers = [
        Tier(
            name=names[place],
            dataset=dataset,
            weight=weights[place],
            unique_tokens=sizes[place],
            windows=_windows(dataset, place, sizes[place], settings),
        )
        for place, dataset in enumerate(datasets)
    ]
    if settings.unique_tokens is not None:
        weights = [tier.windows.num_windows for tier in tiers]
    return Corpus(
        tiers,
        Blend.of(weights),
        seed=settings.seed,
        seq_length=settings.seq_length,
        digest=_digest(datasets, list(prefixes.values()), settings),
    )


def _windows(dataset: Dataset, place: int, num_tokens: int, settings: CorpusSettings) -> Windows:
    seq_length, packing = settings.seq_length, settings.packing
    needed = seq_length + 1 if packing == "concat" else 1
    if num_tokens < needed:
        raise ValueError(
            f"sequence longer than the document set: {dataset.prefix} gives {num_tokens} tokens, "
            f"model.seq_length {seq_length} needs at least {needed}; shorten the sequence or give "
            "more text"
        )
    order: DocumentOrder
    key = derive_key(settings.seed, Use.DOCUMENT_ORDER, place)
    if settings.unique_tokens is None:
        order = WholeOrder(dataset, key=key)
    elif packing == "concat":
        order = BudgetOrder(dataset, num_tokens=num_tokens, key=key)
    else:
        order = BudgetOrder(
            dataset, num_tokens=num_tokens, key=key, block_documents=GROUP_DOCUMENTS
        )
    reader = TokenReader(
        dataset, vocab_size=settings.vocab_size, mask_token_id=settings.mask_token_id
    )
    if packing == "concat":
        return StreamWindows(
            order, reader, seq_length=seq_length, keep_documents=settings.resets_attention
        )
    return DocumentWindows(order, reader, seq_length=seq_length, share_windows=packing == "pack")


def _sizes(
    datasets: Sequence[Dataset], weights: Sequence[float], unique_tokens: int | None
) -> list[int]:
    """Unique tokens that each dataset gives."""
    if unique_tokens is None:
        return [dataset.num_tokens for dataset in datasets]
    parts = split_budget(unique_tokens, weights)
    for dataset, part in zip(datasets, parts, strict=True):
        if part > dataset.num_tokens:
            share = "" if len(datasets) == 1 else f", of which {part} from this one by its weight"
            raise ValueError(
                f"data.unique_tokens asks for {unique_tokens} tokens{share}, but {dataset.prefix} "
                f"holds {dataset.num_tokens}; lower data.unique_tokens or give more text"
            )
    return parts


def _check_facts(dataset: Dataset, settings: CorpusSettings) -> None:
    """Refuse the text of another tokenizer before any token is read; no manifest, no opinion."""
    facts, prefix = dataset.facts, dataset.prefix
    theirs, ours = facts.tokenizer_sha256, settings.tokenizer_sha256
    if ours is not None and theirs is not None and theirs != ours:
        raise ValueError(
            f"dataset {prefix} was made by the tokenizer with sha256 {theirs}, data.tokenizer has "
            f"{ours}; preprocess the text again or name the dataset's tokenizer"
        )
    if facts.vocab_size is not None and facts.vocab_size > settings.vocab_size:
        raise ValueError(
            f"dataset {prefix} has a vocabulary of {facts.vocab_size}, the model one of "
            f"{settings.vocab_size}; raise model.vocab_size or preprocess with a smaller tokenizer"
        )
    mask, largest = settings.mask_token_id, facts.max_token_id
    if mask is not None and mask != facts.mask_id and largest is not None and mask <= largest:
        raise ValueError(
            f"objective.mask_token_id {mask} may occur in the text of {prefix} (reserved mask id "
            f"{facts.mask_id}, largest id {largest}); use the reserved id or one above the largest"
        )


def _short_names(prefixes: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [Path(prefix).parts for prefix in prefixes]
    for count in range(1, max(len(part) for part in parts) + 1):
        names = [os.path.join(*part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(prefixes)  # the same path, written in two ways


def _digest(datasets: Sequence[Dataset], weights: Sequence[float], settings: CorpusSettings) -> str:
    facts = {
        "datasets": [
            [os.path.basename(d.prefix), d.num_tokens, d.num_documents, d.fingerprint()]
            for d in datasets
        ],
        "weights": weights,
        "seed": settings.seed,
        "unique_tokens": settings.unique_tokens,
        "seq_length": settings.seq_length,
        "packing": settings.packing,
        "resets_attention": settings.resets_attention,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
