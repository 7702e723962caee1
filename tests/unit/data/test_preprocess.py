"""Shards hold what encoding each document gives, in order, with the held-out share apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dlm.config.commands import PreprocessConfig, TokenizerConfig
from megatron_dlm.data import preprocess as module
from megatron_dlm.data.preprocess import in_validation, preprocess
from megatron_dlm.data.shards import Shard
from megatron_dlm.data.tokenizer import load_tokenizer
from megatron_dlm.data.tokenizer_training import train_tokenizer

TEXTS = [f"document {n}:\n\tcontents {n * n} é\n" * (1 + n % 5) for n in range(200)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (directory / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    (directory / "more.txt").write_text("the last document", encoding="utf-8")
    train_tokenizer(
        TokenizerConfig(
            input=[str(directory / "text.jsonl")],
            output_dir=str(directory / "tokenizer"),
            vocab_size=310,
        )
    )
    return directory


def config(corpus: Path, output: Path, **fields: object) -> PreprocessConfig:
    values = {
        "input": [str(corpus / "text.jsonl"), str(corpus / "more.txt")],
        "output_prefix": str(output / "shard"),
        "tokenizer": str(corpus / "tokenizer"),
        **fields,
    }
    return PreprocessConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_documents", [1, 7, 4096])
def test_documents_in_order_with_end_of_document(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_documents: int
) -> None:
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", batch_documents)
    preprocess(config(corpus, tmp_path))
    tokenizer, shard = load_tokenizer(corpus / "tokenizer"), Shard(tmp_path / "shard")
    found = [shard.document(number).tolist() for number in range(shard.num_documents)]
    texts = [*TEXTS, "the last document"]
    assert found == [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]
    assert [tokenizer.decode(ids) for ids in found] == texts
    assert shard.manifest is not None
    assert shard.manifest.tokenizer_sha256 == tokenizer.sha256
    assert shard.manifest.mask_id == tokenizer.mask_id
    assert shard.manifest.max_token_id == max(map(max, found))
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_options(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(config(corpus, tmp_path, append_eod=False, minimum_characters=25))
    tokenizer, shard = load_tokenizer(corpus / "tokenizer"), Shard(tmp_path / "shard")
    kept = [text for text in TEXTS if len(text) >= 25]
    assert [tokenizer.decode(shard.document(n)) for n in range(shard.num_documents)] == kept
    assert shard.document(0).tolist() == tokenizer.encode(kept[0])
    output = capsys.readouterr().out
    assert f"{shard.num_tokens:,} tokens, {len(kept):,} documents" in output
    assert f"skipped {len(TEXTS) + 1 - len(kept):,} documents" in output


def test_the_held_out_share_is_a_function_of_the_document(corpus: Path, tmp_path: Path) -> None:
    preprocess(config(corpus, tmp_path, validation_fraction=0.2))
    tokenizer = load_tokenizer(corpus / "tokenizer")
    both = [Shard(tmp_path / name) for name in ("shard", "shard_valid")]
    train, valid = (
        [tokenizer.decode(shard.document(n)) for n in range(shard.num_documents)] for shard in both
    )
    assert valid == [text for text in [*TEXTS, "the last document"] if in_validation(text, 0.2)]
    assert len(train) + len(valid) == len(TEXTS) + 1
    assert 20 <= len(valid) <= 60
    # A larger share holds everything that a smaller one does.
    assert all(in_validation(text, 0.3) for text in valid)


def test_bad_input_writes_no_shard(corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: not valid JSON"):
        preprocess(config(corpus, tmp_path, input=[str(bad)]))
    with pytest.raises(ValueError, match="no document of at least 1000000 characters"):
        preprocess(config(corpus, tmp_path, minimum_characters=1_000_000))
    with pytest.raises(ValueError, match=r"no document fell to .*shard_valid"):
        preprocess(config(corpus, tmp_path, validation_fraction=1e-9))
    with pytest.raises(ValueError, match="cannot read"):
        preprocess(config(corpus, tmp_path, tokenizer=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_start_up_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, megatron_dlm.data.preprocess, megatron_dlm.data.tokenizer_training\n"
        "assert not {'torch', 'megatron'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
