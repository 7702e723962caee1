"""The autoregressive sampler and what all samplers share, against exact laws of tiny models."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
import torch
from exact_models import MASK, Toy, autoregressive_model, hash_model, p_value, random_joint, words
from scipy import stats

from megatron_dlm.generation import (
    block_samplers,
    hybrid_noise,
    hybrid_samplers,
    masked_samplers,
    samplers,
)
from megatron_dlm.generation.samplers import TokenChoice, draw_from, sample_autoregressive, uniform

ROWS = 20_000
TEXT_ONLY = TokenChoice(forbidden_ids=(MASK,))
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 1], [2, 2, 2]])


def starts(rows: int = ROWS) -> torch.Tensor:
    """A start token per row."""
    return torch.zeros(rows, 1, dtype=torch.int64)


@pytest.mark.parametrize("cache", ["exact", "none"])
def test_autoregressive_sampling_has_the_joint_law(cache):
    joint = random_joint(3)
    model = Toy(autoregressive_model(joint, 3))
    samples = sample_autoregressive(
        model, starts(), num_tokens=3, choice=TEXT_ONLY, cache=cache, seed=3
    )
    assert p_value(samples.tokens[:, 1:], joint) > 1e-3
    assert p_value(samples.tokens[:, 1:], random_joint(3, seed=1)) < 1e-6  # it can tell laws apart
    assert model.slots == ([[0], [0, 1], [0, 1, 2]] if cache == "none" else [[0], [1], [2]])
    assert (samples.num_evaluations == 3).all()
    assert (samples.num_new == 3).all()


def test_the_cache_changes_nothing():
    for temperature in (0.0, 1.0):
        cached, plain = (
            sample_autoregressive(
                Toy(hash_model(is_causal=True)),
                PROMPT,
                num_tokens=8,
                choice=TokenChoice(temperature),
                valid=torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]]).bool(),
                cache=cache,
            )
            for cache in ("exact", "none")
        )
        assert torch.equal(cached.tokens, plain.tokens)


def test_temperature_sharpens_the_law():
    joint = random_joint(2)
    choice = TokenChoice(temperature=0.5, forbidden_ids=(MASK,))
    model = Toy(autoregressive_model(joint, 2))
    samples = sample_autoregressive(model, starts(), num_tokens=2, choice=choice)
    table = joint.reshape(3, 3)
    first = table.sum(1) ** 2
    second = table**2 / (table**2).sum(1, keepdim=True)
    law = (first / first.sum())[:, None] * second
    assert p_value(samples.tokens[:, 1:], law.flatten()) > 1e-3


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"top_k": 2}, [0, 2]),
        ({"top_p": 0.5}, [0, 2]),
        ({"top_p": 0.39}, [0]),
        ({"top_p": 1.0}, [0, 1, 2]),
        ({"top_k": 2, "top_p": 0.55}, [0]),  # 0.4 / 0.7 reaches 0.55 alone
        ({"top_k": 1}, [0]),
        ({"temperature": 0.0}, [0]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(limits, kept):
    marginal = torch.tensor([0.4, 0.3 - 1e-9, 0.3 + 1e-9], dtype=torch.float64)
    model = Toy(lambda tokens, real: marginal.log().expand(*tokens.shape, 3))
    samples = sample_autoregressive(model, starts(), num_tokens=1, choice=TokenChoice(**limits))
    law = torch.zeros(3).double()
    law[kept] = marginal[kept] / marginal[kept].sum()
    assert p_value(samples.tokens[:, 1:], law) > 1e-3 or len(kept) == 1


@pytest.mark.parametrize(
    "choice",
    [
        TokenChoice(),
        TokenChoice(0.5),
        TokenChoice(top_k=3),
        TokenChoice(top_p=0.6, forbidden_ids=(1,)),
        TokenChoice(0.0),
    ],
    ids=str,
)
def test_the_law_is_that_of_the_draws(choice):
    logits = torch.tensor([[0.1, 1.0, 0.7, -0.5, 0.9]], dtype=torch.float64)
    allowed = choice.allowed(logits)
    law = choice.law(allowed)
    assert float(law.sum()) == pytest.approx(1)
    # Evenly spaced numbers hit every token in its share, to the spacing.
    numbers = (torch.arange(10_000).double() + 0.5) / 10_000
    drawn = choice.draw(allowed.expand(10_000, -1), numbers)
    shares = torch.bincount(drawn, minlength=5) / 10_000
    assert float((shares - law[0]).abs().max()) < 2e-4
    assert torch.equal(draw_from(law.expand(10_000, -1), numbers), drawn)


def test_a_row_depends_on_its_id_and_seed_only():
    def sample(prompt, **changes):
        model = Toy(hash_model(is_causal=True))
        return sample_autoregressive(model, prompt, num_tokens=6, **changes).tokens

    whole = sample(PROMPT, seed=5)
    assert torch.equal(whole, sample(PROMPT, seed=5))
    assert not torch.equal(whole, sample(PROMPT, seed=6))
    assert torch.equal(whole[[2, 0]], sample(PROMPT[[2, 0]], seed=5, row_ids=torch.tensor([2, 0])))
    twins = sample(PROMPT[[0, 0, 0, 0]], seed=5)
    assert len(twins.unique(dim=0)) > 1  # equal prompts, different rows, different text


@pytest.mark.parametrize("cache", ["exact", "none"])
def test_padding_on_the_left_changes_nothing(cache):
    padded = torch.tensor([[9, 9, 4, 5], [1, 2, 3, 4], [9, 9, 9, 7]])
    valid = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()

    def sample(prompt, **changes):
        model = Toy(hash_model(is_causal=True))
        return sample_autoregressive(model, prompt, num_tokens=5, cache=cache, **changes).tokens

    together = sample(padded, valid=valid)
    for row, real in enumerate(valid):
        alone = sample(padded[row : row + 1, real], row_ids=torch.tensor([row]))
        assert torch.equal(together[row, 4:], alone[0, int(real.sum()) :])


def test_after_the_end_comes_only_the_end():
    def logits(tokens, real):  # row 0 ends at once, row 1 after one token; both go on talking
        end_at = torch.tensor([[0], [1]])
        ends = torch.arange(tokens.shape[1]) == end_at
        return torch.nn.functional.one_hot(2 - ends.long(), 3) * 100.0

    seen = []
    samples = sample_autoregressive(
        Toy(logits), starts(2), num_tokens=5, eos_id=1, watch=seen.append
    )
    assert samples.tokens.tolist() == [[0, 1, 1, 1, 1, 1], [0, 2, 1, 1, 1, 1]]
    assert samples.num_new.tolist() == [0, 1]
    assert samples.num_evaluations.tolist() == [1, 2]
    assert [tokens.tolist() for tokens in seen] == [[[0, 1], [0, 2]], [[0, 1, 1], [0, 2, 1]]]


def test_the_denoiser_output_is_not_touched():
    table = torch.zeros(2, 3, 4, dtype=torch.float64)
    choice = TokenChoice(forbidden_ids=(1,))
    model = Toy(lambda tokens, real: table[:, : tokens.shape[1]])
    sample_autoregressive(model, starts(2), num_tokens=2, choice=choice, cache="none")
    masked_samplers.sample_masked(model, starts(2), num_tokens=2, mask_id=3, choice=choice)
    assert (table == 0).all()


def test_noise_is_uniform_and_independent_of_the_step_and_purpose():
    rows = torch.arange(300)[:, None].expand(300, 200)
    positions = torch.arange(200).expand(300, 200)
    draws = torch.stack(
        [
            uniform(seed, purpose, rows, positions, step)
            for seed, purpose, step in itertools.product((0, 1), repeat=3)
        ]
    ).flatten(1)
    for draw in draws:
        assert stats.kstest(draw.numpy(), "uniform").pvalue > 1e-3
    correlation = torch.corrcoef(draws) - torch.eye(8)
    assert correlation.abs().max() < 5 / draws.shape[1] ** 0.5


def test_the_order_of_words_is_that_of_the_chi_square_test():
    assert words(2).tolist()[:4] == [[0, 0], [0, 1], [0, 2], [1, 0]]


def test_bad_input_is_named():
    model = Toy(hash_model(is_causal=True))

    def sample(prompt=PROMPT, num_tokens=1, **changes):
        return lambda: sample_autoregressive(model, prompt, num_tokens=num_tokens, **changes)

    all_false, right = torch.zeros(4, 3).bool(), torch.tensor([1, 1, 0]).expand(4, 3).bool()
    broken = Toy(lambda tokens, real: torch.full((*tokens.shape, 3), float("nan")))
    cases = [
        (sample(PROMPT[:, :0]), "a prompt is empty"),
        (sample(valid=all_false), "a prompt is empty"),
        (sample(valid=right), "padding on its right"),
        (sample(valid=right[:, :2]), r"valid is \[4, 2\]"),
        (sample(PROMPT.float()), "int64"),
        (sample(PROMPT[:0]), "nothing to sample"),
        (sample(num_tokens=-1), "num_tokens is -1"),
        (sample(cache="dual"), "exact and none"),
        (sample(row_ids=torch.arange(3)), "3 entries for 4"),
        (lambda: TokenChoice(top_p=0), "top_p"),
        (lambda: TokenChoice(top_k=0), "top_k"),
        (lambda: TokenChoice(temperature=-1), "temperature"),
        (lambda: TokenChoice(temperature=float("nan")), "temperature"),
        (lambda: sample_autoregressive(broken, PROMPT, num_tokens=1), "not finite"),
        (sample(choice=TokenChoice(forbidden_ids=tuple(range(10)))), "every token is forbidden"),
    ]
    for call, words_of_message in cases:
        with pytest.raises(ValueError, match=words_of_message):
            call()


def test_the_files_need_only_torch_and_each_other():
    shipped = (samplers, masked_samplers, block_samplers, hybrid_noise, hybrid_samplers)
    standard = {"__future__", "collections", "dataclasses", "functools", "itertools", "math",
                "typing"}  # fmt: skip
    for module in shipped:
        imported = set()
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
        own = {other.__name__ for other in shipped}
        assert {name.partition(".")[0] for name in imported - own} - standard == {"torch"}
