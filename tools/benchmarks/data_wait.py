"""How long the steps of a real `megatron-dlm train` run wait for data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from megatron_dlm.data.storage.shard_writer import ShardWriter

_VOCAB_SIZE = 8192
_NUM_DOCUMENTS, _DOCUMENT_TOKENS = 2000, 1000
_NUM_STEPS, _INTERVAL_STEPS = 40, 10


def measure_data_wait() -> float:
    """Train a small masked model on random text; the mean share over all but the first interval."""
    with tempfile.TemporaryDirectory() as folder:
        _write_shard(Path(folder, "text"))
        _train(Path(folder))
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    shares = [share for line in lines if (share := _share(json.loads(line))) is not None]
    assert len(shares) == _NUM_STEPS // _INTERVAL_STEPS, shares
    return float(np.mean(shares[1:]))


def _share(entry: dict[str, object]) -> float | None:
    value = entry.get("data_wait_share")
    return None if value is None else float(str(value))


def _write_shard(prefix: Path) -> None:
    generator = np.random.default_rng(1)
    with ShardWriter(prefix, vocab_size=_VOCAB_SIZE, mask_id=_VOCAB_SIZE - 1) as writer:
        for _ in range(_NUM_DOCUMENTS):
            writer.add_document(generator.integers(0, _VOCAB_SIZE - 1, _DOCUMENT_TOKENS))
        writer.publish()


def _train(folder: Path) -> None:
    options = {
        "model.num_layers": 4,
        "model.hidden_size": 128,
        "model.seq_length": 256,
        "model.vocab_size": _VOCAB_SIZE,
        "objective.mask_token_id": _VOCAB_SIZE - 1,
        "data.train": json.dumps({str(folder / "text"): 1.0}),
        "train.steps": _NUM_STEPS,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 4,
        "train.precision": "fp32",
        "train.device": "cpu",
        "train.output_dir": folder / "run",
        "logging.interval_steps": _INTERVAL_STEPS,
        "logging.tensorboard": "false",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    subprocess.run(
        [sys.executable, "-m", "megatron_dlm", "train", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        check=True,
    )
