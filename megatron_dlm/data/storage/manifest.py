"""What a shard says about itself: `<prefix>.manifest.json`, written last, marks a whole shard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_dlm.config.json_text import parse_json
from megatron_dlm.runtime.files import write_whole
from megatron_dlm.runtime.seals import sealed, unsealed

FORMAT = 2


@dataclass(frozen=True)
class Source:
    """The stretch of one input file that a shard holds."""

    file: str
    begin: int
    """First byte of the text, or first row of a parquet file."""
    end: int
    """One past the last byte or row."""


@dataclass(frozen=True)
class HeldOut:
    """The side of a split by document hash that a shard holds."""

    fraction: float
    """Share of the documents that is held out for validation."""
    side: Literal["train", "valid"]
    by: Literal["text", "tokens"] = "text"
    """What was hashed: the text (`preprocess`) or the token ids (`data split`) of a document."""


@dataclass(frozen=True)
class Origin:
    """The run that a shard is a part of; the same for every number of workers and array tasks."""

    sha256: str
    """Digest of all inputs of the run: the same text gives the same digest."""
    recipe_sha256: str
    """Digest of the inputs and of every setting that the bytes depend on."""
    job: int
    num_jobs: int
    part: int
    """Number of the shard within the job."""
    is_last: bool
    """The job ends with this shard."""
    resume_at: Sequence[int] = ()
    """Piece and offset at which the next part of the job begins."""


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
    bin_sha256: str
    """Checksum of the .bin file."""
    idx_sha256: str
    """Checksum of the .idx file."""
    sources: Sequence[Source] = ()
    """Where the text came from, in order."""
    text_bytes: int | None = None
    """UTF-8 bytes of the documents' text; None if unknown."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason -> documents (or files) that were skipped."""
    held_out: HeldOut | None = None
    """None if no document was held out."""
    origin: Origin | None = None
    """None for a shard that was not made by `megatron-dlm preprocess`."""
    format: int = FORMAT

    def write(self, prefix: str | os.PathLike[str]) -> None:
        write_whole(manifest_path(prefix), json.dumps(sealed(asdict(self)), indent=1) + "\n")

    @staticmethod
    def read(prefix: str | os.PathLike[str]) -> Manifest | None:
        """The manifest of the shard; None for a shard without one, such as Megatron-LM's own."""
        path = manifest_path(prefix)
        if not path.exists():
            return None
        remedy = "write the shard again with `megatron-dlm preprocess`, or remove this file"
        try:
            return _from_json(unsealed(parse_json(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a shard manifest ({error}); {remedy}") from None


def total_text_bytes(manifests: Iterable[Manifest | None]) -> int | None:
    """UTF-8 bytes of the text of all shards; None where one does not say."""
    total = 0
    for manifest in manifests:
        if manifest is None or manifest.text_bytes is None:
            return None
        total += manifest.text_bytes
    return total


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.manifest.json")


def _from_json(fields: dict[str, Any]) -> Manifest:
    if fields.get("format") != FORMAT:
        raise ValueError(f"format {fields.get('format')}, this version reads {FORMAT}")
    held_out, origin = fields["held_out"], fields["origin"]
    return Manifest(
        **{
            **fields,
            "sources": [Source(**source) for source in fields["sources"]],
            "held_out": HeldOut(**held_out) if held_out else None,
            "origin": Origin(**origin) if origin else None,
        }
    )
