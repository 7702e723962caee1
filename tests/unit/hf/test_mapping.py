"""The name table: every row once, in both directions, against a reference written out by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.hf.mapping import checkpoint_tensors, exported_tensors
from megatron_dlm.models.accounting import count_parameters


@st.composite
def mixtures(draw: st.DrawFn) -> MoEConfig:
    if draw(st.booleans()):
        return MoEConfig()
    num_experts, shared = draw(st.integers(2, 5)), draw(st.sampled_from([0, 4]))
    is_sigmoid = draw(st.booleans())
    return MoEConfig(
        num_experts=num_experts,
        ffn_hidden_size=draw(st.sampled_from([None, 3])),
        num_dense_layers=draw(st.integers(0, 1)),
        score_function="sigmoid" if is_sigmoid else "softmax",
        expert_bias=is_sigmoid and draw(st.booleans()),
        shared_expert_ffn_hidden_size=shared,
        shared_expert_gate=shared > 0 and draw(st.booleans()),
    )


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    moe = draw(mixtures())
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, size = groups * per_group, 2 * draw(st.integers(1, 3))
    is_plain, has_norm = draw(st.booleans()), draw(st.booleans())
    return ModelConfig(
        num_layers=draw(st.integers(1 + moe.num_dense_layers, 3)),
        moe=moe,
        hidden_size=heads * size if is_plain else 10,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=None if is_plain else size,
        ffn_hidden_size=draw(st.integers(1, 9)),
        activation=draw(st.sampled_from(["swiglu", "gelu", "squared_relu"])),
        mlp_bias=not moe.is_moe and draw(st.booleans()),
        qk_layernorm=has_norm,
        qk_layernorm_scope=draw(st.sampled_from(["head", "full"])) if has_norm else "head",
        attention_sink=draw(st.booleans()),
        vocab_size=draw(st.integers(2, 40)),
        make_vocab_size_divisible_by=draw(st.sampled_from([1, 8, 32])),
        untie_embeddings_and_output_weights=draw(st.booleans()),
        megatron=draw(st.sampled_from([{}, {"add_qkv_bias": True}])),
    )


@settings(deadline=None)
@given(models())
def test_every_row_is_there_once_on_both_sides(model: ModelConfig) -> None:
    stored = {(tensor.key, tensor.layer): tensor for tensor in checkpoint_tensors(model)}
    used: Counter[tuple[str, int | None, int]] = Counter()
    for tensor in exported_tensors(model):
        for source in tensor.sources:
            used.update(
                (source.key, source.layer, source.start + row) for row in range(source.num_rows)
            )
    assert set(used.values()) == {1}
    assert model.vocab_size is not None
    padding = model.padded_vocab_size - model.vocab_size
    tables = 2 if model.untie_embeddings_and_output_weights else 1
    total = sum(tensor.num_rows for tensor in stored.values())
    assert len(used) == total - tables * padding
    assert len({tensor.name for tensor in exported_tensors(model)}) == len(exported_tensors(model))


@settings(deadline=None)
@given(models())
def test_sizes_add_up(model: ModelConfig) -> None:
    """The count of parameters is made elsewhere, from the configuration alone."""
    stored = [tensor for tensor in checkpoint_tensors(model) if not tensor.is_fp32]  # no parameter
    num_stored = sum(int(np.prod(tensor.shape)) for tensor in stored)
    assert num_stored == count_parameters(model).total


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_queries_keys_and_values_lie_as_megatron_interleaves_them(heads: int, groups: int) -> None:
    size = 4
    model = ModelConfig(
        num_layers=1, hidden_size=12, num_attention_heads=heads, num_query_groups=groups,
        kv_channels=size, vocab_size=8,
    )  # fmt: skip
    # Megatron's own view: [groups, heads per group + 2, size].
    fused = np.arange((heads + 2 * groups) * size).reshape(groups, heads // groups + 2, size)
    expected = {
        "q_proj": fused[:, :-2].reshape(-1),
        "k_proj": fused[:, -2].reshape(-1),
        "v_proj": fused[:, -1].reshape(-1),
    }
    for tensor in exported_tensors(model):
        which = tensor.name.split(".")[-2]
        if which in expected:
            rows = [
                np.arange(source.start, source.start + source.num_rows) for source in tensor.sources
            ]
            np.testing.assert_array_equal(np.concatenate(rows), expected[which])


def test_names_are_those_of_the_exchange_format() -> None:
    model = ModelConfig(num_layers=1, vocab_size=8, untie_embeddings_and_output_weights=True)
    names = [tensor.name for tensor in exported_tensors(model)]
    layer = [
        *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        *("self_attn.q_norm", "self_attn.k_norm", "self_attn.o_proj"),
        *("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ]
    expected = ["model.embed_tokens", *(f"model.layers.0.{name}" for name in layer)]
    expected += ["model.norm", "lm_head"]
    assert names == [f"{name}.weight" for name in expected]


def test_shapes() -> None:
    changes: dict[str, Any] = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 6}
    model = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=20, vocab_size=9, **changes)
    shapes = {
        tensor.name.removeprefix("model."): tensor.shape for tensor in exported_tensors(model)
    }
    assert shapes["embed_tokens.weight"] == (9, 16)
    assert shapes["layers.0.self_attn.q_proj.weight"] == (24, 16)
    assert shapes["layers.0.self_attn.v_proj.weight"] == (12, 16)
    assert shapes["layers.0.self_attn.o_proj.weight"] == (16, 24)
    assert shapes["layers.0.self_attn.k_norm.weight"] == (6,)
    assert "layers.0.self_attn.sink_key" not in shapes
    assert shapes["layers.0.mlp.up_proj.weight"] == (20, 16)
    assert shapes["layers.0.mlp.down_proj.weight"] == (16, 20)


def test_shapes_of_options() -> None:
    options: dict[str, Any] = {
        "mlp_bias": True,
        "qk_layernorm_scope": "full",
        "attention_sink": True,
    }
    model = ModelConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, kv_channels=6,
        ffn_hidden_size=20, vocab_size=9, **options,
    )  # fmt: skip
    stored = {(tensor.key, tensor.layer): tensor.shape for tensor in checkpoint_tensors(model)}
    layer = "decoder.layers"
    assert stored[f"{layer}.self_attention.core_attention.sink_value", 1] == (2, 6)
    assert stored[f"{layer}.self_attention.q_layernorm.weight", 1] == (24,)
    assert stored[f"{layer}.self_attention.k_layernorm.weight", 1] == (12,)
    assert stored[f"{layer}.mlp.linear_fc1.bias", 0] == (40,)
    assert stored[f"{layer}.mlp.linear_fc2.bias", 0] == (16,)
    shapes = {tensor.name: tensor.shape for tensor in exported_tensors(model)}
    name = "model.layers.1"
    assert shapes[f"{name}.self_attn.sink_key"] == (2, 6)
    assert shapes[f"{name}.mlp.gate_proj.bias"] == shapes[f"{name}.mlp.up_proj.bias"] == (20,)
    assert shapes[f"{name}.mlp.down_proj.bias"] == (16,)


def test_names_of_experts() -> None:
    moe = MoEConfig(
        num_experts=2, num_dense_layers=1, score_function="sigmoid", expert_bias=True,
        ffn_hidden_size=6, shared_expert_ffn_hidden_size=5, shared_expert_gate=True,
    )  # fmt: skip
    model = ModelConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        ffn_hidden_size=20,
        vocab_size=9,
        moe=moe,
    )
    stored = {(tensor.key, tensor.layer): tensor.shape for tensor in checkpoint_tensors(model)}
    mlp = "decoder.layers.1.mlp"
    assert stored[f"{mlp}.experts.experts.linear_fc1.weight", 1] == (12, 8)
    assert stored[f"{mlp}.shared_experts.linear_fc2.weight", None] == (8, 5)
    assert stored["decoder.layers.0.mlp.linear_fc1.weight", None] == (40, 8)
    assert ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", None) in stored
    assert ("decoder.layers.1.pre_mlp_layernorm.weight", None) in stored
    shapes = {
        tensor.name.removeprefix("model.layers.1.mlp."): tensor.shape
        for tensor in exported_tensors(model)
        if ".1.mlp" in tensor.name
    }
    expert = {"gate_proj.weight": (6, 8), "up_proj.weight": (6, 8), "down_proj.weight": (8, 6)}
    assert shapes == {
        "gate.weight": (2, 8),
        "gate.expert_bias": (2,),
        **{f"experts.{n}.{name}": shape for n in range(2) for name, shape in expert.items()},
        "shared_expert.gate_proj.weight": (5, 8),
        "shared_expert.up_proj.weight": (5, 8),
        "shared_expert.down_proj.weight": (8, 5),
        "shared_expert_gate.weight": (1, 8),
    }
    assert [tensor.name for tensor in exported_tensors(model) if tensor.is_fp32] == [
        "model.layers.1.mlp.gate.expert_bias"
    ]
