"""What `fuzz_inputs.py` damages: inputs made by the package itself, and what reads them."""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from forked_command import run

_RUN = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "seq_length": 32,
        "hidden_dropout": 0.0,
    },
    "objective": {"kind": "masked", "weighting": "elbo", "time_sampling": "stratified"},
    "optimizer": {"lr": 1.0e-3, "weight_decay": 0.1, "clip_grad": 1.0},
    "schedule": {"kind": "cosine", "warmup_steps": 1},
    "train": {
        "steps": 4,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "precision": "fp32",
        "seed": 1,
        "device": "cpu",
    },
    "checkpoint": {"interval_steps": 2, "keep_last": 2},
    "validation": {"interval_steps": 2, "num_samples": 4},
    "logging": {"interval_steps": 1, "tensorboard": False},
}


@dataclass(frozen=True)
class Reader:
    """A command that reads an input; {here} in its arguments is the folder of the input."""

    arguments: tuple[str, ...]
    notices_all: bool = False
    """The input has checksums: success on changed bytes is damage silently accepted."""


@dataclass(frozen=True)
class Target:
    """A folder of files of one kind, and everything that reads them."""

    name: str
    folder: str
    patterns: tuple[str, ...]
    readers: tuple[Reader, ...]

    def files(self, root: Path) -> list[Path]:
        """What may be damaged."""
        found = {
            path
            for pattern in self.patterns
            for path in (root / self.folder).rglob(pattern)
            if path.is_file() and path.suffix != ".py"
        }
        return sorted(found)


_TRAIN = ("train", "--config", "{here}/run.yaml", "--train.output_dir", "{here}/run")
_PREPROCESS = ("preprocess", "--tokenizer", "{root}/tokenizer", "--workers", "1")
_BOTH = ("--input", "{here}/text", "{here}/text_valid")
_LENGTH = ("--num_tokens", "8", "--num_steps", "4", "--device", "cpu", "--prompt", "def")


def _preprocessed(name: str) -> tuple[str, ...]:
    return (*_PREPROCESS, "--input", f"{{here}}/{name}", "--output_prefix", "{here}/out/text")


TARGETS = (
    Target("configuration", "configuration", ("run.yaml",), (Reader(_TRAIN),)),
    Target("jsonl", "jsonl", ("*.jsonl",), (Reader(_preprocessed("text.jsonl")),)),
    Target("jsonl.gz", "gz", ("*.gz",), (Reader(_preprocessed("text.jsonl.gz")),)),
    Target("jsonl.zst", "zst", ("*.zst",), (Reader(_preprocessed("text.jsonl.zst"), True),)),
    Target("parquet", "parquet", ("*.parquet",), (Reader(_preprocessed("text.parquet")),)),
    Target(
        "tokenizer",
        "tokenizing",
        ("tokenizer/*",),
        (
            Reader(
                (
                    *("preprocess", "--tokenizer", "{here}/tokenizer", "--workers", "1"),
                    *("--input", "{here}/text.jsonl", "--output_prefix", "{here}/out/text"),
                )
            ),
        ),
    ),
    Target(
        "shards",
        "shards",
        ("*.bin", "*.idx", "*.dataset.json", "*.manifest.json"),
        (
            Reader(("data", "verify", *_BOTH, "--workers", "1"), True),
            Reader(("data", "inspect", "--input", "{here}/text")),
            Reader(_TRAIN),
        ),
    ),
    Target(
        "checkpoint",
        "checkpointed",
        ("checkpoints/iter_*/*", "checkpoints/iter_*/.*"),
        (
            Reader(("checkpoint", "verify", "--checkpoint", "{here}/run"), True),
            Reader(("export", "--checkpoint", "{here}/run", "--output_dir", "{here}/hf")),
            Reader((*_TRAIN, "--train.steps", "6")),
        ),
    ),
    Target(
        "run directory",
        "checkpointed",
        ("run/*.json*", "run/config.yaml", "run/checkpoints/*.txt"),
        (Reader((*_TRAIN, "--train.steps", "6")),),
    ),
    Target(
        "Hugging Face directory",
        "exported",
        ("hf/*",),
        (
            Reader(("generate", "--model", "{here}/hf", *_LENGTH)),
            Reader(("import", "--model", "{here}/hf", "--output_dir", "{here}/imported")),
        ),
    ),
)


def make_inputs(root: Path) -> None:
    """All pristine inputs, by the package's own commands."""
    texts = _paragraphs()
    _write_texts(root, texts)
    source = str(root / "jsonl/text.jsonl")
    _must(
        root,
        (
            "tokenizer",
            "--input",
            source,
            "--output_dir",
            f"{root}/tokenizer",
            "--vocab_size",
            "400",
        ),
    )
    _copy(root / "tokenizer", root / "tokenizing/tokenizer")
    _copy(root / "jsonl/text.jsonl", root / "tokenizing/text.jsonl")
    shards = ("--output_prefix", f"{root}/shards/text", "--validation_fraction", "0.2")
    _must(root, (*_PREPROCESS, "--input", source, *shards))
    for folder in ("configuration", "shards", "checkpointed"):
        _write_run(root, folder)
    _must(root, _TRAIN, here="checkpointed")
    (root / "exported").mkdir()
    run_directory = f"{root}/checkpointed/run"
    _must(root, ("export", "--checkpoint", run_directory, "--output_dir", f"{root}/exported/hf"))


def arguments_of(reader: Reader, *, root: Path, here: Path) -> list[str]:
    """The command line of a reader for the damaged folder `here`."""
    return [text.format(root=root, here=here) for text in reader.arguments]


def _must(root: Path, arguments: Sequence[str], *, here: str = "") -> None:
    log = root / "made.log"
    given = [text.format(root=root, here=root / here) for text in arguments]
    outcome = run(given, log, timeout_seconds=300)
    if outcome.status != 0:
        raise RuntimeError(f"`megatron-dlm {' '.join(given)}` failed: {outcome.errors[-2000:]}")


def _paragraphs() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [library / name for name in ("bisect.py", "heapq.py", "textwrap.py", "sched.py")]
    return [part for source in sources for part in source.read_text().split("\n\n") if part.strip()]


def _write_texts(root: Path, texts: Sequence[str]) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    for folder in ("jsonl", "gz", "zst", "parquet", "tokenizing", "shards"):
        (root / folder).mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (root / "jsonl/text.jsonl").write_bytes(lines)
    (root / "gz/text.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    compressed = zstandard.ZstdCompressor(write_checksum=True).compress(lines)
    (root / "zst/text.jsonl.zst").write_bytes(compressed)
    table = pyarrow.table({"text": list(texts)})
    pyarrow.parquet.write_table(table, root / "parquet/text.parquet", write_page_checksum=True)


def _write_run(root: Path, folder: str) -> None:
    (root / folder).mkdir(exist_ok=True)
    # The damaged shards lie beside their configuration, all else reads the sound ones.
    settings = {
        "data": {
            "tokenizer": str(root / "tokenizer"),
            "train": {str(root / "shards/text"): 1.0},
            "valid": {str(root / "shards/text_valid"): 1.0},
        },
        **_RUN,
    }
    if folder == "shards":
        settings["data"] = {"tokenizer": str(root / "tokenizer"), "train": {"text": 1.0}}
        settings["data"]["valid"] = {"text_valid": 1.0}
    (root / folder / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def _copy(source: Path, target: Path) -> None:
    import shutil

    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
