"""Bytes that one layer keeps for its backward pass; imports no torch.

Legend as in accounting.py; e inner width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.accounting import widths


@dataclass(frozen=True)
class ElementBytes:
    """Size of one number that is kept for the backward pass."""

    plain: int
    matrix_input: int
    """At the input of a layer's matrix, which fp8 keeps as it multiplied it."""


ELEMENT_BYTES = {
    "fp32": ElementBytes(4, 4),
    "bf16": ElementBytes(2, 2),
    "fp8": ElementBytes(2, 1),
}


def activation_bytes_per_slot(
    model: ModelConfig, parallel: ParallelConfig, precision: str, *, has_experts: bool = False
) -> float:
    """Bytes that one layer keeps for its backward pass, per slot of the rank's share of a sequence.

    Kept per slot, in elements: input and output of both norms (4h, split by sequence parallelism
    only), and split over TP: query, key, value (a + 2k), the same again where they are normalised
    (a + k), attention output (a; twice in fp8), MLP (3f with a gate, 2f without). Fused attention
    keeps no S * S scores. Dropout adds a mask of one byte per element. Experts: see
    `_expert_bytes_per_slot`. Full recompute keeps the input of a unit, selective recompute leaves
    out what its modules make (core_attn nothing: fused attention keeps no more than it must).
    """
    attention_width, key_value_width = widths(model)
    hidden, tensor_size = model.hidden_size, parallel.tensor_model_parallel_size
    sequence_split = tensor_size if parallel.sequence_parallel else 1
    size, again = ELEMENT_BYTES[precision], _recomputed(model)
    if model.recompute_granularity == "full":
        return size.plain * hidden / sequence_split / model.recompute_num_layers
    split = size.plain * (2 * attention_width + 2 * key_value_width)
    split += size.plain * (attention_width + key_value_width) if model.qk_layernorm else 0
    if size.matrix_input != size.plain:
        split += size.matrix_input * attention_width
    if not has_experts and "mlp" not in again:
        split += _inner_bytes(model, model.ffn_size, size)
    if has_experts and not again & {"moe", "shared_experts"}:
        split += _inner_bytes(model, model.moe.shared_expert_ffn_hidden_size, size)
    whole: float = 2 * hidden * (size.plain + (0 if "layernorm" in again else size.matrix_input))
    whole += 2 * hidden if model.hidden_dropout > 0 else 0
    if has_experts and "moe" not in again:
        whole += _expert_bytes_per_slot(model, parallel, size)
    return split / tensor_size + whole / sequence_split


def _inner_bytes(model: ModelConfig, inner: int, size: ElementBytes) -> int:
    """What an MLP keeps between its matrices: input (two with a gate) and output of the activation,
    which is computed by one kernel."""
    num_inputs = 2 if model.activation == "swiglu" else 1
    return (num_inputs * size.plain + size.matrix_input) * inner


def _expert_bytes_per_slot(
    model: ModelConfig, parallel: ParallelConfig, size: ElementBytes
) -> float:
    """Of the routed experts, where every rank gets its fair share of the tokens.

    Each of the router_topk copies of a token is kept at the input of its expert (h, on every rank
    that shares the expert) and inside (3e or 2e; moe_act recomputes the output of the activation),
    with two numbers of 8 bytes and two of 4 that say where it came from and what it counts; the
    router keeps a score of 4 bytes and a choice of 1 for every expert.
    """
    moe, inner = model.moe, model.expert_ffn_size
    kept = parallel.expert_tensor_parallel_size * model.hidden_size * size.matrix_input
    kept += _inner_bytes(model, inner, size)
    if "moe_act" in _recomputed(model):
        kept -= inner * size.matrix_input
    return moe.router_topk * (kept + 24) + 5 * moe.num_experts


def _recomputed(model: ModelConfig) -> frozenset[str]:
    is_selective = model.recompute_granularity == "selective"
    return frozenset(model.recompute_modules if is_selective else ())
