"""A dense checkpoint with experts in place of its MLPs: the same logits, and training goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from opened import opened_model
from rank_pool import RankPool
from resume_run import checkpoint_tensors, write_shards
from saved_model import TP2_PP2, masked, megatron_logits, save_in_ranks, some_tokens, tiny_model
from test_resume import train

from megatron_dlm.checkpoint.find import find_checkpoint, model_of
from megatron_dlm.checkpoint.upcycling import upcycle
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.parse import parse
from megatron_dlm.config.upcycle_command import UpcycleConfig, UpcycledModel

# What the experts are (of a dense MLP 48 wide), and what the dense model is.
EXACT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole experts": ({"num_experts": 4}, {}),
    "halves": ({"num_experts": 8, "ffn_hidden_size": 24, "router_topk": 4}, {}),
    "room for all": ({"num_experts": 4, "capacity_factor": 2.0}, {}),
    "thirds, sigmoid": (
        {
            "num_experts": 6,
            "ffn_hidden_size": 16,
            "router_topk": 3,
            "score_function": "sigmoid",
            "expert_bias": True,
        },
        {"untie_embeddings_and_output_weights": True},
    ),
    "all experts, pre-softmax": ({"num_experts": 3, "router_topk": 3, "pre_softmax": True}, {}),
    "all experts, expert choice": (
        {"num_experts": 4, "ffn_hidden_size": 24, "router_topk": 4, "routing": "expert_choice"},
        {},
    ),
    "dense first, shared and gated": (
        {
            "num_experts": 4,
            "num_dense_layers": 1,
            "shared_expert_ffn_hidden_size": 64,
            "shared_expert_gate": True,
        },
        {},
    ),
    "gelu": ({"num_experts": 4, "ffn_hidden_size": 24}, {"activation": "gelu"}),
}
# Settings, and what is said about them.
INEXACT: dict[str, tuple[dict[str, Any], str]] = {
    "pre-softmax": ({"pre_softmax": True}, "add up to less than 1"),
    "one sigmoid": ({"score_function": "sigmoid", "router_topk": 1}, "gate of .*topk 1 is not 1"),
    "expert choice": ({"routing": "expert_choice"}, "chosen by no expert"),
    "capacity": ({"capacity_factor": 1.5}, "drop tokens"),
    "some slices": ({"ffn_hidden_size": 12}, "not a multiple of the 4 slices"),
}


def make(run: Path, output: Path, moe: dict[str, Any], **options: Any) -> Path:
    model = UpcycledModel(MoEConfig(**moe))
    upcycle(UpcycleConfig(str(run), str(output), model, **options))
    return output


def both_logits(ranks: RankPool, dense: Path, moe: Path) -> list[np.ndarray]:
    tokens = some_tokens(model_of(find_checkpoint(dense))[0])
    return [ranks.run(megatron_logits, path, tokens, num_ranks=1)[0] for path in (dense, moe)]


@pytest.mark.parametrize("case", EXACT)
def test_logits_are_those_of_the_dense_parent(case: str, ranks: RankPool, tmp_path: Path) -> None:
    moe, changes = EXACT[case]
    model = tiny_model(**changes)
    layout, num_ranks = (TP2_PP2, 4) if case == "whole experts" else (ParallelConfig(), 1)
    dense_run = tmp_path / "dense"
    ranks.run(save_in_ranks, dense_run, model, masked(model), layout, num_ranks=num_ranks)
    make(dense_run, tmp_path / "moe", moe)
    dense, upcycled = both_logits(ranks, dense_run, tmp_path / "moe")
    assert np.abs(dense).max() > 1
    np.testing.assert_allclose(upcycled, dense, rtol=0, atol=1e-5)
    checkpoint = find_checkpoint(tmp_path / "moe")
    assert checkpoint.manifest["upcycled_from"]["exact"]
    assert model_of(checkpoint)[0].moe == MoEConfig(**moe)


@pytest.fixture(scope="module")
def dense_run(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("dense") / "run"
    model = tiny_model()
    ranks.run(save_in_ranks, run, model, masked(model), ParallelConfig(), num_ranks=1)
    return run


@pytest.mark.parametrize("case", INEXACT)
def test_what_is_not_exact_is_refused(
    case: str, dense_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe, reason = INEXACT[case]
    with pytest.raises(ValueError, match=f"would not compute what .*iter_0000003.*{reason}"):
        make(dense_run, tmp_path / "moe", {"num_experts": 8, **moe})
    assert not (tmp_path / "moe").exists()
    make(dense_run, tmp_path / "moe", {"num_experts": 8, **moe}, allow_inexact=True)
    assert re.search(f"warning: .* near its parent only: .*{reason}", capsys.readouterr().out)
    assert not find_checkpoint(tmp_path / "moe").manifest["upcycled_from"]["exact"]


@pytest.mark.parametrize("case", ["pre-softmax", "one sigmoid"])
def test_gates_that_are_not_1_are_made_good_on_average(
    case: str, ranks: RankPool, dense_run: Path, tmp_path: Path
) -> None:
    """With a router that hardly tells experts apart the parent's logits come back."""
    moe = {"num_experts": 8, **INEXACT[case][0]}
    make(dense_run, tmp_path / "moe", moe, allow_inexact=True, router_init_std=1e-7)
    dense, upcycled = both_logits(ranks, dense_run, tmp_path / "moe")
    np.testing.assert_allclose(upcycled, dense, rtol=0, atol=1e-4)


def test_routers_are_those_of_a_new_model(ranks: RankPool, dense_run: Path, tmp_path: Path) -> None:
    """Drawn as models/parametrization.py draws them; the experts of a group share their row."""
    whole = make(dense_run, tmp_path / "whole", {"num_experts": 4}, seed=7)
    halves = {"num_experts": 8, "ffn_hidden_size": 24}
    sliced = make(dense_run, tmp_path / "sliced", halves, seed=7)
    other = make(dense_run, tmp_path / "other", {"num_experts": 4}, seed=8)
    name = "decoder.layers.1.mlp.router.weight"
    routers = [
        ranks.run(checkpoint_tensors, str(find_checkpoint(run).path), num_ranks=1)[0][name]
        for run in (whole, sliced, other)
    ]
    assert routers[0].std() == pytest.approx(0.02, rel=0.2)
    np.testing.assert_array_equal(routers[1], routers[0].repeat(2, axis=0))
    assert np.abs(routers[2] - routers[0]).max() > 0.01
    built = ranks.run(router_of_a_new_model, model_of(find_checkpoint(whole))[0], name, num_ranks=1)
    np.testing.assert_array_equal(routers[0], built[0])


def router_of_a_new_model(model: Any, name: str) -> np.ndarray:
    with opened_model(ParallelConfig(), model, masked(model), seed=7) as opened:
        weights = dict(opened.chunk.named_parameters())
        return weights[name].detach().numpy()


def test_training_goes_on_at_any_number_of_expert_ranks(ranks: RankPool, tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    # The dense run is far from its start when its child begins: the child's loss says so.
    train(ranks, shards, tmp_path / "dense", ["--optimizer.lr=0.01"])
    moe = {"num_experts": 4, "ffn_hidden_size": 64}
    flags = [f"--model.moe.{name}={value}" for name, value in moe.items()]
    for name in ("one", "two"):
        make(tmp_path / "dense", tmp_path / name, moe)
    settings = yaml.safe_load((tmp_path / "one" / "upcycled.yaml").read_text())
    assert settings["model"]["moe"] == moe
    assert settings["model"]["hidden_size"] == 32
    one = train(ranks, shards, tmp_path / "one", flags)
    expert_ranks = [*flags, "--parallel.expert_model_parallel_size=2"]
    two = train(ranks, shards, tmp_path / "two", expert_ranks, num_ranks=2)
    fresh = train(ranks, shards, tmp_path / "fresh", flags)
    for place, entry in one.items():
        assert two[place]["nelbo"] == pytest.approx(entry["nelbo"], rel=1e-5)
    assert one[3, "train"]["nelbo"] < fresh[3, "train"]["nelbo"] - 0.1


def test_what_cannot_be_is_refused_in_one_line(
    ranks: RankPool, dense_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "moe"
    with pytest.raises(ValueError, match=r"ffn_hidden_size is 32; it must divide .*MLP, 48"):
        make(dense_run, output, {"num_experts": 4, "ffn_hidden_size": 32})
    with pytest.raises(ValueError, match=r"num_experts is 9; it must be a multiple of 2"):
        make(dense_run, output, {"num_experts": 9, "ffn_hidden_size": 24})
    biased, model = tmp_path / "biased", tiny_model(mlp_bias=True)
    ranks.run(save_in_ranks, biased, model, masked(model), ParallelConfig(), num_ranks=1)
    with pytest.raises(ValueError, match="experts have no biases"):
        make(biased, output, {"num_experts": 4})
    with pytest.raises(ValueError, match="num_experts is 0"):
        make(dense_run, output, {})
    with pytest.raises(ValueError, match=r"num_dense_layers 2 leaves none of the 2 layers"):
        make(dense_run, output, {"num_experts": 4, "num_dense_layers": 2})
    assert not output.exists()
    make(dense_run, output, {"num_experts": 4})
    with pytest.raises(ValueError, match="holds a run"):
        make(dense_run, output, {"num_experts": 4})
    with pytest.raises(ValueError, match="has 4 experts already; upcycle a dense one"):
        make(output, tmp_path / "again", {"num_experts": 8})


def test_keys_of_the_command_are_those_of_a_run() -> None:
    flags = ["--checkpoint", "dense", "--output_dir", "moe", "--model.moe.num_experts", "8"]
    config = parse(UpcycleConfig, [*flags, "--model.moe.router_topk", "4"], prog="x")
    assert config.model.moe == MoEConfig(num_experts=8, router_topk=4)
    with pytest.raises(ValueError, match="num_experts is 0"):
        parse(UpcycleConfig, flags[:4], prog="x")
