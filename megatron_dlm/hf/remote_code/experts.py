"""The MLP of a layer, or a mixture of several: which of these experts a token passes, their sum.

Shapes: b rows, s slots, h hidden size, E experts, k experts per token, n pairs of token and expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from .configuration_megatron_dlm import MegatronDLMConfig


class MLP(nn.Module):
    """down(act(gate) * up), or down(act(up)) without a gate."""

    def __init__(self, config: MegatronDLMConfig, inner: int) -> None:
        """inner: width between the projections."""
        super().__init__()
        hidden, bias = config.hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """[.., h] -> [.., h], times scale [.., 1] where there are no biases.

        It enters before the last product, as in training.
        """
        inner = self.act(self.up_proj(x) if self.gate_proj is None else self.gate_proj(x))
        if self.gate_proj is not None:
            inner = inner * self.up_proj(x)
        return self.down_proj(inner if scale is None else (inner * scale).to(x.dtype))


class Router(nn.Module):
    """Gates of every token; computed in fp32 at least.

    token_choice: a token takes the k experts of the highest scores. expert_choice: an expert takes
    the floor(T k / E) highest tokens, at least one, of each row of T real tokens; of equals the
    first.
    """

    expert_bias: Tensor | None
    """fp32 [E]: added to the scores by which a token chooses, not to its gates."""

    def __init__(self, config: MegatronDLMConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32)
        self.register_buffer("expert_bias", bias if config.moe_expert_bias else None)
        self.reset()

    def reset(self) -> None:
        """Small random scores."""
        nn.init.normal_(self.weight, std=self.config.initializer_range)

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gates [b, s, E], 0 where not chosen, and who is chosen, bool [b, s, E], for x [b, s, h].

        real: bool [b, s], False is padding; None is all True.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = linear(x.to(dtype), self.weight.to(dtype))
        if self.config.moe_routing == "token_choice":
            return self._choice_of_tokens(logits)
        if real is None:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return self._choice_of_experts(logits, real)

    def _choice_of_tokens(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        count = config.num_experts_per_tok
        scores = logits
        if config.moe_score_function == "sigmoid":
            scores = logits.sigmoid()
        elif config.moe_pre_softmax:
            scores = logits.softmax(-1)
        ranked = scores if self.expert_bias is None else scores + self.expert_bias
        best = ranked.topk(count, dim=-1).indices
        gates = scores.gather(-1, best)
        if config.moe_score_function == "sigmoid" and count > 1:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        elif config.moe_score_function == "softmax" and not config.moe_pre_softmax:
            gates = gates.softmax(-1)
        gates = torch.zeros_like(logits).scatter(-1, best, gates)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)
        return gates, chosen

    def _choice_of_experts(self, logits: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        scores = logits.softmax(-1) if config.moe_pre_softmax else logits
        count = real.sum(1) * config.num_experts_per_tok // config.num_experts
        chosen = _highest(scores, real, count.clamp(min=1))
        if config.moe_score_function == "sigmoid":
            gates = logits.sigmoid() * chosen
            return gates / (gates.sum(-1, keepdim=True) + 1e-20), chosen
        if not config.moe_pre_softmax:
            # Not minus infinity: a token that nobody chose would have no law.
            scores = logits.masked_fill(~chosen, torch.finfo(logits.dtype).min).softmax(-1)
        return scores * chosen, chosen


class MixtureOfExperts(nn.Module):
    """The sum of the chosen experts times their gates, and of a shared expert that all pass."""

    def __init__(self, config: MegatronDLMConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = nn.ModuleList(
            MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.count_scales = config.moe_count_scales
        shared = config.shared_expert_intermediate_size
        self.shared_expert = MLP(config, shared) if shared else None
        self.shared_expert_gate = (
            nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None
        )

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """[b, s, h] -> [b, s, h]; real: bool [b, s], False is padding."""
        gates, chosen = self.gate(x, real)
        if self.count_scales:
            scales = torch.tensor(self.count_scales, dtype=gates.dtype, device=gates.device)
            gates = gates * scales[chosen.sum(-1, keepdim=True)]
        routed = self._routed(x.flatten(0, 1), gates.flatten(0, 1), chosen.flatten(0, 1))
        routed = routed.view_as(x)
        if self.shared_expert is None:
            return routed
        shared = self.shared_expert(x)
        if self.shared_expert_gate is not None:
            shared = shared * self.shared_expert_gate(x).sigmoid()
        return routed + shared

    def _routed(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Every expert once, over all tokens that pass it; x [t, h], gates and chosen [t, E]."""
        expert, token = chosen.T.nonzero(as_tuple=True)  # ordered by expert
        gate = gates[token, expert][:, None]
        counts = chosen.sum(0).tolist()
        summed = torch.zeros_like(x, dtype=gates.dtype)
        parts = zip(self.experts, token.split(counts), gate.split(counts), strict=True)
        for one, rows, scale in parts:
            if len(rows):
                summed.index_add_(0, rows, one(x[rows], scale).to(summed.dtype))
        return summed.to(x.dtype)


def _highest(score: Tensor, real: Tensor, count: Tensor) -> Tensor:
    """bool [b, s, E]: in every row and of every expert the `count` ([b]) highest real slots.

    Of equals the first; score is [b, s, E], real [b, s].
    """
    order = score.masked_fill(~real[..., None], float("-inf"))
    order = order.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(score.shape[1], device=score.device)[:, None]
    taken = (places < count[:, None, None]).expand_as(order)
    return torch.zeros_like(taken).scatter(1, order, taken) & real[..., None]
