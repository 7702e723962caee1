"""Parameters, FLOPs and memory of models with experts, against built models and by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from rank_pool import RankPool

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.accounting import count_parameters, forward_flops_per_token
from megatron_dlm.models.accounting_activations import activation_bytes_per_slot
from megatron_dlm.models.accounting_memory import BatchLayout, memory_per_rank, stage_parameters

TINY = ModelConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, seq_length=16,
    vocab_size=77, make_vocab_size_divisible_by=64,
    moe=MoEConfig(num_experts=4, router_topk=2, ffn_hidden_size=48),
)  # fmt: skip
DENSE = dataclasses.replace(TINY, moe=MoEConfig())
EXPERT = 3 * 32 * 48
ROUTER = 4 * 32


def with_moe(**changes: Any) -> ModelConfig:
    return dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, **changes))


def layout(**sizes: int) -> ParallelConfig:
    names = {"tp": "tensor_model", "pp": "pipeline_model", "ep": "expert_model"}
    names |= {"etp": "expert_tensor", "vpp": "virtual_pipeline_model"}
    given = {f"{names[key]}_parallel_size": size for key, size in sizes.items()}
    return ParallelConfig(sequence_parallel=sizes.get("tp", 1) > 1, **given)  # type: ignore[arg-type]


def build(model: ModelConfig, parallel: ParallelConfig, context: Any) -> list[Any]:
    """This rank's chunks; runs inside a rank."""
    from megatron_dlm.models.build import build_model
    from megatron_dlm.runtime.device import open_device
    from megatron_dlm.runtime.seeding import seed_dropout

    seed_dropout(0, 0, context)
    return build_model(
        model,
        parallel,
        ObjectiveConfig(),
        precision="fp32",
        seed=0,
        device=open_device("cpu"),
        parallel=context,
    )


def held_parameters(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """Numbers of a rank outside of routed experts, and of its experts."""
    from megatron_dlm.runtime.parallel import laid_out

    with laid_out(parallel) as context:
        chunks = build(model, parallel, context)
        named = [item for chunk in chunks for item in chunk.named_parameters()]
        sizes = [(".experts." in name, weight.numel()) for name, weight in named]
        experts = sum(size for is_expert, size in sizes if is_expert)
        return sum(size for _, size in sizes) - experts, experts


@pytest.mark.parametrize(
    "model",
    [
        TINY,
        with_moe(num_dense_layers=1),
        with_moe(shared_expert_ffn_hidden_size=24, shared_expert_gate=True),
        with_moe(score_function="sigmoid", expert_bias=True),  # the bias is no parameter
        with_moe(routing="expert_choice", router_topk=1),
        dataclasses.replace(TINY, activation="gelu"),
    ],
    ids=["plain", "dense first", "shared", "expert bias", "expert choice", "gelu"],
)
def test_count_equals_the_built_model(model: ModelConfig, ranks: RankPool) -> None:
    ((dense, experts),) = ranks.run(held_parameters, model, ParallelConfig(), num_ranks=1)
    count = count_parameters(model)
    assert count.total == dense + experts
    # A token meets everything but the experts that do not take it.
    idle = experts * (1 - model.moe.router_topk / model.moe.num_experts)
    assert count.active == count.total - idle
    held = stage_parameters(model, ParallelConfig(), 0)
    assert (held.dense, held.experts) == (dense, experts)


def test_a_dense_model_is_active_as_a_whole() -> None:
    count = count_parameters(DENSE)
    assert count.active == count.total
    # Four layers: the dense MLP of width 128 goes, four experts and their router come.
    changed = count_parameters(TINY).total - count.total
    assert changed == 4 * (4 * EXPERT + ROUTER - 3 * 32 * 128)


SHARED = with_moe(num_dense_layers=2, shared_expert_ffn_hidden_size=16, shared_expert_gate=True)


@pytest.mark.parametrize(
    ("sizes", "num_ranks"),
    [
        ({"ep": 2}, 2),
        ({"tp": 2, "ep": 2}, 4),
        ({"tp": 2, "ep": 2, "etp": 2}, 4),
        ({"pp": 2, "ep": 2}, 4),
        ({"pp": 2, "vpp": 2}, 2),
    ],
    ids=str,
)
def test_share_of_a_rank_equals_the_built_stages(
    sizes: dict[str, int], num_ranks: int, ranks: RankPool
) -> None:
    parallel = layout(**sizes)
    built = ranks.run(held_parameters, SHARED, parallel, num_ranks=num_ranks)
    stages = parallel.pipeline_model_parallel_size
    held = [stage_parameters(SHARED, parallel, stage) for stage in range(stages)]
    expected = [(stage.dense, stage.experts) for stage in held]
    assert built == [expected[rank * stages // num_ranks] for rank in range(num_ranks)]


def flops_of_a_pass(model: ModelConfig) -> int:
    """Matrix products of a forward pass of one sample, counted by torch; runs inside a rank."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_dlm.runtime.parallel import laid_out

    with laid_out(ParallelConfig()) as context, torch.no_grad():
        (chunk,) = build(model, ParallelConfig(), context)
        tokens = torch.arange(model.seq_length)[None]
        scored = torch.arange(model.seq_length)[None] % 2 == 0  # half, as the mean mask rate
        with FlopCounterMode(display=False) as counter:
            chunk.eval()(tokens, tokens, scored=scored)
        return counter.get_total_flops()


@pytest.mark.parametrize("routing", ["token_choice", "expert_choice"])
def test_flops_are_those_of_the_experts_that_are_met(routing: str, ranks: RankPool) -> None:
    model = dataclasses.replace(SHARED, moe=dataclasses.replace(SHARED.moe, routing=routing))
    (counted,) = ranks.run(flops_of_a_pass, model, num_ranks=1)
    flops = forward_flops_per_token(model, ObjectiveConfig())
    # torch does not count fused attention on CPUs.
    assert (flops.linear + flops.output_layer) * model.seq_length == counted


ALONE = BatchLayout(micro_batch_size=2, num_micro_batches=8, data_parallel_size=4, precision="bf16")


def memory(model: ModelConfig, parallel: ParallelConfig, **changes: Any) -> Any:
    return memory_per_rank(
        model, parallel, ObjectiveConfig(), dataclasses.replace(ALONE, **changes)
    )


def test_expert_ranks_share_experts_and_the_rest_shares_their_optimizer() -> None:
    one, two = (memory(TINY, layout(ep=size)) for size in (1, 2))
    experts = 4 * 4 * EXPERT
    assert one.weights - two.weights == 2 * experts / 2
    assert one.gradients - two.gradients == 4 * experts / 2
    # Each of the four ranks keeps a quarter of all moments, however the experts are spread.
    assert one.optimizer == two.optimizer == 12 * count_parameters(TINY).total / 4
    # TP 2 with experts whole: 8 ranks, of which 4 share the optimizer of a dense parameter.
    tensor = memory(TINY, layout(tp=2, ep=2))
    held = stage_parameters(TINY, layout(tp=2, ep=2), 0)
    assert held.experts == experts / 2
    assert tensor.optimizer == 12 * (held.dense / 4 + held.experts / 4)


def kept_by_an_mlp(model: ModelConfig) -> float:
    """Bytes per slot that autograd really keeps for the last layer's experts; inside a rank."""
    from megatron_dlm.runtime.parallel import laid_out

    with laid_out(ParallelConfig()) as context:
        (chunk,) = build(model, ParallelConfig(), context)
        weights = {weight.untyped_storage().data_ptr() for weight in chunk.parameters()}
        kept: dict[int, int] = {}
        keep_alive = []

        def remember(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            keep_alive.append(tensor)
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        hidden = torch.randn(model.seq_length, 2, model.hidden_size, requires_grad=True) * 1.0
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            _ = chunk.decoder.layers[-1].mlp(hidden)[0]
        return sum(kept.values()) / (2 * model.seq_length)


@pytest.mark.parametrize("shared", [0, 24])
def test_activations_agree_with_what_autograd_keeps(shared: int, ranks: RankPool) -> None:
    model = with_moe(shared_expert_ffn_hidden_size=shared)
    with_experts = activation_bytes_per_slot(model, ParallelConfig(), "fp32", has_experts=True)
    dense = activation_bytes_per_slot(model, ParallelConfig(), "fp32")
    experts = with_experts - (dense - 4 * 3 * model.ffn_size)
    (kept,) = ranks.run(kept_by_an_mlp, model, num_ranks=1)
    # The input of the layer is counted with its norm. Eager kernels also keep, of each copy, the
    # gate behind its activation, the other half, and their product before it is weighed.
    assert kept == experts + 4 * (32 + 2 * 3 * 48 + 2 * shared)


def test_activations_of_experts_by_hand() -> None:
    # Two copies of 32 inputs and 3 * 48 inner numbers, and what the router keeps.
    attention = (32 + 2 * 16) + (32 + 16) + 32
    experts = 2 * (2 * (32 + 3 * 48) + 24) + 5 * 4
    plain = activation_bytes_per_slot(TINY, ParallelConfig(), "bf16", has_experts=True)
    assert plain == 2 * (4 * 32 + attention) + experts
    split = activation_bytes_per_slot(TINY, layout(tp=2, ep=2), "bf16", has_experts=True)
    assert split == plain / 2
    # Both ranks of an expert get the copies of both.
    shared = activation_bytes_per_slot(TINY, layout(tp=2, etp=2), "bf16", has_experts=True)
    assert shared == plain / 2 + 2 * 2 * 32 / 2
    fp8 = activation_bytes_per_slot(TINY, ParallelConfig(), "fp8", has_experts=True)
    # One byte less for outputs of norms and inputs of experts, but the attention's output twice.
    assert plain - fp8 == 2 * 32 + 2 * (32 + 48) - 32


@pytest.mark.parametrize(
    ("modules", "saved"),
    [
        (["core_attn"], 0),
        (["moe_act"], 2 * 2 * 48),
        (["layernorm"], 2 * 2 * 32),
        (["shared_experts"], 2 * 3 * 16),
        (["mlp"], 0),
        (["moe"], 2 * (2 * (32 + 3 * 48) + 24) + 5 * 4 + 2 * 3 * 16),
    ],
    ids=str,
)
def test_recomputed_modules_are_not_kept(modules: list[Any], saved: int) -> None:
    selective = dataclasses.replace(
        SHARED, recompute_granularity="selective", recompute_modules=modules
    )
    one, two = (
        activation_bytes_per_slot(model, ParallelConfig(), "bf16", has_experts=True)
        for model in (SHARED, selective)
    )
    assert one - two == saved
    in_dense_layer = activation_bytes_per_slot(SHARED, ParallelConfig(), "bf16")
    again = activation_bytes_per_slot(selective, ParallelConfig(), "bf16")
    dense_saved = {"mlp": 2 * 3 * 128, "layernorm": 2 * 2 * 32}.get(modules[0], 0)
    assert in_dense_layer - again == dense_saved
    # At the peak one layer is there whole: of two layers of each kind, what the other saves.
    whole, less = memory(SHARED, ParallelConfig()), memory(selective, ParallelConfig())
    slots = 2 * 16
    largest = max(saved, dense_saved)
    assert whole.activations - less.activations == slots * (2 * saved + 2 * dense_saved - largest)


def test_what_goes_to_the_host_is_not_counted() -> None:
    parallel = dataclasses.replace(layout(ep=2), optimizer_cpu_offload_fraction=0.75)
    whole, offloaded = memory(TINY, layout(ep=2)), memory(TINY, parallel)
    assert offloaded.optimizer == whole.optimizer / 4
    parallel = dataclasses.replace(layout(ep=2), activation_offload_layers=3)
    assert memory(TINY, parallel).activations == whole.activations / 4
    in_bf16 = memory(TINY, dataclasses.replace(layout(ep=2), grad_reduce_in_fp32=False))
    assert in_bf16.gradients == whole.gradients / 2
    assert (
        memory(TINY, layout(), data_parallel_size=1).optimizer
        == 4 * memory(TINY, layout()).optimizer
    )


def test_fp8_keeps_two_more_copies_of_the_matrices() -> None:
    bf16, fp8 = (memory(TINY, layout(ep=2), precision=name) for name in ("bf16", "fp8"))
    attention = 32 * (2 * 32 + 2 * 16)
    assert fp8.weights - bf16.weights == 2 * 4 * (attention + 2 * EXPERT)
    assert fp8.optimizer == bf16.optimizer
    assert fp8.activations < bf16.activations


def test_context_ranks_share_the_optimizer_and_the_sequence() -> None:
    parallel = dataclasses.replace(ParallelConfig(), context_parallel_size=2)
    one, two = memory(TINY, ParallelConfig()), memory(TINY, parallel, data_parallel_size=2)
    assert two.optimizer == one.optimizer
    assert two.activations == one.activations / 2


def test_the_largest_stage_counts() -> None:
    """Two dense layers, then two with experts: the last stage is the larger, or the first."""
    parallel = layout(pp=2)
    wide = dataclasses.replace(SHARED, vocab_size=1)
    last = stage_parameters(wide, parallel, 1)
    assert memory(wide, parallel).weights == 2 * last.total
    assert last.experts == 2 * 4 * EXPERT
    assert stage_parameters(wide, parallel, 0).experts == 0
