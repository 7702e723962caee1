"""The JSON card beside a tokenizer: enough to size and check a model without loading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METADATA_FILE = "metadata.json"


@dataclass(frozen=True)
class TokenizerMetadata:
    """What `metadata.json` of a tokenizer directory says."""

    kind: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eod_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    sha256: str
    bytes_per_token: float


def read_tokenizer_metadata(directory: str) -> TokenizerMetadata:
    """Read and check `<directory>/metadata.json`; ValueError names the file and what is wrong."""
    path = Path(directory) / METADATA_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"data.tokenizer {directory}: cannot read {path} ({error.strerror}); "
            "make one with `megatron-dlm tokenizer`"
        ) from None
    except ValueError:
        raise ValueError(f"data.tokenizer {directory}: {path} is not valid JSON") from None
    metadata = _from_json(values, path)
    special = metadata.special_ids
    for name in ("pad_id", "bos_id", "eod_id", "mask_id"):
        identifier = getattr(metadata, name)
        if identifier not in special or not 0 <= identifier < metadata.vocab_size:
            raise ValueError(
                f"{path}: {name} is {identifier}; it must be one of special_ids {list(special)} "
                f"and below vocab_size {metadata.vocab_size}"
            )
    return metadata


def _from_json(values: Any, path: Path) -> TokenizerMetadata:
    names = TokenizerMetadata.__dataclass_fields__
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object")
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; make the tokenizer again")
    known = {name: values[name] for name in names}
    integers = [known[name] for name in names if name.endswith("_id") or name == "vocab_size"]
    special = known["special_ids"]
    if not isinstance(special, list) or not all(type(item) is int for item in integers + special):
        raise ValueError(f"{path}: vocab_size and all ids must be integers")
    return TokenizerMetadata(**{**known, "special_ids": tuple(special)})
