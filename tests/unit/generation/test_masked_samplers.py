"""Samplers of masked diffusion, against exact laws of tiny models and against each other."""

from __future__ import annotations

import pytest
import torch
from exact_models import MASK, Toy, hash_model, masked_model, p_value, random_joint

from megatron_dlm.generation.masked_samplers import MaskedDecoding, sample_masked
from megatron_dlm.generation.samplers import TokenChoice

ROWS = 20_000
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 1], [2, 2, 2]])
HASH_MASK, FORBIDDEN, EOS = 9, 0, 5  # of the hash model
ORDERS = ["ancestral", "first_hitting", "random", "low_confidence", "top_margin", "entropy"]
DECODINGS = {
    **{order: MaskedDecoding(order) for order in ORDERS},
    "few steps": MaskedDecoding("low_confidence", num_steps=2),
    "blocks": MaskedDecoding("ancestral", num_steps=6, block_size=4),
    "threshold": MaskedDecoding("low_confidence", threshold=0.5),
    "guided": MaskedDecoding("entropy", guidance=0.7),
    "prompt cache": MaskedDecoding("low_confidence", cache="prompt"),
    "prefix cache": MaskedDecoding("random", block_size=3, cache="prefix"),
    "dual cache": MaskedDecoding("low_confidence", threshold=0.4, block_size=4, cache="dual"),
    "guided cache": MaskedDecoding("top_margin", block_size=3, guidance=1.0, cache="dual"),
}
each_decoding = pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)


def nothing(rows: int = ROWS) -> torch.Tensor:
    return torch.zeros(rows, 0, dtype=torch.int64)


def fill(decoding, prompt=PROMPT, num_tokens=8, **changes):
    choice = changes.pop("choice", TokenChoice(forbidden_ids=(FORBIDDEN,)))
    return sample_masked(
        changes.pop("model", None) or Toy(hash_model()),
        prompt,
        mask_id=HASH_MASK,
        num_tokens=num_tokens,
        decoding=decoding,
        choice=choice,
        **changes,
    )


@pytest.mark.parametrize("num_steps", [1, 3, 50])
def test_ancestral_sampling_has_the_exact_law(num_steps):
    joint = random_joint(2)
    model = Toy(masked_model(joint, 2))
    decoding = MaskedDecoding("ancestral", num_steps=num_steps)
    samples = sample_masked(
        model, nothing(), num_tokens=2, mask_id=MASK, decoding=decoding, seed=1
    ).tokens
    # Both slots are revealed in the same step, hence independently, with probability 1 / num_steps.
    table = joint.reshape(3, 3)
    independent = torch.outer(table.sum(1), table.sum(0)).flatten()
    assert p_value(samples, independent / num_steps + joint * (1 - 1 / num_steps)) > 1e-3
    if num_steps == 50:
        assert p_value(samples, independent) < 1e-6  # the test can tell the difference


@pytest.mark.parametrize(
    "decoding",
    [
        MaskedDecoding("first_hitting"),
        MaskedDecoding("random"),
        MaskedDecoding("random", num_steps=7),
        MaskedDecoding("ancestral", block_size=1),
        MaskedDecoding("random", block_size=2, cache="dual"),
    ],
    ids=str,
)
def test_one_token_at_a_time_has_the_joint_law(decoding):
    """Whatever the order, as long as the model is exact and the order does not look at the text."""
    joint = random_joint(3)
    model = Toy(masked_model(joint, 3))
    samples = sample_masked(model, nothing(), num_tokens=3, mask_id=MASK, decoding=decoding, seed=2)
    assert p_value(samples.tokens, joint) > 1e-3


def test_first_hitting_is_ancestral_sampling_with_many_steps_draw_by_draw():
    hitting = fill(MaskedDecoding("first_hitting"), num_tokens=6)
    ancestral = fill(MaskedDecoding("ancestral", num_steps=4096), num_tokens=6)
    assert torch.equal(hitting.tokens, ancestral.tokens)
    assert (hitting.num_evaluations == 6).all()
    assert (ancestral.num_evaluations == 6).all()
    coarse = fill(MaskedDecoding("ancestral", num_steps=2), num_tokens=6)
    assert not torch.equal(hitting.tokens, coarse.tokens)


def test_a_template_is_filled_with_the_conditional_law():
    joint = random_joint(3)
    template = torch.tensor([[MASK, 1, MASK]]).expand(ROWS, 3)
    samples = sample_masked(Toy(masked_model(joint, 3)), template, mask_id=MASK)
    conditional = joint.reshape(3, 3, 3).clone()
    conditional[:, [0, 2]] = 0
    assert p_value(samples.tokens, conditional.flatten()) > 1e-3
    assert (samples.num_new == 2).all()


def test_guidance_has_the_law_of_the_formula():
    joint, weight = random_joint(2), 1.5
    decoding = MaskedDecoding("first_hitting", guidance=weight)
    samples = sample_masked(
        Toy(masked_model(joint, 2)),
        torch.ones(ROWS, 1, dtype=torch.int64),
        num_tokens=1,
        mask_id=MASK,
        decoding=decoding,
    )
    table = joint.reshape(3, 3)
    conditional, free = table[1] / table[1].sum(), table.sum(0)
    law = conditional ** (1 + weight) / free**weight
    assert p_value(samples.tokens[:, 1:], law / law.sum()) > 1e-3
    assert (samples.num_evaluations == 2).all()


def test_guidance_hides_the_prompt_alone():
    model = Toy(hash_model())
    fill(MaskedDecoding("random", guidance=1.0), PROMPT[:1], num_tokens=3, model=model)
    for call, num_known in zip(model.calls, (0, 1, 2), strict=True):
        conditional, free = call
        assert (free[:3] == HASH_MASK).all()
        assert torch.equal(conditional[3:], free[3:])
        assert int((free != HASH_MASK).sum()) == num_known


def test_a_token_that_was_not_kept_is_drawn_anew():
    """Slot 0 waits if it drew its unlikely token (0.1), and rarely draws it again: 0.01."""
    samples = sample_masked(
        fixed([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0]]),
        nothing(),
        num_tokens=2,
        mask_id=MASK,
        decoding=MaskedDecoding("low_confidence"),
    )
    law = torch.outer(torch.tensor([0.99, 0.01, 0.0]), torch.tensor([0.6, 0.4, 0.0]))
    assert p_value(samples.tokens, law.double().flatten()) > 1e-3


@each_decoding
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_prompts_stay_and_everything_is_filled_with_text(decoding, temperature):
    choice = TokenChoice(temperature, forbidden_ids=(FORBIDDEN,))
    samples = fill(decoding, choice=choice).tokens
    assert samples.shape == (4, 11)
    assert torch.equal(samples[:, :3], PROMPT)
    assert not torch.isin(samples[:, 3:], torch.tensor([FORBIDDEN, HASH_MASK])).any()


@each_decoding
def test_a_row_depends_on_its_id_and_seed_only(decoding):
    whole = fill(decoding, seed=5)
    again = fill(decoding, PROMPT[[2, 0]], seed=5, row_ids=torch.tensor([2, 0]))
    assert torch.equal(whole.tokens, fill(decoding, seed=5).tokens)
    assert not torch.equal(whole.tokens, fill(decoding, seed=6).tokens)
    assert torch.equal(whole.tokens[[2, 0]], again.tokens)
    assert torch.equal(whole.num_evaluations[[2, 0]], again.num_evaluations)
    twins = fill(decoding, PROMPT[[0, 0, 0, 0]], seed=5).tokens
    assert len(twins.unique(dim=0)) > 1  # equal prompts, different rows, different text


@each_decoding
@pytest.mark.parametrize("eos_id", [None, EOS])
def test_prompts_of_different_lengths_in_one_batch(decoding, eos_id):
    valid = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1], [0, 0, 0]]).bool()
    together = fill(decoding, valid=valid, eos_id=eos_id, seed=3)
    for row, real in enumerate(valid):
        prompt, row_ids = PROMPT[row : row + 1, real], torch.tensor([row])
        alone = fill(decoding, prompt, eos_id=eos_id, seed=3, row_ids=row_ids)
        assert torch.equal(together.tokens[row, 3:], alone.tokens[0, int(real.sum()) :])
        assert together.num_evaluations[row] == alone.num_evaluations[0]
        assert together.num_new[row] == alone.num_new[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cache", ["exact", "prompt", "prefix", "dual"])
def test_a_cache_with_nothing_to_forget_changes_nothing(order, cache):
    """The toy's keys and values are its tokens, so only a wrong slot could make a difference."""
    plain = fill(MaskedDecoding(order, block_size=3), eos_id=EOS)
    cached = fill(MaskedDecoding(order, block_size=3, cache=cache), eos_id=EOS)
    assert torch.equal(plain.tokens, cached.tokens)
    assert torch.equal(plain.num_evaluations, cached.num_evaluations)


@pytest.mark.parametrize(
    ("cache", "later"),
    [
        ("none", [[0, 7], [0, 7]]),
        ("prompt", [[2, 7], [2, 7]]),
        ("prefix", [[2, 7], [5, 7]]),
        ("dual", [[2, 5], [5, 7]]),
    ],
)
def test_what_a_cache_computes_again(cache, later):
    """Five masks in blocks of three, one token per step, behind a prompt of two."""
    model = Toy(hash_model())
    decoding = MaskedDecoding("random", block_size=3, cache=cache)
    fill(decoding, PROMPT[:, :2], num_tokens=5, model=model)
    everything, (first, second) = [0, 7], later
    block_start = second if cache == "prompt" else everything
    expected = [everything, first, first, block_start, second]
    assert model.slots == [list(range(*ends)) for ends in expected]


def slots_known(model: Toy) -> list[list[int]]:
    """Slots without mask in row 0 of every call."""
    return [(call[0] != HASH_MASK).nonzero()[:, 0].tolist() for call in model.calls]


def test_blocks_are_filled_from_the_left():
    model = Toy(hash_model())
    fill(MaskedDecoding("random", block_size=2), PROMPT[:1], num_tokens=5, model=model)
    known = slots_known(model)
    assert known[0] == [0, 1, 2]
    assert known[2] == [0, 1, 2, 3, 4]
    assert known[4] == [0, 1, 2, 3, 4, 5, 6]
    assert len(known) == 5


@pytest.mark.parametrize("order", ["random", "low_confidence", "top_margin", "entropy"])
def test_steps_share_the_tokens_evenly(order):
    for num_steps, block_size, known in [
        (3, None, [0, 2, 4]),
        (4, 4, [0, 2, 4, 5]),
        (7, None, [*range(7)]),
    ]:
        model = Toy(hash_model())
        decoding = MaskedDecoding(order, num_steps=num_steps, block_size=block_size)
        samples = fill(decoding, PROMPT[:1], num_tokens=7, model=model)
        assert [len(slots) - 3 for slots in slots_known(model)] == known
        assert samples.num_evaluations.tolist() == [len(known)]


def test_steps_that_reveal_nothing_cost_nothing():
    for order in ("ancestral", "low_confidence", "random"):
        model = Toy(hash_model())
        samples = fill(MaskedDecoding(order, num_steps=1000), num_tokens=6, model=model)
        assert (samples.num_evaluations <= 6).all()
        assert len(model.calls) <= 6 * len(PROMPT)


def fixed(laws: list[list[float]]) -> Toy:
    """The same laws per slot, whatever the text; the last id is the mask."""
    table = torch.tensor([[*law, 1.0] for law in laws], dtype=torch.float64).log()
    return Toy(lambda tokens, real: table.expand(len(tokens), -1, -1))


SURE = [0.55] + [0.15] * 3 + [1e-9] * 8  # the highest probability
AHEAD = [0.53] + [0.47 / 11] * 11  # the widest margin
SPLIT = [0.52, 0.48] + [1e-9] * 10  # the lowest entropy


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("low_confidence", [0, 1, 2]),
        ("top_margin", [1, 0, 2]),
        ("entropy", [2, 0, 1]),
    ],
)
def test_orders_reveal_the_surest_first(order, expected):
    model = fixed([SURE, AHEAD, SPLIT])
    sample_masked(
        model,
        nothing(1),
        num_tokens=3,
        mask_id=12,
        decoding=MaskedDecoding(order),
        choice=TokenChoice(temperature=0),
    )
    still_masked = [set((call[0] == 12).nonzero()[:, 0].tolist()) for call in model.calls]
    revealed = [
        before - after
        for before, after in zip(still_masked, [*still_masked[1:], set()], strict=True)
    ]
    assert revealed == [{slot} for slot in expected]


def test_greedy_low_confidence_asks_again_after_every_reveal():
    """Slot 2 is the surest, then 0, then 1; every reveal changes what the others would say."""

    def logits(tokens, real):
        table = torch.zeros(1, 3, 5)
        num_known = int((tokens != 4).sum())
        for slot, sureness in enumerate([2.0, 1.0, 3.0]):
            table[0, slot, num_known] = sureness
        return table

    model = Toy(logits)
    samples = sample_masked(
        model,
        nothing(1),
        num_tokens=3,
        mask_id=4,
        decoding=MaskedDecoding("low_confidence"),
        choice=TokenChoice(temperature=0),
    )
    assert samples.tokens.tolist() == [[1, 2, 0]]
    assert [call.tolist()[0] for call in model.calls] == [[4, 4, 4], [4, 4, 0], [1, 4, 0]]


@pytest.mark.parametrize(
    ("threshold", "num_calls"), [(0.9, 3), (0.0, 1), (0.5, 1), (0.97, 4), (1.0, 4)]
)
def test_a_threshold_reveals_all_sure_tokens_and_at_least_one(threshold, num_calls):
    model = fixed([[p, 1 - p] for p in (0.6, 0.96, 0.8, 0.92)])
    decoding = MaskedDecoding("low_confidence", threshold=threshold)
    samples = sample_masked(
        model,
        nothing(2),
        num_tokens=4,
        mask_id=2,
        decoding=decoding,
        choice=TokenChoice(temperature=0),
    )
    assert samples.tokens.tolist() == [[0] * 4] * 2
    assert samples.num_evaluations.tolist() == [num_calls] * 2


def test_a_row_ends_with_its_first_end():
    """Four slots; the end is drawn at slot 1 of row 0 and not at all in row 1."""
    table = torch.zeros(2, 4, 4).double()
    table[0, :, 1] = table[1, :, 1] = 5.0
    table[0, 1, 2] = 20.0

    def sample(**changes):
        seen = []
        model = Toy(lambda tokens, real: table)
        samples = sample_masked(
            model,
            nothing(2),
            num_tokens=4,
            mask_id=3,
            eos_id=2,
            choice=TokenChoice(temperature=0),
            watch=seen.append,
            decoding=MaskedDecoding("low_confidence", **changes),
        )
        return samples, [tokens[0].tolist() for tokens in seen]

    for changes in ({}, {"block_size": 2}, {"block_size": 2, "cache": "dual"}):
        samples, seen = sample(**changes)
        assert samples.tokens.tolist() == [[1, 2, 2, 2], [1, 1, 1, 1]]
        assert samples.num_new.tolist() == [1, 4]
        assert samples.num_evaluations.tolist() == [2, 4]
        # The end is the surest and comes first, but the mask before it has to be filled as well.
        assert seen[0] == [3, 2, 3, 3]
        assert seen[1:] == [[1, 2, 2, 2]] * 3


def test_an_end_in_the_prompt_ends_nothing():
    prompt = torch.full((1, 2), EOS)
    assert int(fill(MaskedDecoding(), prompt, eos_id=9 - 2).num_new) > 0
    samples = fill(MaskedDecoding(), prompt, eos_id=EOS, choice=TokenChoice(forbidden_ids=(EOS,)))
    assert int(samples.num_new) == 8


def test_bad_input_is_named():
    def decode(*order, **changes):
        return lambda: MaskedDecoding(*order, **changes)

    ragged = torch.tensor([[1, HASH_MASK, 2], [HASH_MASK, 1, 2]])
    cases = [
        (decode("best"), "order is 'best'; use one of first_hitting, ancestral, random"),
        (decode(cache="all"), "cache is 'all'; use one of exact, none, prompt"),
        (decode("random", num_steps=0), "num_steps is 0"),
        (decode(block_size=0), "block_size is 0"),
        (decode(guidance=-1.0), "guidance is -1"),
        (decode(threshold=0.9), "threshold needs order low_confidence, not first_hitting"),
        (decode("low_confidence", threshold=1.5), "threshold is 1.5"),
        (
            decode("low_confidence", threshold=0.5, num_steps=4),
            "a threshold takes as many as it needs",
        ),
        (decode("first_hitting", num_steps=4), "first_hitting takes as many as it needs"),
        (decode(cache="dual"), "cache dual works block by block; give block_size"),
        (
            lambda: fill(MaskedDecoding("random", num_steps=9, block_size=2)),
            "num_steps is 9 for 4 blocks of 2 tokens; give a multiple of 4",
        ),
        (
            lambda: fill(MaskedDecoding(cache="prompt"), ragged, num_tokens=0),
            r"first masks of all rows at one slot, they are at \[0, 1\]",
        ),
        (lambda: fill(MaskedDecoding(), nothing(1), num_tokens=0), "nothing to sample"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
