"""Samplers against exact laws of tiny models that are known tables."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
import torch
from scipy import stats

from megatron_dlm.generation import samplers
from megatron_dlm.generation.samplers import sample_autoregressive, sample_masked

V, MASK, ROWS = 3, 3, 20_000  # tokens 0..2 and the mask
JOINT = torch.tensor(
    [[0.30, 0.05, 0.05], [0.02, 0.20, 0.08], [0.10, 0.05, 0.15]], dtype=torch.float64
)


def empty(rows: int = ROWS, width: int = 0) -> torch.Tensor:
    return torch.zeros(rows, width, dtype=torch.int64)


def exact_masked(tokens: torch.Tensor) -> torch.Tensor:
    """The exact denoiser of JOINT over two slots; the mask gets the highest logit, as a trap."""
    first, second = tokens[:, 0], tokens[:, 1]
    marginal_1, marginal_2 = JOINT.sum(1), JOINT.sum(0)
    given_2 = (JOINT / marginal_2).T[second.clamp(max=V - 1)]  # [b, V]: slot 1 given slot 2
    given_1 = (JOINT / marginal_1[:, None])[first.clamp(max=V - 1)]
    slot_1 = torch.where((second == MASK)[:, None], marginal_1, given_2)
    slot_2 = torch.where((first == MASK)[:, None], marginal_2, given_1)
    logits = torch.full((len(tokens), 2, V + 1), 5.0, dtype=torch.float64)
    logits[:, 0, :V], logits[:, 1, :V] = slot_1.log(), slot_2.log()
    return logits


def p_value(samples: torch.Tensor, law: torch.Tensor) -> float:
    """Chi-square test of pairs int64 [n, 2] against law [V, V]."""
    seen = torch.bincount(samples[:, 0] * V + samples[:, 1], minlength=V * V)
    return float(stats.chisquare(seen.numpy(), law.flatten().numpy() * len(samples)).pvalue)


@pytest.mark.parametrize("num_steps", [1, 3, 500])
def test_ancestral_sampling_has_the_exact_law(num_steps):
    samples = sample_masked(
        exact_masked, empty(), num_tokens=2, num_steps=num_steps, mask_id=MASK, seed=1
    )
    # Both slots are revealed in the same step, hence independently, with probability 1 / num_steps.
    independent = torch.outer(JOINT.sum(1), JOINT.sum(0))
    law = independent / num_steps + JOINT * (1 - 1 / num_steps)
    assert p_value(samples, law) > 1e-3
    if num_steps == 500:
        assert p_value(samples, JOINT) > 1e-3
        assert p_value(samples, independent) < 1e-6  # the test can tell the difference


@pytest.mark.parametrize("num_steps", [2, 5])
def test_random_order_reveals_one_at_a_time_and_has_the_joint_law(num_steps):
    samples = sample_masked(
        exact_masked, empty(), num_tokens=2, num_steps=num_steps, mask_id=MASK, order="random"
    )
    assert p_value(samples, JOINT) > 1e-3


def chain(tokens: torch.Tensor) -> torch.Tensor:
    """Autoregressive model of JOINT after one start token: slot 0 predicts token 1 and so on."""
    logits = torch.zeros(*tokens.shape, V + 1, dtype=torch.float64)
    logits[:, 0, :V] = JOINT.sum(1).log()
    if tokens.shape[1] > 1:
        logits[:, 1, :V] = (JOINT / JOINT.sum(1, keepdim=True))[tokens[:, 1]].log()
    return logits


def test_autoregressive_sampling_has_the_joint_law():
    samples = sample_autoregressive(
        chain, empty(width=1), num_tokens=2, forbidden_ids=[MASK], seed=3
    )
    assert p_value(samples[:, 1:], JOINT) > 1e-3


def test_temperature_sharpens_the_law():
    samples = sample_autoregressive(
        chain, empty(width=1), num_tokens=2, temperature=0.5, forbidden_ids=[MASK]
    )
    first = JOINT.sum(1) ** 2
    second = JOINT**2 / (JOINT**2).sum(1, keepdim=True)
    assert p_value(samples[:, 1:], (first / first.sum())[:, None] * second) > 1e-3


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"top_k": 2}, [0, 2]),
        ({"top_p": 0.5}, [0, 2]),
        ({"top_p": 0.39}, [0]),
        ({"top_p": 1.0}, [0, 1, 2]),
        ({"top_k": 2, "top_p": 0.55}, [0]),  # 0.4 / 0.7 reaches 0.55 alone
        ({"top_k": 1}, [0]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(limits, kept):
    marginal = torch.tensor([0.4, 0.3 - 1e-9, 0.3 + 1e-9], dtype=torch.float64)

    def model(tokens):
        return marginal.log().expand(*tokens.shape, V)

    drawn = sample_autoregressive(model, empty(width=1), num_tokens=1, **limits)[:, 1]
    seen = torch.bincount(drawn, minlength=V).double()
    expected = torch.zeros(V).double()
    expected[kept] = marginal[kept] / marginal[kept].sum() * ROWS
    assert (seen[expected == 0] == 0).all()
    assert (
        stats.chisquare(seen[kept].numpy(), expected[kept].numpy()).pvalue > 1e-3 or len(kept) == 1
    )


def random_model(tokens: torch.Tensor) -> torch.Tensor:
    """Logits that depend on everything in the row: a hash as a model."""
    state = (tokens * torch.arange(1, tokens.shape[1] + 1)).sum(1, keepdim=True)
    slots = torch.arange(tokens.shape[1])[None, :, None]
    ids = torch.arange(10)[None, None, :]
    return torch.sin((state[:, :, None] + 7 * slots + 3 * ids * (slots + 1)).float()) * 3


ORDERS = ["ancestral", "low_confidence", "random"]
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 1], [2, 2, 2]])
MASKED = {"num_tokens": 6, "num_steps": 4, "mask_id": 9, "forbidden_ids": [0]}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 4, 6, 50])
@pytest.mark.parametrize("order", ORDERS)
def test_prompts_stay_and_everything_is_filled_with_text(order, num_steps, temperature):
    arguments = {**MASKED, "num_steps": num_steps, "order": order, "temperature": temperature}
    samples = sample_masked(random_model, PROMPT, **arguments)
    assert samples.shape == (4, 9)
    assert torch.equal(samples[:, :3], PROMPT)
    assert not torch.isin(samples[:, 3:], torch.tensor([0, 9])).any()


@pytest.mark.parametrize("order", [*ORDERS, "autoregressive"])
def test_a_row_depends_on_its_id_and_seed_only(order):
    def sample(prompt, **changes):
        if order == "autoregressive":
            return sample_autoregressive(random_model, prompt, num_tokens=6, **changes)
        return sample_masked(random_model, prompt, order=order, **MASKED, **changes)

    whole = sample(PROMPT, seed=5)
    assert torch.equal(whole, sample(PROMPT, seed=5))
    assert not torch.equal(whole, sample(PROMPT, seed=6))
    assert torch.equal(whole[[2, 0]], sample(PROMPT[[2, 0]], seed=5, row_ids=torch.tensor([2, 0])))
    twins = sample(PROMPT[[0, 0, 0, 0]], seed=5)
    assert len(twins.unique(dim=0)) > 1  # equal prompts, different rows, different text


def test_greedy_low_confidence_reveals_the_surest_first():
    """Slot 2 is the surest, then 0, then 1; every reveal changes what the others would say."""
    calls = []

    def model(tokens):
        calls.append(tokens.clone())
        logits = torch.zeros(1, 3, 5)
        num_known = int((tokens != 4).sum())
        for slot, sureness in enumerate([2.0, 1.0, 3.0]):
            logits[0, slot, num_known] = sureness
        return logits

    samples = sample_masked(
        model, empty(1), num_tokens=3, num_steps=3, mask_id=4, order="low_confidence", temperature=0
    )
    assert samples.tolist() == [[1, 2, 0]]
    assert [call.tolist()[0] for call in calls] == [[4, 4, 4], [4, 4, 0], [1, 4, 0]]


def test_steps_that_reveal_nothing_cost_nothing():
    for order, most in [("ancestral", 6), ("low_confidence", 6), ("random", 6)]:
        calls = []

        def model(tokens, calls=calls):
            calls.append(1)
            return random_model(tokens)

        sample_masked(model, PROMPT[:1], **{**MASKED, "num_steps": 1000}, order=order)
        assert len(calls) <= most


def test_fewer_steps_than_tokens_share_them_evenly():
    known = []

    def model(tokens):
        known.append(int((tokens[0] != 9).sum()))
        return random_model(tokens)

    sample_masked(model, PROMPT[:1], **{**MASKED, "num_tokens": 7, "num_steps": 3}, order="random")
    assert known == [3, 5, 7]


def test_after_the_end_comes_only_the_end():
    def model(tokens):  # row 0 ends at once, row 1 after one token; both go on talking
        ends = torch.tensor([tokens.shape[1] == 1, tokens.shape[1] == 2])
        return torch.nn.functional.one_hot(2 - ends.long(), 3)[:, None] * 100.0

    samples = sample_autoregressive(model, empty(2, width=1), num_tokens=5, eos_id=1)
    assert samples.tolist() == [[0, 1, 1, 1, 1, 1], [0, 2, 1, 1, 1, 1]]


def test_the_denoiser_output_is_not_touched():
    table = torch.zeros(2, 3, 4, dtype=torch.float64)
    sample_autoregressive(lambda tokens: table, empty(2, 1), num_tokens=2, forbidden_ids=[1])
    sample_masked(lambda tokens: table, empty(2, 1), num_tokens=2, num_steps=2, mask_id=3)
    assert (table == 0).all()


def test_noise_is_uniform_and_independent_of_the_step_and_purpose():
    rows = torch.arange(300)[:, None].expand(300, 200)
    positions = torch.arange(200).expand(300, 200)
    draws = torch.stack(
        [
            samplers._uniform(s, p, rows, positions, k)
            for s, p, k in itertools.product((0, 1), repeat=3)
        ]
    ).flatten(1)
    for draw in draws:
        assert stats.kstest(draw.numpy(), "uniform").pvalue > 1e-3
    correlation = torch.corrcoef(draws) - torch.eye(8)
    assert correlation.abs().max() < 5 / draws.shape[1] ** 0.5


def test_bad_input_is_named():
    cases = [
        (lambda: sample_autoregressive(chain, empty(1), num_tokens=1), "empty"),
        (lambda: sample_autoregressive(chain, PROMPT.float(), num_tokens=1), "int64"),
        (lambda: sample_autoregressive(chain, PROMPT, num_tokens=-1), "num_tokens"),
        (lambda: sample_autoregressive(chain, PROMPT, num_tokens=1, top_p=0), "top_p"),
        (lambda: sample_autoregressive(chain, PROMPT, num_tokens=1, top_k=0), "top_k"),
        (lambda: sample_autoregressive(chain, PROMPT, num_tokens=1, temperature=-1), "temperature"),
        (
            lambda: sample_autoregressive(chain, PROMPT, num_tokens=1, row_ids=torch.arange(3)),
            "3 entries for 4",
        ),
        (lambda: sample_masked(chain, PROMPT, **{**MASKED, "num_steps": 0}), "num_steps"),
        (lambda: sample_masked(chain, PROMPT, **MASKED, order="best"), "order"),
    ]
    for call, word in cases:
        with pytest.raises(ValueError, match=word):
            call()


def test_the_file_needs_only_torch():
    tree = ast.parse(Path(samplers.__file__).read_text())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"__future__", "collections", "dataclasses", "torch", "typing"}
