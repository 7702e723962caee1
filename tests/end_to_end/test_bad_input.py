"""What a user can get wrong: one line naming the thing and the remedy, status 2, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import arguments, metrics, published, run_here
from tiny_corpus import VOCAB_SIZE, TinyCorpus

SHORT = {"train__steps": 4, "data__valid": {}, "model__num_layers": 1}


@pytest.fixture
def shard(tiny_corpus: TinyCorpus, tmp_path: Path) -> Path:
    """A copy of the training shard, to be damaged."""
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(f"{tiny_corpus.train}_00000_000{suffix}", tmp_path / f"copy{suffix}")
    return tmp_path / "copy"


def refusal(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """Run it; the one line it must end with on stderr."""
    assert run_here(command) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("megatron-dlm ")]
    assert len(lines) == 1, errors
    assert errors.splitlines()[-1] == lines[0]
    prefix = f"megatron-dlm {command[0]}: error: "
    assert lines[0].startswith(prefix)
    return lines[0][len(prefix) :]


def assert_names(message: str, *parts: Any) -> None:
    for part in parts:
        assert str(part) in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_shard(
    suffix: str,
    tiny_corpus: TinyCorpus,
    shard: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path(f"{shard}{suffix}").unlink()
    command = arguments(tiny_corpus, tmp_path / "run", data__train={str(shard): 1.0}, **SHORT)
    message = refusal(capsys, command)
    assert_names(message, f"{shard}{suffix} does not exist", "megatron-dlm preprocess")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_truncated_shard(
    suffix: str,
    kept: float,
    tiny_corpus: TinyCorpus,
    shard: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path(f"{shard}{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    command = arguments(tiny_corpus, tmp_path / "run", data__train={str(shard): 1.0}, **SHORT)
    message = refusal(capsys, command)
    assert_names(message, path, "truncated", path.stat().st_size, "megatron-dlm preprocess")
    assert not (tmp_path / "run").exists()


def test_truncated_validation_shard(
    tiny_corpus: TinyCorpus, shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(f"{shard}.bin")
    path.write_bytes(path.read_bytes()[:-2])
    changes = {**SHORT, "data__valid": {str(shard): 1.0}}
    message = refusal(capsys, arguments(tiny_corpus, tmp_path / "run", **changes))
    assert_names(message, path, "truncated")


def test_shard_of_another_tokenizer(
    tiny_corpus: TinyCorpus, shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(f"{shard}.manifest.json")
    manifest = json.loads(path.read_text())
    ours = manifest["tokenizer_sha256"]
    path.write_text(json.dumps({**manifest, "tokenizer_sha256": "f" * 64}))
    command = arguments(tiny_corpus, tmp_path / "run", data__train={str(shard): 1.0}, **SHORT)
    assert_names(refusal(capsys, command), shard, "f" * 64, ours, "preprocess the text again")


def test_vocabulary_below_the_tokenizer(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(tiny_corpus, tmp_path / "run", model__vocab_size=320, **SHORT)
    assert_names(refusal(capsys, command), "model.vocab_size 320", VOCAB_SIZE)


def test_vocabulary_below_the_shard(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {**SHORT, "data__tokenizer": None, "objective__mask_token_id": 4}
    command = arguments(tiny_corpus, tmp_path / "run", model__vocab_size=320, **changes)
    message = refusal(capsys, command)
    assert_names(message, tiny_corpus.train, VOCAB_SIZE, 320, "model.vocab_size")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train__stepz": 3}, ["train.stepz", "train.steps"]),
        ({"train__steps": "many"}, ["train.steps", "many"]),
        ({"train__epochs": 1}, ["train.steps", "train.epochs"]),
        ({"train__steps": None}, ["train.steps", "train.tokens", "train.epochs"]),
        ({"parallel__tensor_model_parallel_size": 2}, ["world size is 1", "multiple of 2"]),
        ({"parallel__pipeline_model_parallel_size": 2}, ["world size is 1", "torchrun"]),
        ({"parallel__sequence_parallel": True}, ["parallel.sequence_parallel"]),
        ({"train__micro_batch_size": 3}, ["train.global_batch_size 8", "micro_batch_size 3"]),
        ({"objective__mask_token_id": 9}, ["objective.mask_token_id 9"]),
        ({"schedule__warmup_steps": 9}, ["schedule.warmup_steps 9", "4 steps"]),
        ({"data__train": {}}, ["data.train", "megatron-dlm preprocess"]),
        ({"model__seq_length": 30000}, ["sequence longer than the document set", "30001"]),
        ({"data__unique_tokens": 10**6}, ["data.unique_tokens", "1000000"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_setting_that_cannot_be(
    changes: dict[str, Any],
    parts: list[str],
    tiny_corpus: TinyCorpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = arguments(tiny_corpus, tmp_path / "run", **{**SHORT, **changes})
    assert_names(refusal(capsys, command), *parts)
    assert not (tmp_path / "run").exists()


def test_unknown_key_in_a_file_and_unknown_command(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("model: {hiden_size: 64}\n")
    command = ["train", "--config", str(tmp_path / "run.yaml")]
    assert_names(refusal(capsys, command), "model.hiden_size", "model.hidden_size", "run.yaml")
    assert_names(refusal(capsys, ["trian"]), "train")


def test_output_below_a_file(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    output_dir = tmp_path / "file" / "run"
    message = refusal(capsys, arguments(tiny_corpus, output_dir, **SHORT))
    assert_names(message, output_dir, "train.output_dir")
    assert (tmp_path / "file").read_text() == "kept"


def test_tokenizer_that_is_none(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {**SHORT, "data__tokenizer": str(tmp_path / "nowhere")}
    message = refusal(capsys, arguments(tiny_corpus, tmp_path / "run", **changes))
    assert_names(message, tmp_path / "nowhere", "megatron-dlm tokenizer")


def test_directory_of_another_run(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = tmp_path / "run"
    assert run_here(arguments(tiny_corpus, output_dir, **SHORT)) == 0
    before = contents(output_dir)
    other = {**SHORT, "optimizer__lr": 0.5}
    message = refusal(capsys, arguments(tiny_corpus, output_dir, **other))
    assert_names(message, output_dir, "optimizer.lr 0.003", "0.5", "train.resume never")
    assert_names(message, "train.output_dir")
    assert contents(output_dir) == before

    never = arguments(tiny_corpus, output_dir, **other, train__resume="never")
    assert run_here(never) == 0
    old = output_dir / "previous_1"
    for path, content in before.items():
        assert (old / path.relative_to(output_dir)).read_bytes() == content
    assert list(metrics(output_dir)) == [1, 2, 3, 4]
    assert metrics(output_dir)[1]["lr"] != metrics(old)[1]["lr"]


def contents(directory: Path) -> dict[Path, bytes]:
    """All files but the lock, which stays with the directory and not with a run."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.name != "run.lock"}


def test_checkpoint_of_another_model_shape(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint copied into the directory of a wider model: both values are named."""
    small, large = tmp_path / "small", tmp_path / "large"
    assert run_here(arguments(tiny_corpus, small, **SHORT)) == 0
    large.mkdir()
    shutil.copytree(small / "checkpoints", large / "checkpoints")
    command = arguments(tiny_corpus, large, **SHORT, model__hidden_size=64)
    message = refusal(capsys, command)
    assert_names(message, large / "checkpoints", "model.hidden_size 32", "64", "train.output_dir")
    assert published(large) == published(small)


def test_metrics_file_that_is_none(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("notes of mine\n")
    message = refusal(capsys, arguments(tiny_corpus, tmp_path / "run", **SHORT))
    assert_names(message, tmp_path / "run" / "metrics.jsonl", "line 1")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "notes of mine\n"
