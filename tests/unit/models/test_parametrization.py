"""The tables of docs/parametrization.md, with the numbers written out."""

from __future__ import annotations

import math

import pytest

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.models.parametrization import (
    ParameterKind,
    UpdateSettings,
    initial_std,
    initial_values,
    kind_of,
    update_settings,
)

NAMES = {
    "module.decoder.layers.0.self_attention.linear_qkv.weight": ParameterKind.BULK,
    "decoder.layers.self_attention.linear_proj.weight": ParameterKind.BULK,
    "decoder.layers.mlp.linear_fc1.weight": ParameterKind.BULK,
    "module.decoder.layers.3.mlp.linear_fc2.weight": ParameterKind.BULK,
    "module.decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight": ParameterKind.BULK,
    "module.decoder.layers.3.mlp.experts.linear_fc2.weight7": ParameterKind.BULK,
    "decoder.layers.3.mlp.experts.experts.linear_fc2.weight": ParameterKind.BULK,
    "decoder.layers.3.mlp.shared_experts.linear_fc1.weight": ParameterKind.BULK,
    "decoder.layers.3.mlp.router.weight": ParameterKind.ROUTER,
    "decoder.layers.3.mlp.shared_experts.gate_weight": ParameterKind.ROUTER,
    "decoder.layers.3.mlp.router.expert_bias": ParameterKind.BIAS,
    "decoder.layers.3.pre_mlp_layernorm.weight": ParameterKind.NORM,
    "embedding.word_embeddings.weight": ParameterKind.EMBEDDING,
    "module.embedding.word_embeddings.weight": ParameterKind.EMBEDDING,
    "output_layer.weight": ParameterKind.OUTPUT_LAYER,
    "module.output_layer.weight": ParameterKind.OUTPUT_LAYER,
    "decoder.layers.input_layernorm.weight": ParameterKind.NORM,
    "decoder.layers.self_attention.q_layernorm.weight": ParameterKind.NORM,
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": ParameterKind.NORM,
    "module.decoder.final_layernorm.weight": ParameterKind.NORM,
    "decoder.layers.mlp.linear_fc1.bias": ParameterKind.BIAS,
    "decoder.layers.mlp.linear_fc2.bias": ParameterKind.BIAS,
    "module.decoder.layers.1.self_attention.core_attention.sink_key": ParameterKind.BIAS,
    "decoder.layers.self_attention.core_attention.sink_value": ParameterKind.BIAS,
}


@pytest.mark.parametrize("name", NAMES)
def test_kind(name: str) -> None:
    assert kind_of(name) is NAMES[name]


@pytest.mark.parametrize(
    "name", ["decoder.layers.mlp.latent.weight", "weight", "embedding.position_embeddings.weight"]
)
def test_unknown_parameters_are_refused(name: str) -> None:
    with pytest.raises(AssertionError, match="say in ParameterKind how it learns"):
        kind_of(name)


# d = 256, L = 8: eta / d, weight decay * d, 1e-8 / (d L) = 4.8828125e-12.
COMPLETEP = {
    ParameterKind.BULK: UpdateSettings(0.00390625, 256.0, 4.8828125e-12),
    ParameterKind.ROUTER: UpdateSettings(0.02, 0.0, 4.8828125e-12),
    ParameterKind.EMBEDDING: UpdateSettings(0.02, 0.0, 4.8828125e-12),
    ParameterKind.OUTPUT_LAYER: UpdateSettings(0.02, 0.0, 4.8828125e-12),
    ParameterKind.NORM: UpdateSettings(0.02, 0.0, 4.8828125e-12),
    ParameterKind.BIAS: UpdateSettings(0.02, 0.0, 4.8828125e-12),
}
STANDARD = {
    ParameterKind.BULK: UpdateSettings(1.0, 1.0, 1e-8),
    ParameterKind.ROUTER: UpdateSettings(1.0, 1.0, 1e-8),
    ParameterKind.EMBEDDING: UpdateSettings(1.0, 1.0, 1e-8),
    ParameterKind.OUTPUT_LAYER: UpdateSettings(1.0, 1.0, 1e-8),
    ParameterKind.NORM: UpdateSettings(1.0, 0.0, 1e-8),
    ParameterKind.BIAS: UpdateSettings(1.0, 0.0, 1e-8),
}


@pytest.mark.parametrize("kind", ParameterKind)
@pytest.mark.parametrize(("name", "table"), [("standard", STANDARD), ("completep", COMPLETEP)])
def test_updates(name: str, table: dict[ParameterKind, UpdateSettings], kind) -> None:
    optimizer = OptimizerConfig(parametrization=name)
    settings = update_settings(kind, optimizer, hidden_size=256, num_layers=8)
    assert settings == table[kind]


def test_initial_std() -> None:
    model = ModelConfig(
        num_layers=8, hidden_size=256, untie_embeddings_and_output_weights=True, output_init_std=0.0
    )
    completep = OptimizerConfig(parametrization="completep")
    table = [
        # name, standard, completep: 0.4 / sqrt(256)
        ("decoder.layers.self_attention.linear_qkv.weight", 0.02, 0.025),
        ("decoder.layers.mlp.linear_fc1.weight", 0.02, 0.025),
        ("decoder.layers.self_attention.linear_proj.weight", 0.02 / 4, 0.025),  # / sqrt(2 * 8)
        ("decoder.layers.mlp.linear_fc2.weight", 0.02 / 4, 0.025),
        ("decoder.layers.3.mlp.experts.experts.linear_fc2.weight", 0.02 / 4, 0.025),
        ("decoder.layers.3.mlp.router.weight", 0.02, 0.02),
        ("decoder.layers.3.mlp.router.expert_bias", 0.0, 0.0),
        ("embedding.word_embeddings.weight", 0.02, 0.02),
        ("output_layer.weight", 0.0, 0.0),
        ("decoder.final_layernorm.weight", 0.0, 0.0),
        ("decoder.layers.mlp.linear_fc1.bias", 0.0, 0.0),
    ]
    for name, standard, scaled in table:
        assert math.isclose(initial_std(name, model, OptimizerConfig()), standard), name
        assert math.isclose(initial_std(name, model, completep), scaled), name
    default = ModelConfig(untie_embeddings_and_output_weights=True)
    assert initial_std("output_layer.weight", default, completep) == 0.02


def test_a_part_of_a_parameter_is_the_part_of_the_whole() -> None:
    whole = initial_values("some.weight", (6, 5), std=0.5, seed=3)
    part = initial_values("some.weight", (2, 3), std=0.5, seed=3, start=(4, 1))
    assert part.equal(whole[4:6, 1:4])
    assert not part.equal(initial_values("another.weight", (2, 3), std=0.5, seed=3, start=(4, 1)))
