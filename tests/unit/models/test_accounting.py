"""Parameters, FLOPs and memory against published sizes, built models and counting by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from attention_reference import block_visible
from opened import opened_model
from rank_pool import RankPool
from tiny_run import token_batch

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.models.accounting import (
    count_parameters,
    forward_flops_per_token,
    mean_scored_share,
    training_flops_per_token,
    visible_keys_per_token,
)
from megatron_dlm.models.accounting_activations import activation_bytes_per_slot
from megatron_dlm.models.accounting_memory import (
    BatchLayout,
    memory_per_rank,
    stage_parameters,
)
from megatron_dlm.ops.counter_rng import Stream

TINY = ModelConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, seq_length=16,
    vocab_size=77, make_vocab_size_divisible_by=64,
)  # fmt: skip
AUTOREGRESSIVE = ObjectiveConfig(kind="autoregressive")
EVERY_OPTION: dict[str, Any] = {
    "mlp_bias": True,
    "attention_sink": True,
    "qk_layernorm_scope": "full",
    "megatron": {"add_qkv_bias": True},
    "attn_logit_softcapping": 30.0,
    "layernorm_zero_centered_gamma": True,
}


@pytest.mark.parametrize(
    ("preset", "total", "non_embedding"),
    [("sdl_1b", 1.086e9, 0.996e9), ("coder_1b7", 1.733e9, 1.527e9)],
)
def test_published_sizes(preset: str, total: float, non_embedding: float) -> None:
    config = parse(RunConfig, ["--config", f"preset:{preset}"], prog="x")
    count = count_parameters(config.model)
    assert count.total == pytest.approx(total, abs=0.5e6)
    assert count.non_embedding == pytest.approx(non_embedding, abs=0.5e6)


def local_parameters(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Runs inside a rank: numbers that this rank really holds."""
    with opened_model(parallel, model, seed=0) as opened:
        return sum(weight.numel() for chunk in opened.chunks for weight in chunk.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"untie_embeddings_and_output_weights": True},
        {"activation": "gelu", "qk_layernorm": False},
        {"num_query_groups": None, "ffn_hidden_size": 48, "activation": "squared_relu"},
        {"kv_channels": 12},
        {"mlp_bias": True},
        {"megatron": {"add_qkv_bias": True}},
        {"attention_sink": True, "qk_layernorm_scope": "full"},
        EVERY_OPTION,
    ],
    ids=lambda changes: ", ".join(changes) or "tied",
)
def test_count_equals_the_built_model(changes: dict[str, Any], ranks: RankPool) -> None:
    model = dataclasses.replace(TINY, **changes)
    (built,) = ranks.run(local_parameters, model, ParallelConfig(), num_ranks=1)
    assert count_parameters(model).total == built
    assert stage_parameters(model, ParallelConfig(), 0).total == built


@pytest.mark.parametrize(
    "changes",
    [{}, {"untie_embeddings_and_output_weights": True}, EVERY_OPTION],
    ids=["tied", "untied", "every option"],
)
def test_share_of_a_rank_equals_the_built_stages(changes: dict[str, Any], ranks: RankPool) -> None:
    model = dataclasses.replace(TINY, **changes)
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    built = ranks.run(local_parameters, model, parallel, num_ranks=4)
    first, last = (stage_parameters(model, parallel, stage).total for stage in (0, 1))
    assert built == [first, first, last, last]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_layer_flops_equal_the_matrix_products_of_a_layer(activation: Any) -> None:
    """Two FLOPs per multiply-add of every product that a plain layer makes, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    model = dataclasses.replace(TINY, activation=activation, num_layers=1)
    width, length, heads = model.hidden_size, model.seq_length, model.num_attention_heads
    key_width, inner = model.query_groups * model.head_size, model.ffn_size
    hidden = torch.randn(length, width)
    with FlopCounterMode(display=False) as counter:
        qkv = hidden @ torch.randn(width, width + 2 * key_width)
        query = qkv[:, :width].reshape(length, heads, -1).transpose(0, 1)
        scores = query @ torch.randn(heads, model.head_size, length)
        mixed = scores @ torch.randn(heads, length, model.head_size)
        hidden = mixed.transpose(0, 1).reshape(length, width) @ torch.randn(width, width)
        up = hidden @ torch.randn(width, 2 * inner if activation == "swiglu" else inner)
        hidden = up[:, :inner] @ torch.randn(inner, width)
        _ = hidden[: length // 2] @ torch.randn(width, model.padded_vocab_size)
    flops = forward_flops_per_token(model, ObjectiveConfig())
    assert flops.total * length == counter.get_total_flops()


def test_bidirectional_attention_is_twice_the_causal() -> None:
    model = dataclasses.replace(TINY, seq_length=4096)
    causal = forward_flops_per_token(model, AUTOREGRESSIVE).attention
    both_ways = forward_flops_per_token(model, ObjectiveConfig()).attention
    # Exactly the number of visible (query, key) pairs: S^2 against S (S + 1) / 2.
    assert both_ways / causal == pytest.approx(4096**2 / (4096 * 4097 / 2), rel=1e-12)


@pytest.mark.parametrize(("length", "block"), [(16, 4), (16, 5), (16, 1), (16, 16), (7, 3)])
def test_blocks_see_what_their_pattern_shows(length: int, block: int) -> None:
    objective = ObjectiveConfig(kind="block", block_size=block)
    pairs = int(block_visible(length, block).sum())
    model = dataclasses.replace(TINY, seq_length=length)
    assert visible_keys_per_token(model, objective) == pytest.approx(pairs / length, rel=1e-12)
    with_sink = dataclasses.replace(model, attention_sink=True)
    assert visible_keys_per_token(with_sink, objective) == pytest.approx(pairs / length + 2)
    flops = forward_flops_per_token(with_sink, objective)
    assert flops.attention == pytest.approx(4 * 4 * 32 * (pairs / length + 2))


def test_blocks_run_every_token_twice_and_score_it_once() -> None:
    block, masked = ObjectiveConfig(kind="block"), ObjectiveConfig()
    twice, once = (forward_flops_per_token(TINY, objective) for objective in (block, masked))
    assert twice.linear == 2 * once.linear
    assert twice.output_layer == once.output_layer
    memory, plain = (
        memory_per_rank(TINY, ParallelConfig(), objective, ALONE) for objective in (block, masked)
    )
    assert memory == dataclasses.replace(plain, activations=2 * plain.activations)


def test_a_mask_or_a_sink_hides_nothing_from_the_count() -> None:
    prompts = ObjectiveConfig(kind="hybrid", prompt_share=0.2)
    assert visible_keys_per_token(TINY, prompts) == 16
    with_sink = dataclasses.replace(TINY, attention_sink=True)
    assert visible_keys_per_token(with_sink, prompts) == 17
    assert visible_keys_per_token(with_sink, AUTOREGRESSIVE) == 8.5 + 1


def test_training_is_three_forward_passes_and_close_to_6n() -> None:
    config = parse(RunConfig, ["--config", "preset:sdl_1b"], prog="x")
    short = dataclasses.replace(config.model, seq_length=1)
    training = training_flops_per_token(short, AUTOREGRESSIVE)
    forward = forward_flops_per_token(short, AUTOREGRESSIVE)
    assert training.total == pytest.approx(3 * forward.total)
    # Without attention, and with a tied table that is multiplied once, only the norms differ.
    assert training.total == pytest.approx(6 * count_parameters(short).total, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "exponent"), [("linear", 2.0), ("cosine", 2.0), ("polynomial", 3.0)]
)
def test_scored_share_is_the_mean_mask_rate(schedule: Any, exponent: float) -> None:
    from megatron_dlm.objectives.schedules import build_schedule

    objective = ObjectiveConfig(schedule=schedule, schedule_exponent=exponent)
    midpoints = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    expected = build_schedule(schedule, exponent).mask_rate(midpoints).mean().item()
    assert mean_scored_share(objective) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "hybrid"},
        {"kind": "hybrid", "noise_type": "masked"},
        {"kind": "hybrid", "noise_bias": -1000.0},
        {"kind": "hybrid", "noise_bias": -20.0},
        {"kind": "hybrid", "noise_type": "uniform"},
        {"kind": "hybrid", "noise_type": "time"},
        {"kind": "hybrid", "noise_type": "time", "uniform_probability": 0.2},
        {"kind": "hybrid", "noise_type": "time", "weighting": "dynamic"},
        {"kind": "hybrid", "prompt_share": 0.4, "infilling_share": 0.3},
        {"kind": "hybrid", "prompt_share": 1.0, "noise_type": "masked"},
        {"kind": "masked", "schedule": "cosine"},
        {"kind": "masked", "weighting": "count"},
        {"kind": "block", "block_size": 4},
        {"kind": "block", "block_size": 4, "weighting": "count"},
        {"kind": "block", "block_size": 1, "weighting": "count"},
        {"kind": "block", "lowest_mask_rate": 0.5, "highest_mask_rate": 0.9},
        {"kind": "block", "lowest_mask_rate": 0.3, "schedule": "cosine"},
        {"kind": "block", "highest_mask_rate": 0.6, "schedule": "polynomial"},
    ],
    ids=lambda changes: ", ".join(f"{name} {value}" for name, value in changes.items()),
)
def test_scored_share_is_what_the_objective_scores(changes: dict[str, Any]) -> None:
    from megatron_dlm.objectives.build import build_objective

    config = ObjectiveConfig(**changes)
    num_samples, length = 4096, 64
    objective = build_objective(
        config, vocab_size=77, mask_token_id=76, batch_size=num_samples, training=True
    )
    batch = token_batch(0, num_samples, length, documents=False)
    scored = objective.prepare(batch, 5, Stream.TRAINING).scored.sum().item()
    assert scored / (num_samples * length) == pytest.approx(mean_scored_share(config), abs=0.01)


def test_every_slot_is_scored_without_noise() -> None:
    assert mean_scored_share(AUTOREGRESSIVE) == 1.0


ALONE = BatchLayout(micro_batch_size=2, num_micro_batches=8, data_parallel_size=1, precision="bf16")


def test_memory_of_one_rank_is_eighteen_bytes_per_parameter() -> None:
    memory = memory_per_rank(TINY, ParallelConfig(), ObjectiveConfig(), ALONE)
    parameters = count_parameters(TINY).total
    # bf16 weight 2, fp32 gradient 4, main copy 4, two moments 8.
    assert memory.weights + memory.gradients + memory.optimizer == 18 * parameters
    in_fp32 = dataclasses.replace(ALONE, precision="fp32")
    memory = memory_per_rank(TINY, ParallelConfig(), ObjectiveConfig(), in_fp32)
    assert memory.weights + memory.gradients + memory.optimizer == 16 * parameters


def test_only_the_optimizer_shrinks_with_data_parallel_ranks() -> None:
    one = memory_per_rank(TINY, ParallelConfig(), ObjectiveConfig(), ALONE)
    eight = memory_per_rank(
        TINY, ParallelConfig(), ObjectiveConfig(), dataclasses.replace(ALONE, data_parallel_size=8)
    )
    assert eight.optimizer == one.optimizer / 8
    assert dataclasses.replace(eight, optimizer=one.optimizer) == one


def test_activations_by_hand() -> None:
    # h = a = 32, k = 16, f = 128 (8/3 * 32 rounded up to 64): elements per token of one layer.
    assert TINY.ffn_size == 128
    split = (32 + 2 * 16) + (32 + 16) + 32 + 3 * 128
    assert activation_bytes_per_slot(TINY, ParallelConfig(), "bf16") == 2 * (4 * 32 + split)
    tensor = ParallelConfig(tensor_model_parallel_size=2)
    assert activation_bytes_per_slot(TINY, tensor, "bf16") == 2 * (4 * 32 + split / 2)
    sequence = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    assert activation_bytes_per_slot(TINY, sequence, "bf16") == 2 * (4 * 32 + split) / 2


def kept_bytes_per_token(model: ModelConfig, num_tokens: int) -> float:
    """Bytes that autograd really keeps for one plain fp32 layer, weights left out."""
    width, heads, size = model.hidden_size, model.num_attention_heads, model.head_size
    key_width, inner = model.query_groups * size, model.ffn_size
    weights = {
        name: torch.randn(rows, columns, requires_grad=True)
        for name, rows, columns in [
            ("qkv", width, width + 2 * key_width),
            ("out", width, width),
            ("up", width, 2 * inner),
            ("down", inner, width),
        ]
    }
    norms = {name: torch.ones(n, requires_grad=True) for name, n in [("h", width), ("d", size)]}
    ours = {tensor.data_ptr() for tensor in [*weights.values(), *norms.values()]}
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours and tensor.numel() >= num_tokens * size:
            kept[storage.data_ptr()] = storage.nbytes()
        keep_alive.append(tensor)
        return tensor

    keep_alive: list[torch.Tensor] = []
    functional = torch.nn.functional
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        residual = torch.randn(num_tokens, width, requires_grad=True) * 1.0
        qkv = functional.rms_norm(residual, (width,), norms["h"]) @ weights["qkv"]
        query, key, value = qkv.split([width, key_width, key_width], dim=-1)
        query = functional.rms_norm(query.reshape(num_tokens, heads, size), (size,), norms["d"])
        key = functional.rms_norm(key.reshape(num_tokens, -1, size), (size,), norms["d"])
        value = value.reshape(num_tokens, -1, size)
        mixed = functional.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in (query, key, value))
        )
        mixed = mixed[0].transpose(0, 1).reshape(num_tokens, width)
        residual = residual + mixed @ weights["out"]
        gate, up = (functional.rms_norm(residual, (width,), norms["h"]) @ weights["up"]).chunk(
            2, -1
        )
        _ = residual + (functional.silu(gate) * up) @ weights["down"]
    return sum(kept.values()) / num_tokens


def test_activations_agree_with_what_autograd_keeps() -> None:
    model = dataclasses.replace(TINY, hidden_size=64, num_query_groups=None)
    # Eager kernels also keep what fused ones compute again: silu(gate), and the input of every
    # norm's gain (two of the hidden size, query and key).
    eager_elements = model.ffn_size + 4 * model.hidden_size
    estimate = activation_bytes_per_slot(model, ParallelConfig(), "fp32") + 4 * eager_elements
    assert kept_bytes_per_token(model, 64) == estimate


def test_pipeline_holds_as_many_micro_batches_as_stages() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=4)
    alone = memory_per_rank(TINY, ParallelConfig(), ObjectiveConfig(), ALONE)
    piped = memory_per_rank(
        dataclasses.replace(TINY, vocab_size=50_000), parallel, AUTOREGRESSIVE, ALONE
    )
    # The last stage is the larger one here: logits; a quarter of the layers, one micro-batch.
    assert piped.logits > 0
    assert piped.activations == alone.activations / 4
    first = memory_per_rank(
        dataclasses.replace(TINY, vocab_size=1), parallel, AUTOREGRESSIVE, ALONE
    )
    assert first.activations == alone.activations  # 1/4 of the layers, 4 micro-batches
    assert first.logits == 0


def test_a_loss_in_chunks_keeps_the_logits_of_one() -> None:
    whole, chunked = (
        memory_per_rank(
            TINY,
            ParallelConfig(),
            AUTOREGRESSIVE,
            dataclasses.replace(ALONE, loss_chunk_slots=chunk),
        )
        for chunk in (None, 8)
    )
    # 32 scored slots of 128 rows; gradients of their hidden states and of the table, 32 wide.
    assert whole.logits == 32 * 128 * (2 + 2 + 4)
    assert chunked.logits == 8 * 128 * (2 + 2 + 4) + 32 * (32 * 2 + 128 * 4)
    assert dataclasses.replace(chunked, logits=whole.logits) == whole


def test_full_recompute_keeps_the_input_of_each_layer() -> None:
    model = dataclasses.replace(TINY, recompute_granularity="full")
    memory = memory_per_rank(model, ParallelConfig(), ObjectiveConfig(), ALONE)
    tokens = 2 * 16
    whole_layer = activation_bytes_per_slot(TINY, ParallelConfig(), "bf16")
    assert memory.activations == tokens * (4 * 2 * 32 + whole_layer)
    assert math.isclose(memory.logits, tokens * 0.5 * 128 * (2 + 2 + 4))
