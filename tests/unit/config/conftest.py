"""A tokenizer directory without a tokenizer: configuration reads only its metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

METADATA: dict[str, Any] = {
    "kind": "sentencepiece",
    "vocab_size": 1000,
    "pad_id": 0,
    "bos_id": 1,
    "eod_id": 2,
    "mask_id": 3,
    "special_ids": [0, 1, 2, 3],
    "sha256": "0" * 64,
    "bytes_per_token": 3.5,
}


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "metadata.json").write_text(json.dumps(METADATA))
    return directory
