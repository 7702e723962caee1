"""Expert choice and capacity against loops over tokens and experts, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dlm.models.moe_choice import (
    choice_scores,
    choose_tokens,
    gates,
    places,
    scaled_by_count,
    token_balance_loss,
    tokens_per_expert,
)

KINDS = [("softmax", False), ("softmax", True), ("sigmoid", False)]
SCALES = [0.3, 1.0, 0.9, 0.8, 0.7, 0.6]


def logits_of(seed: int, tokens: int = 7, rows: int = 2, experts: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    shape = (tokens, rows, experts)
    return torch.randn(shape, generator=draw, dtype=torch.float64).mul_(2).requires_grad_()


def chosen_and_gates(
    logits: Tensor, topk: int, score_function: str, pre_softmax: bool
) -> tuple[Tensor, Tensor]:
    chosen = choose_tokens(choice_scores(logits, pre_softmax=pre_softmax), topk)
    gate = gates(logits, chosen, score_function=score_function, pre_softmax=pre_softmax)
    return chosen, scaled_by_count(gate, chosen, SCALES)


def looped_gates(
    logits: Tensor, topk: int, score_function: str, pre_softmax: bool
) -> tuple[Tensor, dict[tuple[int, int, int], Tensor]]:
    """Who chose whom, and the gate of every pair, with Python's own sort and sums."""
    tokens, rows, experts = logits.shape
    chosen = torch.zeros(logits.shape, dtype=torch.bool)
    found = {}
    for row in range(rows):
        for expert in range(experts):
            keys = []
            for token in range(tokens):
                one = logits[token, row]
                probability = one[expert].exp() / one.exp().sum()
                value = probability if pre_softmax else one[expert]
                keys.append((-value.item(), token))
            for _, token in sorted(keys)[: max(1, math.floor(tokens * topk / experts))]:
                chosen[token, row, expert] = True
        for token in range(tokens):
            takers = chosen[token, row].nonzero().flatten().tolist()
            one = logits[token, row]
            parts = one.exp() if score_function == "softmax" else 1 / (1 + (-one).exp())
            among = range(experts) if pre_softmax else takers
            for expert in takers:
                share = parts[expert] / sum(parts[other] for other in among)
                found[token, row, expert] = share * SCALES[len(takers)]
    return chosen, found


@pytest.mark.parametrize(("score_function", "pre_softmax"), KINDS)
@pytest.mark.parametrize("topk", [1, 2, 5])
def test_gates_and_gradients_of_a_loop(score_function: str, pre_softmax: bool, topk: int) -> None:
    logits = logits_of(topk)
    chosen, gate = chosen_and_gates(logits, topk, score_function, pre_softmax)
    wanted_chosen, pairs = looped_gates(logits, topk, score_function, pre_softmax)
    torch.testing.assert_close(chosen, wanted_chosen)
    weights = torch.arange(1.0, gate.numel() + 1, dtype=torch.float64).view_as(gate).sin()
    for place, value in pairs.items():
        assert gate[place].item() == pytest.approx(value.item(), rel=1e-12)
    assert int((gate != 0).sum()) == len(pairs)
    [ours] = torch.autograd.grad((gate * weights).sum(), logits)
    total = sum(value * weights[place] for place, value in pairs.items())
    [theirs] = torch.autograd.grad(total, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@given(seed=st.integers(0, 10_000), topk=st.integers(1, 5), kind=st.sampled_from(KINDS))
@settings(max_examples=30, deadline=None)
def test_order_of_tokens_and_experts_does_not_matter(
    seed: int, topk: int, kind: tuple[str, bool]
) -> None:
    logits = logits_of(seed).detach()
    draw = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randperm(logits.shape[0], generator=draw)
    experts = torch.randperm(logits.shape[2], generator=draw)
    chosen, gate = chosen_and_gates(logits, topk, *kind)
    moved_chosen, moved = chosen_and_gates(logits[tokens][:, :, experts], topk, *kind)
    torch.testing.assert_close(moved_chosen, chosen[tokens][:, :, experts])
    torch.testing.assert_close(moved, gate[tokens][:, :, experts], rtol=1e-12, atol=1e-15)


def test_rows_do_not_compete() -> None:
    logits = logits_of(0).detach()
    alone, _ = chosen_and_gates(logits[:, :1], 2, "softmax", False)
    together, _ = chosen_and_gates(logits, 2, "softmax", False)
    torch.testing.assert_close(together[:, :1], alone)


@pytest.mark.parametrize("num_tokens", [6, 100, 5000])
def test_of_equals_the_earlier_is_taken(num_tokens: int) -> None:
    chosen = choose_tokens(torch.zeros(num_tokens, 1, 3), 1)
    assert chosen[: num_tokens // 3].all()
    assert not chosen[num_tokens // 3 :].any()


def test_every_expert_takes_its_number() -> None:
    assert tokens_per_expert(16, 4, 2) == 8
    assert tokens_per_expert(7, 5, 2) == 2  # floor(2.8)
    assert tokens_per_expert(3, 8, 1) == 1  # never none
    assert (choose_tokens(logits_of(3), 2).sum(0) == 2).all()


@pytest.mark.parametrize(("score_function", "pre_softmax"), KINDS)
def test_a_token_nobody_chose_gets_nothing(score_function: str, pre_softmax: bool) -> None:
    logits = logits_of(1).detach().float().requires_grad_()
    chosen = torch.zeros(logits.shape, dtype=torch.bool)
    chosen[0, 0, 2] = True
    gate = gates(logits, chosen, score_function=score_function, pre_softmax=pre_softmax)
    assert (gate[~chosen] == 0).all()
    gate.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[1:] == 0).all()


def test_token_balance_is_one_when_uniform() -> None:
    """8 tokens, 4 experts, 2 per token: everyone equally popular, everyone chosen twice."""
    logits = torch.zeros(8, 3, 4, dtype=torch.float64)
    chosen = torch.zeros(8, 3, 4, dtype=torch.bool)
    for token in range(8):
        chosen[token, :, [token % 4, (token + 1) % 4]] = True
    loss = token_balance_loss(logits.logsumexp(0), logits, chosen, 2) / 3
    assert float(loss) == pytest.approx(1.0)


def test_token_balance_by_hand_and_in_slices() -> None:
    """All experts want token 0 alone: it has all popularity and all experts, E * E / (E k)."""
    logits = torch.full((6, 1, 3), -50.0, dtype=torch.float64)
    logits[0] = 50.0
    chosen = torch.zeros(6, 1, 3, dtype=torch.bool)
    chosen[0] = True
    normaliser = logits.logsumexp(0)
    assert float(token_balance_loss(normaliser, logits, chosen, 1)) == pytest.approx(3.0)
    halves = [
        token_balance_loss(normaliser, logits[part], chosen[part], 1)
        for part in (slice(0, 2), slice(2, 6))
    ]
    assert float(halves[0] + halves[1]) == pytest.approx(3.0)


def test_token_balance_pushes_popular_tokens_down() -> None:
    logits = logits_of(5)
    chosen = choose_tokens(logits, 2)
    loss = token_balance_loss(logits.logsumexp(0), logits, chosen, 2)
    [gradient] = torch.autograd.grad(loss, logits)
    count = chosen.sum(-1)
    for row in range(logits.shape[1]):
        most, least = int(count[:, row].argmax()), int(count[:, row].argmin())
        assert gradient[most, row].sum() > gradient[least, row].sum()
    assert float(gradient.sum()) == pytest.approx(0.0, abs=1e-12)


def test_places_by_gate_and_by_position() -> None:
    gate = torch.tensor([[0.2], [0.0], [0.9], [0.5], [0.2]])
    wanted = gate > 0
    by_gate = places(gate, wanted, 2, policy="probs").flatten().tolist()
    assert by_gate == [False, False, True, True, False]
    with_tie = places(gate, wanted, 3, policy="probs").flatten().tolist()
    assert with_tie == [True, False, True, True, False]
    by_position = places(gate, wanted, 2, policy="position").flatten().tolist()
    assert by_position == [True, False, True, False, False]
    padded = places(gate, wanted, 5, policy="position")
    assert padded.all()  # the last place goes to a token that did not ask


def test_position_drops_the_last_of_many() -> None:
    """Long enough for an unstable selection to show."""
    wanted = torch.ones(3000, 2, dtype=torch.bool)
    kept = places(wanted.float(), wanted, 700, policy="position")
    assert kept[:700].all()
    assert not kept[700:].any()
