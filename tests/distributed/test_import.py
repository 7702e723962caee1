"""Runs that start from an imported model, on any layout; what the reader reads is what is there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from resume_run import MASK_ID, VOCAB_SIZE, checkpoint_tensors, train_in_ranks, write_shards
from saved_model import (
    TP2_PP2,
    masked,
    megatron_logits,
    save_in_ranks,
    some_tokens,
    tiny_model,
)
from stock_models import write_stock

from megatron_dlm.checkpoint.find import find_checkpoint, model_of
from megatron_dlm.config.hf_commands import ExportConfig, ImportConfig
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.export import export
from megatron_dlm.hf.importing import import_model
from megatron_dlm.hf.load import load_model

BASE: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16},
    "train": {"steps": 3, "global_batch_size": 8, "micro_batch_size": 2},
    "checkpoint": {"interval_steps": 2, "keep_last": 0},
    "validation": {"interval_steps": 3, "num_samples": 6},
    "logging": {"interval_steps": 1, "tensorboard": False},
}


def test_the_reader_reads_every_tensor_as_megatron_does(ranks: RankPool, tmp_path: Path) -> None:
    """Those of the optimizer too, from a checkpoint that four ranks wrote."""
    model = tiny_model(num_layers=4, untie_embeddings_and_output_weights=True)
    ranks.run(save_in_ranks, tmp_path, model, masked(model), TP2_PP2, num_ranks=4)
    checkpoint = find_checkpoint(tmp_path)
    (expected,) = ranks.run(checkpoint_tensors, str(checkpoint.path), num_ranks=1)
    reader = CheckpointReader(checkpoint.path)
    assert set(reader.tensors) == set(expected)
    assert any(name.startswith("optimizer") for name in expected)
    for name, values in expected.items():
        is_stacked = "decoder.layers" in name
        layers = range(len(values)) if is_stacked else [None]
        num_rows = values.shape[1] if is_stacked else values.shape[0]
        rows = [reader.rows(name, layer, 0, num_rows).float().numpy() for layer in layers]
        np.testing.assert_array_equal(np.stack(rows) if is_stacked else rows[0], values)


OPTIONS: dict[str, Any] = {
    "mlp_bias": True,
    "qk_layernorm_scope": "full",
    "attn_logit_softcapping": 5.0,
    "attention_sink": True,
    "layernorm_zero_centered_gamma": True,
    "residual_multiplier": 0.4,
    "output_multiplier": 0.5,
}


@pytest.mark.parametrize(
    ("precision", "options", "learned"),
    [
        ("fp32", {}, {}),
        ("bf16", {}, {}),
        ("fp32", OPTIONS, {"kind": "hybrid", "noise_type": "high_uniform", "prompt_share": 0.3}),
        ("bf16", OPTIONS, {"kind": "block", "block_size": 6}),
    ],
)
def test_import_of_an_export_is_bit_equal(
    ranks: RankPool,
    tmp_path: Path,
    precision: str,
    options: dict[str, Any],
    learned: dict[str, Any],
) -> None:
    model = tiny_model(untie_embeddings_and_output_weights=True, kv_channels=12, **options)
    objective = replace(masked(model), **learned)
    run, output, back = (tmp_path / name for name in ("run", "exported", "back"))
    ranks.run(save_in_ranks, run, model, objective, TP2_PP2, precision, num_ranks=4)
    export(ExportConfig(str(run), str(output)))
    import_model(
        ImportConfig(str(output), str(back), tokenizer="none", make_vocab_size_divisible_by=32)
    )
    assert model_of(find_checkpoint(back)) == (replace(model, transformer_impl="auto"), objective)
    paths = [str(find_checkpoint(path).path) for path in (run, back)]
    first, second = (ranks.run(checkpoint_tensors, path, num_ranks=1)[0] for path in paths)
    assert set(second) == {name for name in first if not name.startswith("optimizer")}
    for name, values in second.items():
        is_padded = name.startswith(("embedding", "output_layer"))
        rows = model.vocab_size if is_padded else None
        np.testing.assert_array_equal(values[:rows], first[name][:rows], err_msg=name)
    tokens = some_tokens(model)
    logits = [ranks.run(megatron_logits, path, tokens, num_ranks=1)[0] for path in (run, back)]
    np.testing.assert_array_equal(*logits)
    export(ExportConfig(str(back), str(tmp_path / "again")))
    written = [path / "model.safetensors" for path in (output, tmp_path / "again")]
    assert written[0].read_bytes() == written[1].read_bytes()


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoregressive Qwen3 of transformers' own class."""
    directory = tmp_path_factory.mktemp("stock") / "qwen3"
    write_stock(
        "qwen3",
        directory,
        vocab_size=VOCAB_SIZE - 1,  # the mask's row is added
        hidden_size=32,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    return directory


def import_for_diffusion(stock: Path, run: Path, objective: Any = "masked") -> Path:
    options: dict[str, Any] = {"tokenizer": "none", "make_vocab_size_divisible_by": 32}
    import_model(ImportConfig(str(stock), str(run), objective=objective, **options))
    return run


@pytest.mark.parametrize(
    ("precision", "objective", "learned"),
    [
        pytest.param("fp32", "masked", [], id="masked"),
        pytest.param("bf16", "masked", [], id="masked_bf16"),
        pytest.param("fp32", "masked", ["attention_annealing_steps=2"], id="annealed"),
        pytest.param("fp32", "hybrid", ["prompt_share=0.5"], id="hybrid"),
        pytest.param("fp32", "block", [], id="block"),
    ],
)
def test_training_goes_on_from_an_import_on_any_layout(
    ranks: RankPool,
    tmp_path: Path,
    stock: Path,
    precision: str,
    objective: str,
    learned: list[str],
) -> None:
    """AR -> diffusion on one rank and on TP2 x PP2: the first loss is that of the imported weights,
    and both runs go the same way; after a stop they go on from their own checkpoints."""
    shards = write_shards(tmp_path)
    curves = {}
    flags = [f"--train.precision={precision}", "--optimizer.lr=1e-4"]
    flags += [f"--objective.{option}" for option in learned]
    split = ["--parallel.tensor_model_parallel_size=2", "--parallel.pipeline_model_parallel_size=2"]
    for name, num_ranks, layout in (("one", 1, []), ("four", 4, split)):
        run = import_for_diffusion(stock, tmp_path / name, objective)
        assert load_model(run).mask_token_id == MASK_ID
        settings = ["--config", str(run / "imported.yaml")]
        ranks.run(
            train_in_ranks, BASE, shards, run, [*settings, *flags, *layout], num_ranks=num_ranks
        )
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [line["loss"] for line in lines if line["split"] == "train"]
        assert f"continuing from {run}/checkpoints/iter_0000000" in (run / "train.log").read_text()
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert len(curves["one"]) == 3
    np.testing.assert_allclose(curves["four"], curves["one"], rtol=tolerance)
    # Arbitrary weights of this size are far from the loss of a fresh model.
    assert abs(curves["one"][0] - np.log(VOCAB_SIZE)) > 0.3
    ranks.run(
        train_in_ranks,
        BASE,
        shards,
        tmp_path / "one",
        ["--config", str(tmp_path / "one" / "imported.yaml"), *flags, "--train.steps=4"],
        num_ranks=1,
    )
    assert "iter_0000003" in (tmp_path / "one" / "train.log").read_text()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.num_layers=4", r"was made with model.num_layers 2, this run has 4"),
        ("--model.rotary_base=10000", r"was made with model.rotary_base 500, this run has 10000"),
    ],
)
def test_a_run_of_another_model_is_refused(
    ranks: RankPool, tmp_path: Path, stock: Path, flag: str, message: str
) -> None:
    shards = write_shards(tmp_path)
    run = import_for_diffusion(stock, tmp_path / "run")
    flags = ["--config", str(run / "imported.yaml"), flag]
    with pytest.raises(AssertionError, match=message):
        ranks.run(train_in_ranks, BASE, shards, run, flags, num_ranks=1)


def test_moments_start_at_zero_and_main_weights_are_the_imported_ones(
    ranks: RankPool, tmp_path: Path, stock: Path
) -> None:
    """With a learning rate of (almost) 0 the first checkpoint still holds the imported weights."""
    shards = write_shards(tmp_path)
    run = import_for_diffusion(stock, tmp_path / "run")
    before = load_model(run).model.state_dict()
    flags = ["--config", str(run / "imported.yaml"), "--train.precision=bf16"]
    flags += ["--optimizer.lr=1e-30", "--train.steps=1"]
    ranks.run(train_in_ranks, BASE, shards, run, flags, num_ranks=1)
    after = load_model(run, step=1).model.state_dict()
    for name, weight in before.items():
        assert torch.equal(after[name], weight.to(torch.bfloat16)), name
