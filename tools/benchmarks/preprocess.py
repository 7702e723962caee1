"""`megatron-dlm preprocess` against Megatron-LM's way: tokens per second, with identical bytes.

Both are whole commands with the same number of worker processes on the same .jsonl file, run in
turn: text of the standard library, of installed packages and of the system's documents. The
baseline is plain_preprocess.py: one encode per document per worker. `loop` leaves the start-up of
both away (most of Megatron's is importing torch); `cpu` compares processor time and so hardly
depends on what else the machine does. Afterwards our shards are joined and compared byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import environment, print_environment, spread, write_json

from megatron_dlm.data.commands.merge import join_shards
from megatron_dlm.data.preprocessing.shard_set import completed_shards

_VOCAB_SIZE = 8192
_DOCUMENT_CHARACTERS = 3000
_TRAINING_DOCUMENTS = 4000
_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".c", ".hpp", ".html", ".json"}
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Run:
    """What one command took."""

    tokens: int
    seconds: float
    """Of the whole command."""
    loop_seconds: float
    cpu_seconds: float
    """Of all its processes."""


def main() -> None:
    arguments = _arguments()
    facts = {name: value for name, value in environment().items() if name != "allocator"}
    print_environment(facts)
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        corpus = _write_corpus(directory / "corpus.jsonl", arguments.megabytes * 10**6)
        share = corpus["different_bytes"] / corpus["bytes"]
        print(
            f"corpus: {corpus['bytes'] / 1e6:.0f} MB in {corpus['documents']:,} documents, "
            + ("no text twice" if share == 1 else f"the first {share:.0%} of it repeated")
        )
        print(f"baseline: {_first_paragraph('plain_preprocess.py')}")
        for kind in arguments.tokenizer:
            model = _TRAINERS[kind](directory / "corpus.jsonl", directory)
            results.append(_compare(kind, model, directory, arguments))
            _print(results[-1])
    write_json(arguments.json, {"environment": facts, "corpus": corpus, "runs": results})


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--rounds", type=int, default=3, help="runs of each (default: %(default)s)"
    )
    options.add_argument("--megabytes", type=int, default=200, help="size of the corpus")
    options.add_argument("--workers", type=int, default=2, help="processes of each")
    options.add_argument("--directory", type=Path, help="where to work (default: the system's)")
    options.add_argument("--tokenizer", nargs="+", choices=_TRAINERS, default=list(_TRAINERS))
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    return options.parse_args()


def _write_corpus(path: Path, num_bytes: int) -> dict[str, int]:
    """Documents of about 3,000 characters; the same ones again where there is too little text."""
    written = documents = different = 0
    texts = _documents()
    with path.open("wb") as lines:
        while written < num_bytes:
            text = next(texts, None)
            if text is None:  # the machine has no more
                different = different or written
                texts = _documents()
                continue
            written += lines.write(json.dumps({"text": text}).encode() + b"\n")
            documents += 1
    return {"bytes": written, "documents": documents, "different_bytes": different or written}


def _documents() -> Iterator[str]:
    roots = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib")]
    for root in [*roots, "/usr/share/doc", "/usr/share", "/usr/lib", "/usr/include"]:
        for path in sorted(Path(root).rglob("*")):
            text = _text_of(path)
            pieces = range(0, len(text), _DOCUMENT_CHARACTERS)
            documents = (text[start : start + _DOCUMENT_CHARACTERS] for start in pieces)
            yield from (document for document in documents if document.strip())


def _text_of(path: Path) -> str:
    """Nothing for what is no text."""
    try:
        if path.suffix in _SUFFIXES and path.is_file() and path.stat().st_size < _MAX_FILE_BYTES:
            return path.read_text("utf-8")
    except (UnicodeDecodeError, OSError):
        pass
    return ""


def _training_texts(corpus: Path) -> list[str]:
    """Documents from all over the corpus."""
    lines = corpus.read_bytes().splitlines()
    step = max(1, len(lines) // _TRAINING_DOCUMENTS)
    return [json.loads(line)["text"] for line in lines[::step]]


def _train_sentencepiece(corpus: Path, directory: Path) -> Path:
    import sentencepiece

    prefix = directory / "sentencepiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for t in _training_texts(corpus) for line in t.splitlines()),
        model_prefix=str(prefix),
        vocab_size=_VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def _train_hugging_face(corpus: Path, directory: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(corpus), trainer)
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return path


_TRAINERS = {"sentencepiece": _train_sentencepiece, "huggingface": _train_hugging_face}


def _compare(
    kind: str, model: Path, directory: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run both in turn, each round beginning with the other one."""
    output = directory / kind
    plain = [sys.executable, str(Path(__file__).with_name("plain_preprocess.py"))]
    plain += [str(directory / "corpus.jsonl"), str(output / "plain"), kind, str(model)]
    plain.append(str(arguments.workers))
    part_bytes = -(-(directory / "corpus.jsonl").stat().st_size // (2 * arguments.workers))
    ours = [sys.executable, "-m", "megatron_dlm", "preprocess", "--overwrite=true"]
    ours += [f"--input={directory / 'corpus.jsonl'}", f"--output_prefix={output / 'ours'}"]
    ours += [f"--tokenizer={model}", f"--workers={arguments.workers}"]
    ours += [f"--shard_size_bytes={part_bytes}"]
    runs: dict[str, list[Run]] = {"plain": [], "ours": []}
    output.mkdir()
    encoder = ""
    for number in range(arguments.rounds):
        for name in ("plain", "ours")[:: 1 - 2 * (number % 2)]:
            seconds, cpu_seconds, said = _time(plain if name == "plain" else ours)
            if name == "plain":
                facts = json.loads(said.splitlines()[-1])
            else:
                facts = _said_by_us(said)
                encoder = facts.pop("encoder")
            runs[name].append(Run(**facts, seconds=seconds, cpu_seconds=cpu_seconds))
    join_shards(completed_shards(str(output / "ours"))[0], output / "joined")
    is_identical = all(
        filecmp.cmp(output / f"joined{suffix}", output / f"plain{suffix}", shallow=False)
        for suffix in (".bin", ".idx")
    )
    return {
        "tokenizer": kind,
        "encoder": encoder,
        "workers": arguments.workers,
        "identical_bytes": is_identical,
        "tokens": runs["ours"][0].tokens,
        "ratio": {
            clock: [
                getattr(theirs, clock) / getattr(mine, clock)
                for mine, theirs in zip(runs["ours"], runs["plain"], strict=True)
            ]
            for clock in ("seconds", "loop_seconds", "cpu_seconds")
        },
        "runs": {name: [asdict(run) for run in some] for name, some in runs.items()},
    }


def _time(command: list[str]) -> tuple[float, float, str]:
    """Wall seconds, processor seconds of all processes, and what the command said."""
    before = os.times()
    started = time.perf_counter()
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=quiet)
    seconds, after = time.perf_counter() - started, os.times()
    cpu_seconds = after.children_user + after.children_system
    cpu_seconds -= before.children_user + before.children_system
    return seconds, cpu_seconds, done.stdout


def _said_by_us(text: str) -> dict[str, Any]:
    """Tokens, seconds of the work and encoder from the summary of `preprocess`."""
    tokens = re.search(r"^\s*tokens\s+([\d,]+)", text, re.MULTILINE)
    seconds = re.search(r"^work: ([\d.,]+) seconds", text, re.MULTILINE)
    encoder = re.search(r"^encoder: (.*)$", text, re.MULTILINE)
    assert tokens, text
    assert seconds, text
    assert encoder, text
    return {
        "tokens": int(tokens[1].replace(",", "")),
        "loop_seconds": float(seconds[1].replace(",", "")),
        "encoder": encoder[1],
    }


def _print(result: dict[str, Any]) -> None:
    print(f"\n{result['tokenizer']} BPE {_VOCAB_SIZE}, {result['workers']} workers")
    for name, runs in result["runs"].items():
        rate = statistics.median(result["tokens"] / run["seconds"] for run in runs)
        used = result["encoder"] if name == "ours" else "one encode per document"
        print(f"  {name:<6} {rate / 1e6:6.2f} M tokens/s ({used})")
    ratios = result["ratio"]
    print(f"  times faster, whole command: {spread(ratios['seconds'])}")
    print(f"  times faster, loop:          {spread(ratios['loop_seconds'])}")
    print(f"  times less processor time:   {spread(ratios['cpu_seconds'])}")
    print(f"  identical bytes: {'yes' if result['identical_bytes'] else 'NO'}", flush=True)


def _first_paragraph(name: str) -> str:
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return " ".join(text.split('"""')[1].split("\n\n")[1].split())


if __name__ == "__main__":
    main()
