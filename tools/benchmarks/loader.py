"""The data loader at scale: start-up, windows per second and memory against shards and epochs.

The corpora are made for the occasion: real indices, token files that are holes (they read as zeros
and cost no disk), so 1,000 shards are a terabyte of tokens in 100 million documents. Every row is
measured in a process of its own, one thread, with warm page cache. A second table reads a file that
is really there with a cold cache. Then a real `megatron-dlm train` run reports how long its steps
waited for data, and the need of an H100 is compared with what one thread gives.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.data.open_corpus import CorpusSettings, open_corpus
from megatron_dlm.data.storage.dataset import write_dataset
from megatron_dlm.data.storage.manifest import Manifest
from megatron_dlm.data.storage.shards import HEADER, MAGIC, Shard

_VOCAB_SIZE, _SEQ_LENGTH = 50_304, 2048
_UINT16 = 8  # Megatron's code of the integer type
_ROW = "--row"
Row = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    if arguments.row is not None:
        print(json.dumps(measure(**json.loads(arguments.row))))
        return
    from measure import environment, print_environment, write_json

    facts = environment()
    print_environment(facts)
    folder = Path(tempfile.mkdtemp(prefix="loader_", dir=arguments.folder))
    try:
        rows = _measure_rows(folder, arguments)
        cold = None if arguments.skip_cold else _measure_cold(folder)
    finally:
        shutil.rmtree(folder)
    estimate = _estimate_h100(rows[0]["windows_per_second"])
    share = None if arguments.skip_training else _data_wait()
    results = {"rows": rows, "cold": cold, "h100": estimate, "data_wait_share": share}
    write_json(arguments.json, {"environment": facts, **results})


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--shards", type=int, nargs="+", default=[10, 100, 1000])
    options.add_argument("--epochs", type=int, nargs="+", default=[1, 500])
    options.add_argument(
        "--documents", type=int, default=100_000, help="documents of a shard (%(default)s)"
    )
    options.add_argument(
        "--tokens", type=int, default=5000, help="mean tokens of a document (%(default)s)"
    )
    options.add_argument(
        "--budget", type=int, default=10**9, help="unique tokens of the budgets (%(default)s)"
    )
    options.add_argument(
        "--windows", type=int, default=2000, help="windows timed for a row (%(default)s)"
    )
    options.add_argument("--folder", type=Path, help="where the corpora are made; 2 GB are needed")
    options.add_argument("--skip-cold", action="store_true", help="leave out the cold reads")
    options.add_argument("--skip-training", action="store_true", help="leave out the real run")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    options.add_argument(_ROW, help=argparse.SUPPRESS)
    return options.parse_args()


def _measure_rows(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    print(_line("data", "shards", "epochs", "open s", "windows/s", "own MB", "mapped MB"))
    rows: list[Row] = []
    kinds: list[tuple[str, Row]] = [
        ("whole", {}),
        ("budget", {"unique_tokens": arguments.budget}),
        ("budget, packed", {"unique_tokens": arguments.budget, "packing": "pack"}),
    ]
    for num_shards in arguments.shards:
        prefix = folder / f"of_{num_shards}"
        make_dataset(prefix, num_shards, arguments.documents, arguments.tokens)
    for kind, fields in kinds:
        for num_shards in arguments.shards:
            for epochs in arguments.epochs:
                request = {
                    "prefix": str(folder / f"of_{num_shards}"),
                    "epochs": epochs,
                    "num_windows": arguments.windows,
                    "fields": fields,
                }
                row = _in_own_process(request)
                rows.append({"data": kind, "shards": num_shards, "epochs": epochs, **row})
                first = next(row for row in rows if row["data"] == kind)
                print(_row_line(rows[-1], first), flush=True)
    print("in brackets: the ratio to the first row of the same data\n")
    return rows


def _in_own_process(request: Mapping[str, Any]) -> Row:
    """The second of two runs: what they map is then in the page cache."""
    command = [sys.executable, __file__, _ROW, json.dumps(request)]
    for _ in range(2):
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    row: Row = json.loads(answer.stdout)
    return row


def measure(
    prefix: str, epochs: int, num_windows: int, fields: Mapping[str, Any]
) -> dict[str, float]:
    """Open a corpus and read windows that lie evenly over a run of so many epochs.

    As many windows come before the timed ones, to open the shards and map their pages.
    """
    settings = CorpusSettings(_SEQ_LENGTH, 1, _VOCAB_SIZE, None, **fields)
    started = time.perf_counter()
    corpus = open_corpus({prefix: 1.0}, settings)
    corpus.prepare()
    corpus.sample(0)
    open_seconds = time.perf_counter() - started
    num_samples = epochs * corpus.num_windows
    samples = np.linspace(0, num_samples - 1, 2 * num_windows).astype(np.int64).tolist()
    for index in samples[::2]:
        corpus.sample(index)
    started = time.perf_counter()
    for index in samples[1::2]:
        corpus.sample(index)
    seconds = time.perf_counter() - started
    memory = _resident_bytes()
    return {
        "open_seconds": open_seconds,
        "windows_per_second": num_windows / seconds,
        "own_bytes": memory["RssAnon"],
        "mapped_bytes": memory["RssFile"],
    }


def _resident_bytes() -> dict[str, int]:
    """Memory of this process, and pages of files that it has mapped, which the kernel may drop."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    values = dict(line.split(":") for line in lines)
    return {name: int(values[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def make_dataset(prefix: Path, num_shards: int, num_documents: int, mean_tokens: int) -> None:
    """Shards of documents with exponential lengths; the token files are holes."""
    names = [f"{prefix}_{number:05d}_000" for number in range(num_shards)]
    for number, name in enumerate(names):
        generator = np.random.default_rng(number)
        lengths = 1 + generator.exponential(mean_tokens - 1, num_documents).astype("<i4")
        _write_index(Path(f"{name}.idx"), lengths)
        num_tokens = int(lengths.sum(dtype=np.int64))
        with open(f"{name}.bin", "wb") as stream:
            stream.truncate(2 * num_tokens)
        Manifest(
            vocab_size=_VOCAB_SIZE,
            tokens=num_tokens,
            documents=num_documents,
            dtype="uint16",
            tokenizer_sha256=None,
            eod_id=None,
            mask_id=None,
            max_token_id=0,
            bin_sha256=f"made of holes, number {number} of {num_shards}",
            idx_sha256="",
        ).write(name)
    write_dataset(prefix, names)


def _write_index(path: Path, lengths: np.ndarray) -> None:
    count = len(lengths)
    pointers = np.zeros(count, dtype="<i8")
    np.cumsum(2 * lengths[:-1].astype("<i8"), out=pointers[1:])
    with path.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, _UINT16, count, count + 1))
        for part in (lengths, pointers, np.arange(count + 1, dtype="<i8")):
            part.tofile(stream)


def _measure_cold(folder: Path, num_bytes: int = 1 << 30, num_windows: int = 300) -> Row:
    """KB from the disk and time for a window of a real file that is not in the page cache."""
    prefix = folder / "cold"
    lengths = np.full(num_bytes // 2 // 4096, 4096, dtype="<i4")
    _write_index(Path(f"{prefix}.idx"), lengths)
    with open(f"{prefix}.bin", "wb") as stream:
        for _ in range(num_bytes >> 24):
            stream.write(os.urandom(1 << 24))
        os.fsync(stream.fileno())
    results: Row = {}
    print(_line("cold reads", "KB/window", "us/window"))
    for name in ("read-ahead", "random"):
        shard = Shard(prefix)
        if name == "random":
            shard.expect_random_reads()
        with open(f"{prefix}.bin", "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        starts = np.random.default_rng(0).integers(
            0, shard.num_tokens - _SEQ_LENGTH - 1, num_windows
        )
        before, started = _disk_bytes(), time.perf_counter()
        for start in starts.tolist():
            shard.tokens(start, _SEQ_LENGTH + 1).astype(np.int64)
        seconds = (time.perf_counter() - started) / num_windows
        kilobytes = (_disk_bytes() - before) / num_windows / 1024
        results[name] = {"kilobytes": kilobytes, "seconds": seconds}
        print(_line(name, f"{kilobytes:.1f}", f"{seconds * 1e6:.0f}"))
    print("random: what the loader asks the kernel for; read-ahead: the kernel's default\n")
    return results


def _disk_bytes() -> int:
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _data_wait() -> float:
    from data_wait import measure_data_wait

    share = measure_data_wait()
    print(f"a real CPU training run waits for data in {share:.2%} of its step time (aim: < 2 %)")
    return share


def _estimate_h100(windows_per_second: float) -> Row:
    """What the 1B model of Super Data Learners needs on one H100 at 40 % of its peak."""
    from megatron_dlm.config.hardware import GPUS
    from megatron_dlm.config.parse import parse
    from megatron_dlm.config.schema import RunConfig
    from megatron_dlm.models.accounting import training_flops_per_token

    config = parse(RunConfig, ["--config", "preset:sdl_1b"], prog="loader")
    flops = training_flops_per_token(config.model, config.objective).total
    tokens_per_second = 0.4 * GPUS["H100"].peak_flops / flops
    needed = tokens_per_second / config.model.seq_length
    print(
        f"an H100 at 40 % MFU trains the 1B model on {tokens_per_second:,.0f} tokens/s, "
        f"{needed:.1f} windows/s of {config.model.seq_length}: one loader thread of each rank is "
        f"busy {needed / windows_per_second:.1%} of the time, ahead of the steps (estimate)"
    )
    return {"tokens_per_second": tokens_per_second, "windows_per_second": needed}


def _row_line(row: Row, first: Row) -> str:
    cells = [
        _with_ratio(row, first, "open_seconds", ".3f"),
        _with_ratio(row, first, "windows_per_second", ",.0f"),
        _with_ratio(row, first, "own_bytes", ".0f", unit=1e6),
        f"{row['mapped_bytes'] / 1e6:.0f}",
    ]
    return _line(row["data"], f"{row['shards']:,}", str(row["epochs"]), *cells)


def _with_ratio(row: Row, first: Row, name: str, form: str, unit: float = 1.0) -> str:
    return f"{format(row[name] / unit, form)} ({row[name] / first[name]:.2f})"


def _line(*cells: str) -> str:
    widths: Sequence[int] = (15, 10, 10, 16, 16, 14, 10)
    return " ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()


if __name__ == "__main__":
    main()
