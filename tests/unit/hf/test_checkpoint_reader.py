"""Reading checkpoints without ranks: what is broken or hostile is refused in one line."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forged_manifest import forge
from small_run import write_run

from megatron_dlm.checkpoint import retention
from megatron_dlm.checkpoint.find import find_checkpoint, model_of
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.load import load_model

FC1 = "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "iter_0000000"


def test_rows_are_stretches_of_the_whole(run: Path) -> None:
    reader = CheckpointReader(checkpoint_of(run))
    whole = reader.rows(FC1, 1, 0, 48)
    assert whole.shape == (48, 16)
    assert torch.equal(reader.rows(FC1, 1, 10, 20), whole[10:30])
    assert not torch.equal(reader.rows(FC1, 0, 0, 48), whole)
    with pytest.raises(ValueError, match=r"linear_fc1.weight has shape \[2, 48, 16\], fewer rows"):
        reader.rows(FC1, 1, 40, 9)
    with pytest.raises(ValueError, match=r"fewer rows asked"):
        reader.rows(FC1, 2, 0, 1)
    with pytest.raises(ValueError, match=r"holds no tensor decoder.nothing"):
        reader.rows("decoder.nothing", None, 0, 1)


def test_finding_checkpoints(run: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint_of(run), run / "checkpoints" / "iter_0000007")
    for path in (run, run / "checkpoints"):
        assert find_checkpoint(path).step == 7
    assert find_checkpoint(run, step=0).step == 0
    assert find_checkpoint(checkpoint_of(run)).step == 0
    with pytest.raises(ValueError, match=r"holds no whole checkpoint of step 3 \(has \[0, 7\]\)"):
        find_checkpoint(run, step=3)
    with pytest.raises(ValueError, match=r"is no directory"):
        find_checkpoint(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no whole checkpoint; train first"):
        find_checkpoint(tmp_path / "empty")


def test_a_file_that_is_missing_or_short(run: Path) -> None:
    path = checkpoint_of(run) / "__0_0.distcp"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(
        ValueError, match=rf"__0_0.distcp has {len(whole) - 10} bytes, {len(whole)}"
    ):
        load_model(run)
    path.unlink()
    with pytest.raises(ValueError, match=r"holds no whole checkpoint; .*__0_0.distcp has None"):
        load_model(run)


def test_a_file_with_other_bytes(run: Path) -> None:
    path = checkpoint_of(run) / "__0_0.distcp"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"iter_0000000 is damaged: __0_0.distcp does not have"):
        load_model(run)
    forge(checkpoint_of(run))
    with pytest.raises(ValueError, match=r"__0_0.distcp: embedding.word_embeddings.weight cannot"):
        load_model(run)


class _Hostile:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_hostile_metadata_is_not_run(run: Path, tmp_path: Path) -> None:
    path = checkpoint_of(run) / ".metadata"
    path.write_bytes(pickle.dumps(_Hostile(tmp_path / "owned")))
    with pytest.raises(ValueError, match=r"metadata cannot be read .*refused"):
        CheckpointReader(checkpoint_of(run))
    assert not (tmp_path / "owned").exists()


def test_hostile_tensor_is_not_run(run: Path, tmp_path: Path) -> None:
    path = checkpoint_of(run) / "__0_0.distcp"
    size = path.stat().st_size
    with path.open("wb") as stream:
        torch.save(_Hostile(tmp_path / "owned"), stream)
        stream.write(b"\0" * (size - stream.tell()))
    forge(checkpoint_of(run))
    with pytest.raises(ValueError, match=r"__0_0.distcp: .* cannot be read"):
        load_model(run)
    assert not (tmp_path / "owned").exists()


def test_shapes_that_the_configuration_does_not_imply(run: Path) -> None:
    manifest = json.loads((checkpoint_of(run) / retention.MANIFEST_NAME).read_text())
    config = manifest["config"]
    config["model"]["ffn_hidden_size"] = 32
    forge(checkpoint_of(run), config=config)
    with pytest.raises(ValueError, match=r"fc1.weight has shape \[2, 48, 16\], .* \[2, 64, 16\]"):
        load_model(run)


def test_a_newer_format(run: Path) -> None:
    manifest = json.loads((checkpoint_of(run) / retention.MANIFEST_NAME).read_text())
    config = manifest["config"]
    config["model"]["num_hyperconnections"] = 4
    forge(checkpoint_of(run), config=config)
    with pytest.raises(ValueError, match=r"newer megatron-dlm: ModelConfig has no num_hyper.*"):
        model_of(find_checkpoint(run))


def test_an_older_manifest_means_the_defaults(run: Path) -> None:
    manifest = json.loads((checkpoint_of(run) / retention.MANIFEST_NAME).read_text())
    config = manifest["config"]
    del config["model"]["kv_channels"], config["model"]["rope_scaling_factor"]
    forge(checkpoint_of(run), config=config)
    assert model_of(find_checkpoint(run))[0].kv_channels is None


def test_other_backends(run: Path) -> None:
    path = checkpoint_of(run) / "metadata.json"
    path.write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(ValueError, match=r"sharded_backend is zarr; only torch_dist"):
        CheckpointReader(checkpoint_of(run))
    path.unlink()
    with pytest.raises(ValueError, match=r"is no distributed checkpoint"):
        CheckpointReader(checkpoint_of(run))
