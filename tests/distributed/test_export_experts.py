"""Exports of models whose experts lay on several ranks, as transformers loads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from saved_model import (
    AUTOREGRESSIVE,
    masked,
    megatron_logits,
    save_in_ranks,
    some_tokens,
    tiny_model,
)

from megatron_dlm.checkpoint.find import find_checkpoint
from megatron_dlm.config.hf_commands import ExportConfig, ImportConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.export import export
from megatron_dlm.hf.importing import import_model
from megatron_dlm.hf.load import load_model
from megatron_dlm.hf.mapping import exported_tensors

AR: dict[str, Any] = {"kind": "autoregressive"}
OURS, STOCK = "MegatronDLMForCausalLM", "Qwen3MoeForCausalLM"
EP2 = ParallelConfig(expert_model_parallel_size=2)
EP2_PP2 = replace(EP2, pipeline_model_parallel_size=2)
TP2_EP2 = replace(EP2, tensor_model_parallel_size=2, sequence_parallel=True)
TP2_PP2 = replace(TP2_EP2, expert_model_parallel_size=1, pipeline_model_parallel_size=2)
SHARED: dict[str, Any] = {"shared_expert_ffn_hidden_size": 20, "shared_expert_gate": True}
SIGMOID: dict[str, Any] = {"score_function": "sigmoid", "expert_bias": True}
CHOICE: dict[str, Any] = {"routing": "expert_choice", "count_scales": [0.5, 1.0, 1.1, 0.9, 0.8]}
# name -> (layout, ranks, experts, objective, architecture written)
CASES: dict[str, tuple[ParallelConfig, int, dict[str, Any], dict[str, Any], str]] = {
    "stock": (EP2, 2, {}, AR, STOCK),
    "stock_dense_first": (TP2_PP2, 4, {"num_dense_layers": 1}, AR, STOCK),
    "sigmoid": (EP2_PP2, 4, {**SIGMOID, **SHARED}, {}, OURS),
    "choice": (TP2_EP2, 4, CHOICE, {}, OURS),
    "choice_shared": (TP2_PP2, 4, {**CHOICE, **SHARED, "num_dense_layers": 1}, {}, OURS),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_megatron_computes(
    ranks: RankPool, tmp_path: Path, case: str
) -> None:
    from transformers import AutoModelForCausalLM

    layout, num_ranks, changes, learned, architecture = CASES[case]
    moe = MoEConfig(**{"num_experts": 4, "ffn_hidden_size": 28, **changes})
    model = tiny_model(moe=moe)
    objective = AUTOREGRESSIVE if learned is AR else masked(model)
    run, output, back = (tmp_path / name for name in ("run", "exported", "back"))
    ranks.run(save_in_ranks, run, model, objective, layout, num_ranks=num_ranks)
    tokens = some_tokens(model)
    (expected,) = ranks.run(megatron_logits, run, tokens, num_ranks=1)
    assert np.abs(expected).max() > 1

    export(ExportConfig(str(run), str(output), parity_tolerance=1e-5))
    loaded = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=architecture == OURS)
    assert type(loaded).__name__ == architecture
    rows = torch.from_numpy(tokens)
    with torch.no_grad():
        theirs = loaded.eval()(rows).logits.numpy()
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-5)
    import_model(ImportConfig(str(output), str(back), tokenizer="none"))
    for source in (run, output, back):
        ours = load_model(source).model(rows).logits.numpy()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    # What training saves and what import writes have the same names and shapes, row for row.
    (again,) = ranks.run(megatron_logits, back, tokens, num_ranks=1)
    np.testing.assert_array_equal(again, expected)
    readers = [CheckpointReader(find_checkpoint(path).path) for path in (run, back)]
    for tensor in exported_tensors(model):
        assert torch.equal(*(reader.read(tensor) for reader in readers)), tensor.name
