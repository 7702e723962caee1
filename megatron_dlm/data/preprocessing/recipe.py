"""What the bytes of a preprocess run depend on: `PREFIX.recipe.json`, written before the shards."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.config.json_text import parse_json

FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """Same recipe, same bytes: whatever the number of workers, array tasks and interruptions.

    `on_error` is not part of it: what was read without an error is the same either way, so that a
    run which stopped at broken text can go on without it.
    """

    tokenizer_sha256: str
    vocab_size: int
    normalization: str | None
    """Unicode normal form that texts are brought to before they are encoded."""
    eod_id: int | None
    """Id appended to every document; None for nothing."""
    mask_id: int | None
    text_field: str
    minimum_characters: int
    validation_fraction: float
    shard_size_bytes: int
    inputs_sha256: str
    """Digest of the names, sizes and cuts of all inputs."""
    num_jobs: int
    format: int = FORMAT

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def first_difference(self, other: dict[str, Any]) -> str | None:
        """What another recipe says otherwise, in words; None if it is the same."""
        for name, value in asdict(self).items():
            if name not in other or other[name] != value:
                if name == "inputs_sha256":
                    return "its input files have other names or sizes"
                return f"its {name} is {other.get(name)}, now it is {value}"
        return None


def recipe_path(prefix: str) -> Path:
    return Path(f"{prefix}.recipe.json")


def read_recipe(prefix: str) -> dict[str, Any] | None:
    """Fields of the recipe beside the shards; None where there is none."""
    path = recipe_path(prefix)
    try:
        fields = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged (not an object); remove it")
    return fields


def write_recipe(prefix: str, recipe: Recipe) -> None:
    """Write it whole; array tasks that start in the same instant write the same."""
    path = recipe_path(prefix)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.write_text(recipe.to_json(), encoding="utf-8")
    temporary.replace(path)


def remove_unfinished_recipes(prefix: str) -> None:
    """What tasks left that were killed while they wrote it."""
    path = recipe_path(prefix)
    for temporary in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)
