"""Bad input under a launcher and on bare ranks: one line, every rank ends, nobody hangs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import arguments, latest, metrics, published, start, start_ranks
from tiny_corpus import TinyCorpus

from megatron_dlm.data.storage.shard_writer import ShardWriter


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--data.train={nowhere: 1.0}", "shard file nowhere.idx does not exist"),
        ("--parallel.tensor_model_parallel_size=4", "the world size is 2"),
    ],
)
def test_torchrun_tells_once(flag: str, part: str, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """Found by every rank, before and after torch is imported."""
    command = [*arguments(tiny_corpus, tmp_path / "run"), flag]
    ended = start(command, tmp_path / "log", num_ranks=2).end()
    assert ended.code != 0
    (line,) = ended.error_lines()
    assert line.startswith("megatron-dlm train: error: ")
    assert part in line


def test_every_rank_ends_by_itself(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """No launcher: rank 0 alone cannot write, and rank 1 learns of it."""
    command = arguments(tiny_corpus, Path("/dev/null/run"))
    first, second = [job.end() for job in start_ranks(command, tmp_path / "log")]
    assert (first.code, second.code) == (2, 2)
    (line,) = first.error_lines()
    assert line.startswith("megatron-dlm train: error: ")
    assert "train.output_dir /dev/null/run" in line
    assert second.errors == ""


def test_bad_shard_found_by_one_rank_in_the_middle(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """Only the rank that reads the bad window knows; the job ends and keeps its checkpoints."""
    run = tmp_path / "run"
    command = arguments(
        tiny_corpus,
        run,
        train__steps=100,
        data__train={str(shard_with_one_bad_id(tmp_path)): 1.0},
        data__valid={},
        data__tokenizer=None,
        model__vocab_size=320,
        objective__mask_token_id=4,
    )
    ends = [job.end() for job in start_ranks(command, tmp_path / "log")]
    assert all(ended.code != 0 for ended in ends)
    lines = [line for ended in ends for line in ended.error_lines()]
    assert len(lines) == 2, "the rank itself, and the other one, which names it"
    assert all(
        "foreign holds token id 399, outside the vocabulary of 320" in line for line in lines
    )
    assert published(run)[-1] == latest(run) == max(metrics(run)) // 4 * 4


def shard_with_one_bad_id(directory: Path) -> Path:
    """Ids below 320 but for one 399; no manifest, as Megatron-LM's own shards."""
    tokens = np.random.default_rng(5).integers(5, 320, 6000)
    tokens[3000] = 399
    prefix = directory / "foreign"
    with ShardWriter(prefix, vocab_size=400) as writer:
        for part in np.split(tokens, 60):
            writer.add_document(part)
        writer.publish()
    Path(f"{prefix}.manifest.json").unlink()
    return prefix
