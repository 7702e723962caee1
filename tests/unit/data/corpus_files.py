"""Corpora in every format that is read, and their documents as the readers give them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from megatron_dlm.data.inputs.documents import Document
from megatron_dlm.data.inputs.input_plan import find_files, plan_jobs
from megatron_dlm.data.inputs.readers import read_documents

PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def json_lines(texts: Iterable[str], *, field: str = "text", end: str = "\n") -> bytes:
    """One object per line; other keys lie around the text."""
    records = ({"id": number, field: text, "url": "x"} for number, text in enumerate(texts))
    return "".join(json.dumps(record) + end for record in records).encode()


def write_parquet(path: Path, texts: Sequence[str | None], *, group_rows: int = 3) -> None:
    """Columns `id` and `text`."""
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, "string")})
    pyarrow.parquet.write_table(table, path, row_group_size=group_rows)


def documents(
    *inputs: Path | str,
    text_field: str = "text",
    job_bytes: int = 1 << 30,
    left_out: Counter[str] | None = None,
) -> list[Document]:
    """Documents of all jobs; with `left_out`, what cannot be used is skipped and counted there."""
    found: list[Document] = []
    for job in plan_jobs(find_files([str(path) for path in inputs]), job_bytes=job_bytes):
        on_error = "stop" if left_out is None else "skip"
        counts = Counter[str]() if left_out is None else left_out
        found += read_documents(
            job.pieces, text_field=text_field, on_error=on_error, left_out=counts
        )
    return found


def texts(*inputs: Path | str, text_field: str = "text", job_bytes: int = 1 << 30) -> list[str]:
    """Their texts alone."""
    found = documents(*inputs, text_field=text_field, job_bytes=job_bytes)
    return [document.text for document in found]
