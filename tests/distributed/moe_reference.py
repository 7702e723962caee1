"""The loss of a model with experts once more in float64, token by token: losses and all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import reference_model
import torch
from torch import Tensor

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig


@dataclass
class Routed:
    """What one MoE layer did with one micro-batch: logits [b, s, E] and who serves whom."""

    logits: Tensor
    chosen: Tensor


def reference_loss(
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    micro_batches: list[tuple[Tensor, Tensor, Tensor]],
    *,
    causal: bool,
    num_counted: int,
) -> Tensor:
    """Trained loss per counted token, and every balancing loss at its weight.

    micro_batches: tokens, targets [b, s] and weights of their nats [b, s], in training order; those
    that the data-parallel ranks see at one time may be joined.
    """
    nats = torch.zeros((), dtype=torch.float64)
    balance = torch.zeros((), dtype=torch.float64)
    demand = [torch.zeros(model.moe.num_experts)] * model.num_moe_layers
    for number, (tokens, targets, slot_weights) in enumerate(micro_batches):
        logits, layers = moe_logits(weights, model, tokens, causal=causal)
        logits = logits[..., : model.vocab_size]
        chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
        nats = nats + ((logits.logsumexp(-1) - chosen) * slot_weights).sum()
        balance = balance + sum(balancing_loss(layer, model.moe) for layer in layers)
        if model.moe.global_aux_loss_coeff:
            demand = [
                known + layer.chosen.double().mean((0, 1))
                for known, layer in zip(demand, layers, strict=True)
            ]
            for known, layer in zip(demand, layers, strict=True):
                share = known / (number + 1) / model.moe.router_topk
                popularity = scores_of(layer.logits, model.moe).mean((0, 1))
                loss = model.moe.num_experts * (share * popularity).sum()
                balance = balance + model.moe.global_aux_loss_coeff * loss
    return nats / num_counted + balance / len(micro_batches)


def moe_logits(
    weights: Mapping[str, Tensor], model: ModelConfig, tokens: Tensor, *, causal: bool
) -> tuple[Tensor, list[Routed]]:
    length = tokens.shape[1]
    place = torch.arange(length, dtype=torch.float64)
    visible = torch.ones(1, length, length, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    hidden = weights["embedding.word_embeddings.weight"][tokens]
    angles = reference_model._angles(model, place)
    layers = []
    for number in range(model.num_layers):
        prefix = f"decoder.layers.{number}."
        parts = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        hidden = hidden + reference_model._attention(parts, model, hidden, visible, angles)
        if number < model.moe.num_dense_layers:
            hidden = hidden + reference_model._mlp(parts, model, hidden)
            continue
        inner = reference_model._norm(hidden, parts["pre_mlp_layernorm.weight"], model)
        output, routed = experts(parts, model, inner)
        layers.append(routed)
        hidden = hidden + output
    hidden = reference_model._norm(hidden, weights["decoder.final_layernorm.weight"], model)
    return hidden @ weights["embedding.word_embeddings.weight"].T, layers


def experts(
    parts: Mapping[str, Tensor], model: ModelConfig, inner: Tensor
) -> tuple[Tensor, Routed]:
    """inner [b, s, h] -> routed and shared output, one token and one expert at a time."""
    moe = model.moe
    logits = inner @ parts["mlp.router.weight"].T
    pick = expert_choice if moe.routing == "expert_choice" else token_choice
    chosen, gates = pick(logits, moe)
    output = torch.zeros_like(inner)
    rows = []
    for row in range(inner.shape[0]):
        slots = []
        for slot in range(inner.shape[1]):
            total = torch.zeros_like(inner[0, 0])
            for expert in chosen[row, slot].nonzero().flatten().tolist():
                one = {
                    name: parts[f"mlp.experts.experts.{name}.weight"][expert]
                    for name in ("linear_fc1", "linear_fc2")
                }
                total = total + gates[row, slot, expert] * _mlp(one, inner[row, slot])
            slots.append(total)
        rows.append(torch.stack(slots))
    output = torch.stack(rows)
    if moe.shared_expert_ffn_hidden_size:
        names = ("linear_fc1", "linear_fc2")
        shared = _mlp({n: parts[f"mlp.shared_experts.{n}.weight"] for n in names}, inner)
        if moe.shared_expert_gate:
            shared = shared * (inner @ parts["mlp.shared_experts.gate_weight"].T).sigmoid()
        output = output + shared
    return output, Routed(logits, chosen)


def _mlp(parts: Mapping[str, Tensor], values: Tensor) -> Tensor:
    gate, up = (values @ parts["linear_fc1"].T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ parts["linear_fc2"].T


def token_choice(logits: Tensor, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """Every token by itself: (chosen bool, gates), [b, s, E]."""
    is_sigmoid = moe.score_function == "sigmoid"
    scores = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
    best = logits.topk(moe.router_topk, dim=-1).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True)
    gates = scores * chosen
    if not moe.pre_softmax:
        gates = gates / gates.sum(-1, keepdim=True)
    return chosen, gates


def expert_choice(logits: Tensor, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """Every expert by itself, in Python: (chosen bool, gates), [b, s, E]."""
    if moe.choice_scope == "micro_batch":
        # Slots of all sequences in the order of the model: slot by slot.
        flat = logits.transpose(0, 1).reshape(1, -1, moe.num_experts)
        sequence = replace(moe, choice_scope="sequence")
        pair = expert_choice(flat, sequence)
        rows, length = logits.shape[:2]
        return tuple(part.view(length, rows, -1).transpose(0, 1) for part in pair)  # type: ignore[return-value]
    ranked = logits.softmax(-1) if moe.pre_softmax else logits
    num_rows, length, num_experts = logits.shape
    num_taken = max(1, math.floor(length * moe.router_topk / num_experts))
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    for row in range(num_rows):
        for expert in range(num_experts):
            values = ranked[row, :, expert].tolist()
            order = sorted(range(length), key=lambda slot: (-values[slot], slot))
            for slot in order[:num_taken]:
                chosen[row, slot, expert] = True
    gates = []
    for row in range(num_rows):
        for slot in range(length):
            gates.append(_gates_of_token(logits[row, slot], chosen[row, slot], moe))
    return chosen, torch.stack(gates).view_as(logits)


def _gates_of_token(logits: Tensor, chosen: Tensor, moe: MoEConfig) -> Tensor:
    takers = chosen.nonzero().flatten()
    if moe.pre_softmax:
        gates = logits.softmax(-1)[takers]
    elif moe.score_function == "sigmoid":
        gates = logits[takers].sigmoid()
        gates = gates / gates.sum()
    else:
        gates = logits[takers].softmax(-1)
    scale = moe.count_scales[len(takers)] if moe.count_scales else 1.0
    return torch.zeros_like(logits).index_put((takers,), gates * scale)


def balancing_loss(layer: Routed, moe: MoEConfig) -> Tensor:
    """All balancing losses of one layer and micro-batch at their weights, by definition."""
    logits = layer.logits
    total = moe.z_loss_coeff * logits.logsumexp(-1).square().mean()
    if moe.routing == "expert_choice":
        popularity = logits.softmax(1).sum(-1) * layer.chosen.sum(-1)  # over the tokens of a row
        balance = popularity.sum(1).mean() / (moe.num_experts * moe.router_topk)
        return total + moe.token_balance_loss_coeff * balance
    total = total + moe.aux_loss_coeff * switch_loss(logits.flatten(0, 1), moe)
    rows = torch.stack([switch_loss(row, moe) for row in logits])
    return total + moe.seq_aux_loss_coeff * rows.mean()


def switch_loss(logits: Tensor, moe: MoEConfig) -> Tensor:
    """E sum_e (share of the pairs that expert e gets) * (its mean score); [n, E] -> []."""
    chosen, _ = token_choice(logits[None], moe)
    share = chosen[0].double().mean(0) / moe.router_topk
    return moe.num_experts * (share * scores_of(logits, moe).mean(0)).sum()


def scores_of(logits: Tensor, moe: MoEConfig) -> Tensor:
    """What balancing losses call the scores of the experts: they add up to 1."""
    if moe.score_function == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True)
