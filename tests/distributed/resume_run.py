"""Whole training runs inside pooled ranks, and what their checkpoints hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

VOCAB_SIZE, MASK_ID = 90, 89


def write_shards(directory: Path, seed: int = 3) -> Path:
    """train and valid shards of made-up documents; a prefix directory for `train_in_ranks`."""
    from megatron_dlm.data.storage.shard_writer import ShardWriter

    random = np.random.default_rng(seed)
    for name, num_documents in (("train", 60), ("valid", 20)):
        with ShardWriter(directory / name, vocab_size=VOCAB_SIZE, mask_id=MASK_ID) as writer:
            for _ in range(num_documents):
                writer.add_document(random.integers(0, MASK_ID, random.integers(5, 60)))
            writer.publish()
    return directory


def train_in_ranks(base: dict[str, Any], shards: Path, run: Path, flags: list[str]) -> None:
    """`megatron-dlm train` on the ranks of the pool."""
    import torch.distributed as dist
    import yaml

    from megatron_dlm.config.derive import resolve
    from megatron_dlm.config.parse import parse
    from megatron_dlm.config.schema import RunConfig
    from megatron_dlm.config.validate import check
    from megatron_dlm.runtime.device import open_device
    from megatron_dlm.runtime.parallel import laid_out
    from megatron_dlm.training.train import train

    config = {
        **base,
        "model": {**base["model"], "vocab_size": VOCAB_SIZE, "make_vocab_size_divisible_by": 32},
        "objective": {"mask_token_id": MASK_ID},
        "data": {
            "train": {str(shards / "train"): 1.0},
            "valid": {str(shards / "valid"): 1.0},
            "unique_tokens": 1000,
        },
        "train": {**base["train"], "device": "cpu", "output_dir": str(run)},
    }
    path = run.parent / f"{run.name}_{dist.get_rank()}.yaml"
    path.write_text(yaml.safe_dump(config))
    parsed = resolve(parse(RunConfig, ["--config", str(path), *flags], "test"))
    check(parsed, dist.get_world_size())
    device = open_device("cpu")
    with laid_out(parsed.parallel) as parallel:
        train(parsed, device, parallel)


def checkpoint_tensors(path: str) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, whole."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron_dlm.checkpoint.safe_loading import safe_loading

    with safe_loading():
        loaded = dist_checkpointing.load_plain_tensors(path)
    return {name: value.float().numpy() for name, value in loaded.items() if torch.is_tensor(value)}
