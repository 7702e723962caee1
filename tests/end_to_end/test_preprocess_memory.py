"""Memory does not grow with the size of a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from mixed_corpus import MixedCorpus, make_mixed_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> MixedCorpus:
    return make_mixed_corpus(tmp_path_factory.mktemp("corpus"))


def plain(lines: bytes, repeats: int, directory: Path) -> Path:
    path = directory / f"{repeats}.jsonl"
    with path.open("wb") as stream:
        for _ in range(repeats):
            stream.write(lines)
    return path


def packed(lines: bytes, repeats: int, directory: Path) -> Path:
    path = directory / f"{repeats}.jsonl.zst"
    with path.open("wb") as raw, zstandard.ZstdCompressor(1).stream_writer(raw) as stream:
        for _ in range(repeats):
            stream.write(lines)
    return path


def peak_bytes(path: Path, tokenizer: str) -> int:
    """Largest resident memory of a preprocess command."""
    output = path.parent / f"out_{path.name}" / "text"
    arguments = [f"--input={path}", f"--tokenizer={tokenizer}", f"--output_prefix={output}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_dlm", "preprocess", *arguments, "--workers=1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


@pytest.mark.parametrize("write", [plain, packed])
@pytest.mark.parametrize(
    "sizes_megabytes", [(12, 60), pytest.param((100, 800), marks=pytest.mark.slow)]
)
def test_one_large_file(
    write: Callable[[bytes, int, Path], Path],
    sizes_megabytes: tuple[int, int],
    corpus: MixedCorpus,
    tmp_path: Path,
) -> None:
    lines = Path(corpus.files[0]).read_bytes()
    small, large = (write(lines, size * 10**6 // len(lines), tmp_path) for size in sizes_megabytes)
    growth = peak_bytes(large, corpus.tokenizer) - peak_bytes(small, corpus.tokenizer)
    assert growth < 25e6
