"""`tools/preprocess_data.py` takes Megatron-LM's flags and writes Megatron-LM's files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from mixed_corpus import MixedCorpus, make_mixed_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> MixedCorpus:
    return make_mixed_corpus(tmp_path_factory.mktemp("corpus"))


def run_tool(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        program, capture_output=True, text=True, check=False, cwd=directory, env=environment
    )


def two_keys(corpus: MixedCorpus, directory: Path) -> Path:
    """Lines with two texts each, as --json-keys asks for."""
    path = directory / "two.jsonl"
    records = [{"text": text, "summary": text[:20]} for text in corpus.texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sentencepiece_model(
    corpus: MixedCorpus, directory: Path
) -> tuple[list[str], Callable[[str], list[int]], int]:
    """Flags, the reference's encoder, and the end of document: a model of others, without NFC."""
    sentencepiece.SentencePieceTrainer.train(
        input=corpus.files[0],
        model_prefix=str(directory / "sp"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
    )
    model = str(directory / "sp.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    flags = ["--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", model]
    return flags, processor.encode, processor.eos_id()


def hugging_face_model(
    corpus: MixedCorpus, directory: Path
) -> tuple[list[str], Callable[[str], list[int]], int]:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.texts, trainer)
    (directory / "hf").mkdir()
    tokenizer.save(str(directory / "hf" / "tokenizer.json"))
    named = json.dumps({"eos_token": "<|endoftext|>"})
    (directory / "hf" / "tokenizer_config.json").write_text(named)
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(directory / "hf")]
    return flags, lambda text: tokenizer.encode(text).ids, tokenizer.token_to_id("<|endoftext|>")


@pytest.mark.parametrize("make", [sentencepiece_model, hugging_face_model])
@pytest.mark.parametrize("append_eod", [True, False])
def test_the_files_of_megatron_lm_and_nothing_else(
    make: Callable[[MixedCorpus, Path], tuple[list[str], Callable[[str], list[int]], int]],
    append_eod: bool,
    corpus: MixedCorpus,
    tmp_path: Path,
) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    flags, encode, eod = make(corpus, tmp_path)
    lines = two_keys(corpus, tmp_path)
    output = tmp_path / "out"
    output.mkdir()
    if append_eod:
        flags.append("--append-eod")
    done = run_tool(
        output,
        *("--input", str(lines), "--json-keys", "text", "summary", "--output-prefix", "my"),
        *("--workers", "2", "--log-interval", "1000", "--partitions", "1", *flags),
    )
    assert done.returncode == 0, done.stderr
    names = [f"my_{key}_document" for key in ("text", "summary")]
    suffixes = (".bin", ".idx", ".manifest.json")
    assert {path.name for path in output.iterdir()} == {n + s for n in names for s in suffixes}
    for name, texts in zip(names, (corpus.texts, [t[:20] for t in corpus.texts]), strict=True):
        theirs = tmp_path / name
        builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=DType.optimal_dtype(500))
        for text in texts:
            if ids := encode(text):  # SentencePiece strips blanks, and some texts are nothing else
                ids += [eod] * append_eod
                builder.add_document(ids, [len(ids)])
        builder.finalize(f"{theirs}.idx")
        for suffix in (".bin", ".idx"):
            assert (
                Path(f"{output / name}{suffix}").read_bytes()
                == Path(f"{theirs}{suffix}").read_bytes()
            )


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--split-sentences"], ["--split-sentences cannot be honoured", "sentences"]),
        (["--partitions", "4"], ["--partitions 4", "order of the documents"]),
        (["--vocab-file", "vocab.json"], ["--vocab-file cannot be honoured", "tokenizer.json"]),
        (["--tokenizer-type", "Llama2Tokenizer"], ["Llama2Tokenizer is not supported"]),
        (["--find-optimal-num-workers"], ["--find-optimal-num-workers", "--workers 0"]),
        (["--input", "none.jsonl"], ["input none.jsonl does not exist"]),
        (["--frobnicate"], ["unrecognized arguments: --frobnicate"]),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    flags: list[str], parts: list[str], corpus: MixedCorpus, tmp_path: Path
) -> None:
    done = run_tool(
        tmp_path,
        *("--input", corpus.files[0], "--output-prefix", "my", "--workers", "1"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", corpus.tokenizer),
        *flags,
    )
    assert done.returncode == 2
    for part in parts:
        assert part in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_goes_on_and_an_older_output_stays_meanwhile(
    corpus: MixedCorpus, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.jsonl"
    flags = ["--input", str(lines), "--output-prefix", "my", "--workers", "1"]
    flags += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", corpus.tokenizer]
    shutil.copy(corpus.files[0], lines)
    assert run_tool(tmp_path, *flags).returncode == 0
    before = (tmp_path / "my_text_document.bin").read_bytes()
    lines.write_bytes(lines.read_bytes() + b"{\n")
    broken = run_tool(tmp_path, *flags)
    assert broken.returncode == 2
    assert broken.stderr.startswith(f"preprocess_data.py: error: {lines}:")
    assert (tmp_path / "my_text_document.bin").read_bytes() == before
    assert (tmp_path / "my_text_document.parts").is_dir()
    shutil.copy(corpus.files[0], lines)
    assert run_tool(tmp_path, *flags).returncode == 0
    assert (tmp_path / "my_text_document.bin").read_bytes() == before
    assert not (tmp_path / "my_text_document.parts").exists()
