"""What a shard says about itself: `<prefix>.manifest.json`, written last, marks a whole shard."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dlm.runtime.files import write_whole

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Facts about one shard that its .bin and .idx do not hold."""

    vocab_size: int
    """Every token id is below this."""
    tokens: int
    documents: int
    dtype: str
    """numpy name of the stored integers."""
    tokenizer_sha256: str | None
    """Hash of the tokenizer model that made the ids."""
    eod_id: int | None
    """Id at the end of every document; None if there is none."""
    mask_id: int | None
    """Id that occurs nowhere in the shard."""
    max_token_id: int
    """Largest id that occurs; -1 in an empty shard."""
    source: Sequence[str]
    """Files that the text came from."""
    format: int = FORMAT

    def write(self, prefix: str | os.PathLike[str]) -> None:
        write_whole(manifest_path(prefix), json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(prefix: str | os.PathLike[str]) -> Manifest | None:
        """The manifest of the shard; None for a shard without one, such as Megatron-LM's own."""
        path = manifest_path(prefix)
        if not path.exists():
            return None
        remedy = "write the shard again with `megatron-dlm preprocess`, or remove this file"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            manifest = Manifest(**fields)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a shard manifest ({error}); {remedy}") from None
        if manifest.format != FORMAT:
            raise ValueError(
                f"{path} has format {manifest.format}, this version reads {FORMAT}; {remedy}"
            )
        return manifest


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.manifest.json")
