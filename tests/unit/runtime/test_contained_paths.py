"""Files name other files: only those beside them are ever opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_shards import write_shard

from megatron_dlm.data.storage.dataset import open_dataset, write_dataset
from megatron_dlm.hf.safetensors_reader import INDEX_FILE, SafetensorsDirectory
from megatron_dlm.runtime.files import contained, is_plain_name

OUTSIDE = ["../secret", "/etc/passwd", "a/../../secret", "", "a/\0"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lies outside"):
        contained(tmp_path, name)
    assert not is_plain_name(name)


def test_links(tmp_path: Path) -> None:
    """A link inside may lead to a place inside; the directory may itself be reached by one."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "deep").mkdir(parents=True)
    outside.mkdir()
    (outside / "file").write_text("")
    (inside / "deep" / "file").write_text("")
    (inside / "near").symlink_to(inside / "deep" / "file")
    (inside / "far").symlink_to(outside / "file")
    (inside / "elsewhere").symlink_to(outside)
    (tmp_path / "alias").symlink_to(inside)
    for directory in (inside, tmp_path / "alias"):
        assert contained(directory, "deep/file") == directory / "deep" / "file"
        assert contained(directory, "near") == directory / "near"
        for name in ("far", "elsewhere/file"):
            with pytest.raises(ValueError, match=f"'{name}' lies outside"):
                contained(directory, name)


@pytest.mark.parametrize("name", ["file.bin", ".metadata", "__0_0.distcp", "a b"])
def test_plain_names(name: str) -> None:
    assert is_plain_name(name)


def test_a_list_of_shards_names_only_shards_below_it(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    shard = write_shard(outside / "shard", [[5, 6, 1]])
    with pytest.raises(ValueError, match=r"shard.bin is not below .*folder.*--copy true"):
        write_dataset(folder / "text", [shard])
    dataset = write_dataset(tmp_path / "text", [shard])  # a directory above it
    assert open_dataset(dataset.prefix).num_tokens == 3

    listed = json.loads((tmp_path / "text.dataset.json").read_text())
    for name in ("../outside/shard", str(outside / "shard"), "linked"):
        listed["shards"][0]["prefix"] = name
        (folder / "text.dataset.json").write_text(json.dumps(listed))
        if name == "linked":
            for suffix in (".bin", ".idx"):
                (folder / f"linked{suffix}").symlink_to(f"{shard}{suffix}")
        with pytest.raises(ValueError, match=r"is not a list of shards \(.* lies outside .*folder"):
            open_dataset(folder / "text")


def test_an_index_of_weights_names_only_files_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    for name in ("../weights.safetensors", str(tmp_path / "weights.safetensors")):
        index = {"weight_map": {"weight": name}}
        (folder / INDEX_FILE).write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"model/weights.safetensors is missing"):
            SafetensorsDirectory(folder)
