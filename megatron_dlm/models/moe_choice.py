"""Who serves whom: expert choice, and the places of an expert. Pure functions of scores.

Shapes: T tokens that compete with each other, b groups of them (the sequences of a micro-batch, or
one group with all of its tokens), E experts. Formulas: docs/moe.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tokens_per_expert(num_tokens: int, num_experts: int, topk: int) -> int:
    """K = max(1, floor(T k / E)): tokens that each expert takes of one group."""
    return max(1, num_tokens * topk // num_experts)


def choose_tokens(scores: Tensor, topk: int) -> Tensor:
    """bool [T, b, E]: whether the expert is among those that take the token, by scores [T, b, E].

    Of equal scores the earlier token wins, whatever the device.
    """
    num_tokens, _, num_experts = scores.shape
    order = scores.detach().sort(dim=0, descending=True, stable=True).indices
    taken = order[: tokens_per_expert(num_tokens, num_experts, topk)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, taken, True)


def choice_scores(logits: Tensor, *, pre_softmax: bool) -> Tensor:
    """What experts rank tokens by: their logits, or the tokens' probabilities over all experts."""
    return logits.softmax(-1) if pre_softmax else logits


def gates(logits: Tensor, chosen: Tensor, *, score_function: str, pre_softmax: bool) -> Tensor:
    """Factors [..., E] of the experts' outputs, 0 where the expert did not choose the token.

    logits, chosen (bool): [..., E]. Softmax, or sigmoid over its sum, across the experts that chose
    the token; with pre_softmax the softmax over all experts. Nothing for a token nobody chose.
    """
    if score_function == "sigmoid":
        scores = logits.sigmoid() * chosen
        # As in Megatron Core's token choice; keeps 0 / 0 out.
        return scores / (scores.sum(-1, keepdim=True) + 1e-20)
    if not pre_softmax:
        # Finite, so that a token without experts gets no NaN in its gradient.
        logits = logits.masked_fill(~chosen, torch.finfo(logits.dtype).min)
    return logits.softmax(-1) * chosen


def scaled_by_count(gate: Tensor, chosen: Tensor, scales: Sequence[float]) -> Tensor:
    """Gates [..., E] times scales[n], n the number of experts that chose the token."""
    factors = torch.tensor(scales, dtype=gate.dtype, device=gate.device)
    return gate * factors[chosen.sum(-1, keepdim=True)]


def token_balance_loss(log_normaliser: Tensor, logits: Tensor, chosen: Tensor, topk: int) -> Tensor:
    """Balance of the popularity of tokens, [], summed over groups; of a slice of their tokens.

    logits and chosen [t, b, E] belong to any t of the T tokens, log_normaliser [b, E] is the
    logsumexp of the logits of all of them. Over all slices: sum over tokens of
    (sum over experts of the softmax over tokens) * (experts that chose it) / (E k); 1 if uniform.
    """
    popularity = (logits - log_normaliser).exp().sum(-1)
    return (popularity * chosen.sum(-1)).sum() / (logits.shape[-1] * topk)


def places(gate: Tensor, wanted: Tensor, capacity: int, *, policy: str) -> Tensor:
    """bool [n, E]: the `capacity` tokens to which each expert gives a place, wanted ones first.

    gate, wanted (bool): [n, E] of token choice. policy: of too many wanted ones those with the
    largest gates get a place ("probs"), or the first ("position"). Of equals the earlier does.
    """
    rank = gate if policy == "probs" else wanted.to(torch.int8)
    order = rank.detach().sort(dim=0, descending=True, stable=True).indices[:capacity]
    return torch.zeros_like(wanted).scatter_(0, order, True)
