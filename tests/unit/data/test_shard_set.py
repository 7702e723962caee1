"""Which shards belong to a run, which of its jobs are done, and what is listed when all are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_dlm.data.preprocessing.recipe import Recipe, read_recipe, recipe_path, write_recipe
from megatron_dlm.data.preprocessing.shard_set import (
    claim,
    completed_shards,
    finish,
    is_output,
    numbered_shards,
    remove_shards,
    shard_prefix,
    whole_parts,
)
from megatron_dlm.data.storage.dataset import open_dataset
from megatron_dlm.data.storage.manifest import HeldOut, Origin
from megatron_dlm.data.storage.shard_writer import ShardWriter

RECIPE = Recipe(
    tokenizer_sha256="f" * 64,
    vocab_size=400,
    normalization=None,
    eod_id=2,
    mask_id=4,
    text_field="text",
    minimum_characters=1,
    validation_fraction=0.0,
    shard_size_bytes=100,
    inputs_sha256="e" * 64,
    num_jobs=3,
)


def write(
    prefix: Path, job: int, part: int, *, recipe: Recipe = RECIPE, tokens: int = 3, **origin: object
) -> None:
    """One shard, and its twin of held-out documents where the recipe asks for it."""
    fraction = recipe.validation_fraction
    marked = Origin(recipe.inputs_sha256, recipe.sha256, job, recipe.num_jobs, part, is_last=False)
    marked = replace(marked, **origin)  # type: ignore[arg-type]
    for side in ("valid", "train") if fraction else ("train",):
        name = f"{prefix}_valid" if side == "valid" else str(prefix)
        with ShardWriter(shard_prefix(name, job, part), vocab_size=400) as writer:
            if tokens:
                writer.add_document(np.arange(tokens) + job % 100)
            held_out = HeldOut(fraction, side) if fraction else None  # type: ignore[arg-type]
            writer.publish(held_out=held_out, origin=marked)


def names(shards: list[str]) -> list[str]:
    return [Path(shard).name for shard in shards]


def test_jobs_are_done_when_their_last_part_is_whole(tmp_path: Path) -> None:
    prefix = tmp_path / "text"
    with pytest.raises(ValueError, match=r"there is no shard .*text_00000_000"):
        completed_shards(str(prefix))
    write(prefix, 0, 0)
    write(prefix, 0, 1, is_last=True)
    write(prefix, 1, 0)
    write(prefix, 1, 2, is_last=True)  # the part before it is not there
    shards, missing = completed_shards(str(prefix))
    assert (names(shards), missing) == (["text_00000_000", "text_00000_001"], [1, 2])
    assert finish(str(prefix)) == [1, 2]
    assert not (tmp_path / "text.dataset.json").exists()
    write(prefix, 1, 1)
    write(prefix, 2, 0, tokens=0, is_last=True)
    shards, missing = completed_shards(str(prefix))
    assert len(shards) == 6
    assert finish(str(prefix)) == missing == []
    dataset = open_dataset(prefix)
    assert names([entry.prefix for entry in dataset.entries]) == names(shards)[:5], "no empty one"
    assert dataset.num_documents == 5
    Path(f"{shards[3]}.bin").write_bytes(b"1")
    assert completed_shards(str(prefix))[1] == [1]
    assert len(whole_parts(str(prefix), 1, RECIPE.sha256)) == 1


def test_many_jobs_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    recipe = replace(RECIPE, num_jobs=100_001)
    for job in (99_999, 100_000, 2):
        write(tmp_path / "text", job, 0, recipe=recipe, is_last=True)
    assert numbered_shards(f"{tmp_path}/text") == [(2, 0), (99_999, 0), (100_000, 0)]
    shards, missing = completed_shards(f"{tmp_path}/text")
    assert names(shards) == ["text_00002_000", "text_99999_000", "text_100000_000"]
    assert len(missing) == 99_998


def test_shards_of_two_runs(tmp_path: Path) -> None:
    write(tmp_path / "text", 0, 0, is_last=True)
    other = replace(RECIPE, minimum_characters=2)
    write(tmp_path / "text", 1, 0, recipe=other, is_last=True)
    with pytest.raises(ValueError, match=r"text_00001_000 is of another run than .*00000_000"):
        completed_shards(f"{tmp_path}/text")
    with pytest.raises(ValueError, match=r"recipe\.json is not there"):
        claim(f"{tmp_path}/text", replace(RECIPE, num_jobs=4))


def test_names_that_only_look_alike(tmp_path: Path) -> None:
    for name in ("text", "text_more", "text_00000", "a+b"):
        write(tmp_path / name, 0, 0, recipe=replace(RECIPE, num_jobs=1), is_last=True)
    for name in ("text", "text_more", "text_00000", "a+b"):
        assert numbered_shards(f"{tmp_path}/{name}") == [(0, 0)]
    others = {
        path.name for path in tmp_path.iterdir() if not path.name.startswith("text_00000_000.")
    }
    remove_shards(f"{tmp_path}/text")
    assert {path.name for path in tmp_path.iterdir()} == others


def test_both_sides_of_a_split(tmp_path: Path) -> None:
    prefix = f"{tmp_path}/text"
    recipe = replace(RECIPE, validation_fraction=0.5, num_jobs=2)
    claim(prefix, recipe)
    for job in (0, 1):
        write(tmp_path / "text", job, 0, recipe=recipe, is_last=True)
    assert finish(prefix) == []
    for name, side in (("text", "train"), ("text_valid", "valid")):
        facts = open_dataset(tmp_path / name).facts
        assert facts.held_out == HeldOut(0.5, side)  # type: ignore[arg-type]
    Path(f"{prefix}_valid_00001_000.idx").unlink()
    assert completed_shards(prefix)[1] == [1], "one side alone is not whole"
    remove_shards(prefix)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_side_is_refused(tmp_path: Path) -> None:
    recipe = replace(RECIPE, num_jobs=1)
    write(tmp_path / "text", 0, 0, recipe=recipe, tokens=0, is_last=True)
    with pytest.raises(ValueError, match=r"no document fell to .*text; give more text"):
        finish(f"{tmp_path}/text")


def test_recipes(tmp_path: Path) -> None:
    prefix = f"{tmp_path}/deep/text"
    assert read_recipe(prefix) is None
    write_recipe(prefix, RECIPE)
    write_recipe(prefix, RECIPE)
    known = read_recipe(prefix)
    assert known is not None
    assert RECIPE.first_difference(known) is None
    changes: dict[str, object] = {
        "vocab_size": 401,
        "eod_id": None,
        "text_field": "body",
        "mask_id": 5,
    }
    for name, value in changes.items():
        other = replace(RECIPE, **{name: value})  # type: ignore[arg-type]
        assert other.sha256 != RECIPE.sha256
        assert str(other.first_difference(known)).startswith(f"its {name} is ")
    recipe_path(prefix).write_text("{")
    with pytest.raises(ValueError, match=r"text\.recipe\.json is damaged"):
        read_recipe(prefix)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["text.recipe.json"]


def test_what_a_run_writes(tmp_path: Path) -> None:
    prefix = f"{tmp_path}/text"
    for name in ("text.recipe.json", "text_valid.dataset.json", "text_00000_000.manifest.json"):
        assert is_output(tmp_path / name, prefix)
        assert not is_output(tmp_path / "deep" / name, prefix)
    for name in ("text.json", "text.jsonl", "text_1.json", "other.recipe.json"):
        assert not is_output(tmp_path / name, prefix)
