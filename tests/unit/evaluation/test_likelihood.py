"""Likelihoods against enumeration, closed forms and each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from toy_readers import MASK, Counted, hash_model, random_joint, table_model, texts

from megatron_dlm.evaluation.estimates import MaskDraws, Request, stratified_standard_error
from megatron_dlm.evaluation.likelihood import score_autoregressive, score_diffusion
from megatron_dlm.evaluation.mask_bound import MaskBound, draw_sets
from megatron_dlm.objectives.masked import mask_by_count

HASH_MASK = 6
REQUESTS = [
    Request((1, 2, 3), (4, 5)),
    Request((2,), (0, 1, 2, 3, 4, 5)),
    Request((), (5, 5, 1)),
    Request((5, 4, 3, 2, 1), (2,)),
]
ALL = MaskDraws(enumerate_masks="always")


def masked(requests, draws, *, function=None, scale=3.0, batch_size=16, **options):
    reader = Counted(function or hash_model(scale=scale), () if function else (HASH_MASK,)).reader
    mask_id = MASK if function else HASH_MASK
    bound = MaskBound(mask_id)
    return score_diffusion(reader, requests, bound, draws=draws, batch_size=batch_size, **options)


def bound_by_orders(request: Request) -> float:
    """Mean over all orders of the chain rule, one token at a time."""
    function = hash_model()
    length, totals = len(request.answer), []
    for order in itertools.permutations(range(length)):
        answer, total = [HASH_MASK] * length, 0.0
        for slot in order:
            tokens = torch.tensor([[*request.prompt, *answer]])
            logits = function(tokens, torch.ones_like(tokens, dtype=torch.bool))
            law = torch.log_softmax(logits[0, len(request.prompt) + slot], dim=0)
            total += float(law[request.answer[slot]])
            answer[slot] = request.answer[slot]
        totals.append(total)
    return sum(totals) / len(totals)


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_every_set_is_every_order(request_):
    (found,) = masked([request_], ALL)
    assert found.log_prob == pytest.approx(bound_by_orders(request_), rel=1e-12)
    assert found.standard_error == 0
    assert found.num_samples == 2 ** len(request_.answer) - 1


def test_with_exact_conditionals_the_bound_is_the_likelihood():
    joint = random_joint(4)
    for text in texts(4)[::5].tolist():
        prompt, answer = tuple(text[:1]), tuple(text[1:])
        table = joint.reshape(3, 3, 3, 3)
        exact = math.log(float(table[tuple(text)] / table[text[0]].sum()))
        (found,) = masked([Request(prompt, answer)], ALL, function=table_model(joint, 4))
        assert found.log_prob == pytest.approx(exact, rel=1e-12)


def test_drawn_sets_agree_with_all_of_them_within_their_errors():
    """Over many seeds: no bias, and the stated errors are those that are seen."""
    request = REQUESTS[1]
    exact = masked([request], ALL)[0].log_prob
    for num_samples in (4, 16):
        found = [masked([request], MaskDraws(num_samples, "never", seed))[0] for seed in range(150)]
        errors = torch.tensor([one.log_prob - exact for one in found])
        stated = torch.tensor([one.standard_error for one in found])
        assert abs(float(errors.mean())) < 3 * float(errors.std()) / math.sqrt(len(errors))
        ratio = float(stated.square().mean() / errors.square().mean())
        assert 0.8 < ratio < 1.6  # on the safe side at worst
        # Few samples know their own spread badly: the law has longer tails than the normal one.
        share = float((errors.abs() < 3 * stated).double().mean())
        assert share > (0.8 if num_samples == 4 else 0.96)
    (one,) = masked([request], MaskDraws(128, "never"))
    assert abs(one.log_prob - exact) < 3 * one.standard_error


def test_spread_sizes_are_no_worse_than_independent_ones():
    """Variance of the estimate over seeds, with sizes spread evenly and drawn one by one."""
    length, num_samples = 6, 6
    function, answer = hash_model(scale=6.0), torch.tensor(REQUESTS[1].answer)
    valid = torch.ones(length, dtype=torch.bool)

    def estimate(sets, weights):
        tokens = answer.masked_fill(sets, HASH_MASK)
        logits = function(tokens, torch.ones_like(sets))
        said = torch.log_softmax(logits, 2).gather(2, answer.expand_as(tokens)[..., None])[..., 0]
        return float((said * sets * weights).sum(1).mean())

    generator = torch.Generator().manual_seed(3)
    spread, independent = [], []
    for seed in range(300):
        sets, weights, _ = draw_sets(torch.tensor(7), valid, num_samples=num_samples, seed=seed)
        spread.append(estimate(sets, weights))
        draw = torch.rand(num_samples, 1, dtype=torch.float64, generator=generator)
        bits = torch.randint(2**62, (num_samples, length), generator=generator)
        corruption = mask_by_count(draw, bits, valid.expand(num_samples, -1))
        independent.append(estimate(corruption.masked, corruption.elbo_weight))
    (exact,) = masked([Request((), REQUESTS[1].answer)], ALL, scale=6.0)
    for found in (torch.tensor(spread), torch.tensor(independent)):
        error = float(found.std()) / math.sqrt(len(found))
        assert abs(float(found.mean()) - exact.log_prob) < 3 * error
    assert torch.tensor(spread).var() < torch.tensor(independent).var()


def test_sizes_of_the_sets_are_even_and_their_places_uniform():
    valid = torch.tensor([True] * 5 + [False, True, True])
    counts, places = torch.zeros(8), torch.zeros(8)
    for seed in range(300):
        sets, weights, levels = draw_sets(torch.tensor(1), valid, num_samples=14, seed=seed)
        sizes = sets.sum(1)
        assert torch.bincount(sizes, minlength=8).tolist() == [0] + [2] * 7
        assert weights.shape == (14, 8)
        assert torch.allclose(weights * sizes[:, None], torch.tensor(7.0).double())
        assert torch.allclose(levels * 7, sizes.double())
        assert not bool(sets[:, 5].any())
        places += sets.double().sum(0)
        (size,) = draw_sets(torch.tensor(1), valid, num_samples=1, seed=seed)[0].sum(1).tolist()
        counts[size] += 1
    assert float(places[valid].std() / places[valid].mean()) < 0.05
    assert float(((counts[1:] - 300 / 7) ** 2 / (300 / 7)).sum()) < 22.5  # chi-square, p = 0.001


def test_the_standard_error_by_hand():
    assert stratified_standard_error(torch.tensor([1.0, 3.0, 2.0]).double()) == pytest.approx(
        math.sqrt((4 + 1) / (2 * 3 * 2))
    )
    assert math.isnan(stratified_standard_error(torch.tensor([1.0]).double()))
    assert stratified_standard_error(torch.full((5,), 2.0).double()) == 0


def test_an_answer_is_enumerated_where_that_costs_no_more():
    found = masked(REQUESTS, MaskDraws(7))
    assert [one.num_samples for one in found] == [3, 7, 7, 1]
    assert [one.standard_error == 0 for one in found] == [True, False, True, True]
    found = masked(REQUESTS, MaskDraws(7, "never"))
    assert [one.num_samples for one in found] == [7, 7, 7, 1]
    assert math.isnan(masked(REQUESTS[:1], MaskDraws(1, "never"))[0].standard_error)
    with pytest.raises(ValueError, match="17 tokens, 131071 sets"):
        masked([Request((), (1,) * 17)], ALL)
    with pytest.raises(ValueError, match="num_samples is 0"):
        MaskDraws(0)
    with pytest.raises(ValueError, match="enumerate_masks is 'often'"):
        MaskDraws(1, "often")


@pytest.mark.parametrize("kind", ["autoregressive", "masked"])
def test_a_likelihood_does_not_depend_on_its_batch(kind):
    requests = [request for request in REQUESTS if request.prompt]

    def scored(some, batch_size):
        if kind == "masked":
            return masked(some, MaskDraws(5), batch_size=batch_size, with_greedy=True)
        reader = Counted(hash_model(is_causal=True)).reader
        return score_autoregressive(reader, some, batch_size=batch_size)

    alone = [scored([request], 1)[0] for request in requests]
    together = scored([*requests, requests[0]], 3)
    for one, other in zip([*alone, alone[0]], together, strict=True):
        assert other.log_prob == pytest.approx(one.log_prob, rel=1e-12)
        assert other.standard_error == pytest.approx(one.standard_error, rel=1e-9)
        assert other.is_greedy == one.is_greedy
    other_seed = masked(requests, MaskDraws(5, seed=1))
    assert masked(requests, MaskDraws(5))[1].log_prob != other_seed[1].log_prob


def test_autoregressive_is_the_chain_rule():
    function = hash_model(is_causal=True)
    requests = [request for request in REQUESTS if request.prompt]
    for request, found in zip(
        requests,
        score_autoregressive(Counted(function).reader, requests, batch_size=2),
        strict=True,
    ):
        tokens, expected = list(request.prompt), 0.0
        for token in request.answer:
            row = torch.tensor([tokens])
            logits = function(row, torch.ones_like(row, dtype=torch.bool))[0, -1]
            expected += float(torch.log_softmax(logits, dim=0)[token])
            tokens.append(token)
        assert found.log_prob == pytest.approx(expected, rel=1e-12)
        assert (found.standard_error, found.num_samples) == (0, 1)


def test_options_of_one_token_share_their_passes():
    options = [Request((1, 2), (token,)) for token in range(4)]
    counted = Counted(hash_model())
    found = score_diffusion(counted.reader, options, MaskBound(HASH_MASK), batch_size=8)
    assert counted.shapes == [(1, 3)]
    assert len({one.log_prob for one in found}) == 4
    counted = Counted(hash_model(is_causal=True))
    score_autoregressive(counted.reader, options, batch_size=8)
    assert counted.shapes == [(1, 2)]


def test_greedy_answers_are_recognised():
    prompt, length = [1, 2], 4
    tokens, function = [*prompt, *[HASH_MASK] * length], hash_model()
    while HASH_MASK in tokens:  # the surest first, one per step; never the mask itself
        row = torch.tensor([tokens])
        logits = function(row, torch.ones_like(row, dtype=torch.bool))[0, :, :HASH_MASK]
        law = torch.softmax(logits, dim=1)
        hidden = [slot for slot, token in enumerate(tokens) if token == HASH_MASK]
        slot = max(hidden, key=lambda slot: float(law[slot].max()))
        tokens[slot] = int(law[slot].argmax())
    answer = tuple(tokens[2:])
    others = [
        (*answer[:slot], (answer[slot] + 1) % 6, *answer[slot + 1 :]) for slot in range(length)
    ]
    requests = [Request((1, 2), text) for text in [others[0], answer, *others[1:]]]
    found = masked(requests, MaskDraws(2), with_greedy=True)
    assert [one.is_greedy for one in found] == [False, True, False, False, False]
    function, tokens = hash_model(is_causal=True), list(prompt)
    for _ in range(length):
        row = torch.tensor([tokens])
        tokens.append(int(function(row, torch.ones_like(row, dtype=torch.bool))[0, -1].argmax()))
    requests = [
        Request((1, 2), tuple(tokens[2:])),
        Request((1, 2), (*tokens[2:5], (tokens[5] + 1) % 7)),
    ]
    found = score_autoregressive(Counted(function).reader, requests, batch_size=2)
    assert [one.is_greedy for one in found] == [True, False]
