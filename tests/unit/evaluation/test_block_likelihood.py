"""The bound of block diffusion: exact for blocks of one token, enumerated or drawn for others."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from toy_readers import MASK, Counted, Function, hash_model, random_joint, table_model, texts

from megatron_dlm.evaluation.estimates import Likelihood, MaskDraws, Request
from megatron_dlm.evaluation.likelihood import score_diffusion
from megatron_dlm.evaluation.mask_bound import MaskBound

HASH_MASK = 6
REQUESTS = [
    Request((1, 2, 3), (4, 5)),
    Request((2,), (0, 1, 2, 3, 4, 5)),
    Request((), (5, 5, 1)),
    Request((5, 4, 3, 2, 1), (2, 0, 3)),
]
ALL, NEVER = MaskDraws(enumerate_masks="always"), MaskDraws(64, "never")


def scored(
    requests: list[Request],
    block_size: int,
    draws: MaskDraws = ALL,
    function: Function | None = None,
    **options: object,
) -> list[Likelihood]:
    mask = MASK if function else HASH_MASK
    counted = Counted(
        function or hash_model(), () if function else (HASH_MASK,), block_size=block_size
    )
    options = {"batch_size": 16, **options}
    bound = MaskBound(mask, block_size)
    return score_diffusion(counted.reader, requests, bound, draws=draws, **options)  # type: ignore[arg-type]


def law(tokens: list[int]) -> torch.Tensor:
    row = torch.tensor([tokens])
    logits = hash_model()(row, torch.ones_like(row, dtype=torch.bool))
    return torch.log_softmax(logits[0], dim=1)


def bound_by_orders(request: Request, block_size: int) -> float:
    """Block by block the mean over all orders of the chain rule behind the clean past."""
    text, first = [*request.prompt, *request.answer], len(request.prompt)
    total = 0.0
    for start in range(0, len(text), block_size):
        stop = min(start + block_size, len(text))
        slots = [slot for slot in range(start, stop) if slot >= first]
        orders = list(itertools.permutations(slots)) if slots else []
        for order in orders:
            seen = list(text[:stop])
            for slot in order:
                seen[slot] = HASH_MASK
            for slot in order:
                total += float(law(seen)[slot, text[slot]]) / len(orders)
                seen[slot] = text[slot]
    return total


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8])
def test_every_set_of_every_block_is_every_order(request_: Request, block_size: int) -> None:
    """Prompts may end inside a block."""
    (found,) = scored([request_], block_size)
    assert found.log_prob == pytest.approx(bound_by_orders(request_, block_size), rel=1e-12)
    assert found.standard_error == 0


def test_blocks_of_one_token_are_the_chain_rule_in_one_pass() -> None:
    for request, found in zip(REQUESTS, scored(REQUESTS, 1, MaskDraws(1)), strict=True):
        tokens, total = list(request.prompt), 0.0
        for token in request.answer:
            total += float(law([*tokens, HASH_MASK])[-1, token])
            tokens.append(token)
        assert found.log_prob == pytest.approx(total, rel=1e-12)
        assert (found.standard_error, found.num_samples) == (0, 1)


def test_with_exact_conditionals_every_block_size_gives_the_likelihood() -> None:
    joint = random_joint(4)
    exact = table_model(joint, 4)

    def function(tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return exact(tokens.masked_fill(~real, MASK), torch.ones_like(real))

    table = joint.reshape(3, 3, 3, 3)
    for text in texts(4)[::7].tolist():
        request = Request(tuple(text[:1]), tuple(text[1:]))
        expected = math.log(float(table[tuple(text)] / table[text[0]].sum()))
        for block_size in (1, 2, 3, 4):
            (found,) = scored([request], block_size, function=function)
            assert found.log_prob == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("block_size", [2, 3])
def test_drawn_sets_agree_with_all_of_them_within_their_errors(block_size: int) -> None:
    request = REQUESTS[1]
    exact = scored([request], block_size)[0].log_prob
    found = [scored([request], block_size, MaskDraws(12, "never", seed))[0] for seed in range(150)]
    errors = torch.tensor([one.log_prob - exact for one in found])
    stated = torch.tensor([one.standard_error for one in found])
    assert abs(float(errors.mean())) < 3 * float(errors.std()) / math.sqrt(len(errors))
    ratio = float(stated.square().mean() / errors.square().mean())
    assert 0.8 < ratio < 2.5  # on the safe side: a step between two sizes counts as noise


def test_one_block_is_masked_diffusion() -> None:
    reader = Counted(hash_model(), (HASH_MASK,)).reader
    for draws in (ALL, NEVER):
        masked = score_diffusion(
            reader, REQUESTS, MaskBound(HASH_MASK), draws=draws, batch_size=8, with_greedy=True
        )
        found = scored(REQUESTS, 50, draws, with_greedy=True)
        for one, other in zip(masked, found, strict=True):
            assert one.log_prob == pytest.approx(other.log_prob, rel=1e-12)
            assert one.standard_error == pytest.approx(other.standard_error, rel=1e-9)
            assert (one.num_samples, one.is_greedy) == (other.num_samples, other.is_greedy)


def test_sets_are_enumerated_where_the_longest_block_allows_it() -> None:
    found = scored(REQUESTS, 3, MaskDraws(7))
    assert [one.num_samples for one in found] == [3, 7, 7, 3]
    assert all(one.standard_error == 0 for one in found)
    assert [one.num_samples for one in scored(REQUESTS, 3, MaskDraws(6))] == [3, 6, 6, 3]


def test_a_likelihood_does_not_depend_on_its_batch() -> None:
    alone = [scored([request], 3, NEVER, batch_size=1)[0] for request in REQUESTS]
    together = scored([*REQUESTS, REQUESTS[0]], 3, NEVER, batch_size=5)
    for one, other in zip([*alone, alone[0]], together, strict=True):
        assert other.log_prob == pytest.approx(one.log_prob, rel=1e-12)


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_greedy_answers_are_recognised(block_size: int) -> None:
    """The surest of the leftmost block that is not complete; behind it nothing is seen."""
    prompt, length = (1, 2), 5
    text = [*prompt, *[HASH_MASK] * length]
    while HASH_MASK in text:
        stop = min(len(text), (text.index(HASH_MASK) // block_size + 1) * block_size)
        laws = law(text[:stop])[:, :HASH_MASK].log_softmax(1)
        hidden = [slot for slot in range(stop) if text[slot] == HASH_MASK]
        slot = max(hidden, key=lambda slot: float(laws[slot].max()))
        text[slot] = int(laws[slot].argmax())
    answer = tuple(text[2:])
    others = [(*answer[:i], (answer[i] + 1) % 6, *answer[i + 1 :]) for i in range(length)]
    requests = [Request(prompt, words) for words in [others[0], answer, *others[1:]]]
    found = scored(requests, block_size, MaskDraws(2), with_greedy=True)
    assert [one.is_greedy for one in found] == [False, True, *[False] * (length - 1)]
