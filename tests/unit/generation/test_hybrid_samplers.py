"""Samplers of hybrid diffusion, against exact laws of tiny models."""

from __future__ import annotations

import itertools

import pytest
import torch
from exact_models import MASK, NUM_IDS, Toy, hash_model

from megatron_dlm.generation.hybrid_noise import HybridNoise
from megatron_dlm.generation.hybrid_samplers import HybridDecoding, sample_hybrid
from megatron_dlm.generation.masked_samplers import MaskedDecoding, sample_masked
from megatron_dlm.generation.samplers import TokenChoice

ROWS = 20_000
NOISES = {
    "masked": HybridNoise(-1000.0),
    "balanced": HybridNoise(0.0),
    "uniform": HybridNoise(1000.0),
}
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 1], [2, 2, 2]])
HASH_MASK, FORBIDDEN, EOS = 9, 0, 5  # of the hash model
BALANCED = HybridNoise()
DECODINGS = {
    "ancestral": HybridDecoding(num_steps=12),
    "linear": HybridDecoding(num_steps=7, schedule="linear", prior="uniform"),
    "adaptive": HybridDecoding("adaptive"),
    "adaptive, many steps": HybridDecoding("adaptive", num_steps=40, patience=3),
    "adaptive, two at once": HybridDecoding("adaptive", tokens_per_step=2, prior="uniform"),
    "too few steps": HybridDecoding("adaptive", num_steps=2),
    "corrected": HybridDecoding(num_steps=4, correction_steps=20, correction_patience=5),
}
each_decoding = pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)


def nothing(rows: int = ROWS) -> torch.Tensor:
    return torch.zeros(rows, 0, dtype=torch.int64)


def write(decoding, prompt=PROMPT, num_tokens=8, noise=BALANCED, **changes):
    model = changes.pop("model", None) or Toy(hash_model())
    choice = changes.pop("choice", TokenChoice(forbidden_ids=(FORBIDDEN,)))
    return sample_hybrid(
        model,
        prompt,
        mask_id=HASH_MASK,
        vocab_size=10,
        noise=noise,
        num_tokens=num_tokens,
        decoding=decoding,
        choice=choice,
        **changes,
    )


def test_adaptive_with_masks_only_is_low_confidence():
    greedy = TokenChoice(temperature=0.0, forbidden_ids=(FORBIDDEN,))
    expected = sample_masked(
        Toy(hash_model()),
        PROMPT,
        mask_id=HASH_MASK,
        num_tokens=8,
        decoding=MaskedDecoding("low_confidence"),
        choice=greedy,
    )
    found = write(HybridDecoding("adaptive"), noise=NOISES["masked"], choice=greedy)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.num_evaluations, expected.num_evaluations)


def lead_model() -> Toy:
    """Slot 1 is the most certain of its token 2, then slot 0 of 1, then slot 2 of 0; always so."""
    laws = torch.tensor([[0.2, 0.7, 0.1], [0.05, 0.05, 0.9], [0.5, 0.3, 0.2]], dtype=torch.float64)
    table = torch.cat([laws, torch.zeros(3, 1).double()], dim=1).log()
    return Toy(lambda tokens, real: table.expand(len(tokens), -1, -1))


def test_adaptive_replaces_what_leads_most_and_stops_when_nothing_is_gained():
    def sample(seed, **options):
        seen, model = [], lead_model()
        found = sample_hybrid(
            model,
            nothing(1),
            mask_id=MASK,
            vocab_size=NUM_IDS + 1,
            noise=NOISES["uniform"],
            num_tokens=3,
            decoding=HybridDecoding("adaptive", **options),
            choice=TokenChoice(temperature=0.0),
            seed=seed,
            watch=lambda tokens: seen.append(tokens[0].tolist()),
        )
        return found, seen, model

    leads = [[0.5, 0.0, 0.6], [0.85, 0.85, 0.0], [0.0, 0.2, 0.3]]
    num_wrong = set()
    for seed in range(12):
        found, seen, model = sample(seed, num_steps=20)
        assert found.tokens.tolist() == [[1, 2, 0]]
        state = model.calls[0][0].tolist()
        order = sorted(range(3), key=lambda slot: -leads[slot][state[slot]])
        wrong = [slot for slot in order if leads[slot][state[slot]] > 0]
        for slot, now in zip(wrong, seen, strict=True):
            state[slot] = [1, 2, 0][slot]
            assert now == state
        # One pass more finds nothing to gain.
        assert len(model.calls) == len(wrong) + 1
        assert found.num_evaluations.tolist() == [len(wrong) + 1]
        _, seen, model = sample(seed, num_steps=20, tokens_per_step=3)
        assert len(seen) == min(1, len(wrong))
        assert len(model.calls) == len(seen) + 1
        num_wrong.add(len(wrong))
    assert 3 in num_wrong


def test_adaptive_asks_only_after_a_change():
    """A draw may give the token that is there: the old logits still hold, and patience may end."""
    law = torch.tensor([0.4, 0.35, 0.25, 0.0], dtype=torch.float64).log()

    def sample(rows, seed=0, **options):
        model = Toy(lambda tokens, real: law.expand(*tokens.shape, 4))
        found = sample_hybrid(
            model,
            nothing(rows),
            mask_id=MASK,
            vocab_size=NUM_IDS + 1,
            noise=NOISES["uniform"],
            num_tokens=1,
            decoding=HybridDecoding("adaptive", num_steps=100, **options),
            seed=seed,
        )
        return found, [call.flatten().tolist() for call in model.calls]

    num_repeats = 0
    for seed in range(30):
        found, calls = sample(1, seed)
        assert found.tokens.tolist() == [[0]]  # where nothing leads it any more
        assert all(one != other for one, other in itertools.pairwise(calls))
        assert len(calls) == int(found.num_evaluations)
        num_repeats += len(sample(1, seed, patience=1)[1]) < len(calls)
    assert num_repeats > 3
    assert (sample(500)[0].tokens == 0).all()
    hasty = sample(500, patience=1)[0].tokens
    assert 0.1 < float((hasty != 0).double().mean()) < 0.5


def test_correction_mends_a_token_that_does_not_fit():
    """A model that wants every token to be its left neighbour plus one; one of ten is wrong."""

    def logits(tokens, real):
        left = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
        right = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1)
        ids = torch.arange(14)
        from_left = ((left + 1)[..., None] == ids) * 2.0
        return from_left + ((right - 1)[..., None] == ids) * 3.0

    written = torch.arange(1, 11)
    broken = written.clone()
    broken[4] = 12
    mask = 13
    template = torch.full((1, 10), mask)

    def first(tokens, real):  # a first pass that writes the broken text
        return torch.nn.functional.one_hot(broken, 14)[None] * 50.0

    calls = []

    def model_function(tokens, real):
        calls.append(tokens)
        return first(tokens, real) if len(calls) == 1 else logits(tokens, real)

    found = sample_hybrid(
        Toy(model_function),
        template,
        mask_id=mask,
        vocab_size=14,
        noise=BALANCED,
        decoding=HybridDecoding(num_steps=1, correction_steps=50, correction_patience=3),
        choice=TokenChoice(temperature=1.0),
    )
    assert found.tokens.tolist() == [written.tolist()]
    assert 2 < len(calls) < 12


@each_decoding
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_prompts_stay_and_everything_becomes_text(decoding, temperature):
    choice = TokenChoice(temperature, forbidden_ids=(FORBIDDEN,))
    samples = write(decoding, choice=choice).tokens
    assert samples.shape == (4, 11)
    assert torch.equal(samples[:, :3], PROMPT)
    assert not torch.isin(samples[:, 3:], torch.tensor([FORBIDDEN, HASH_MASK])).any()


@each_decoding
def test_a_row_depends_on_its_id_and_seed_only(decoding):
    whole = write(decoding, seed=5)
    again = write(decoding, PROMPT[[2, 0]], seed=5, row_ids=torch.tensor([2, 0]))
    assert torch.equal(whole.tokens, write(decoding, seed=5).tokens)
    assert not torch.equal(whole.tokens, write(decoding, seed=6).tokens)
    assert torch.equal(whole.tokens[[2, 0]], again.tokens)
    assert torch.equal(whole.num_evaluations[[2, 0]], again.num_evaluations)
    twins = write(decoding, PROMPT[[0, 0, 0, 0]], seed=5).tokens
    assert len(twins.unique(dim=0)) > 1


@each_decoding
@pytest.mark.parametrize("prompt_attention", [False, True])
def test_prompts_of_different_lengths_in_one_batch(decoding, prompt_attention):
    valid = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1], [0, 0, 0]]).bool()
    options = {"eos_id": EOS, "seed": 3, "prompt_attention": prompt_attention}
    together = write(decoding, valid=valid, **options)
    for row, real in enumerate(valid):
        prompt, row_ids = PROMPT[row : row + 1, real], torch.tensor([row])
        alone = write(decoding, prompt, row_ids=row_ids, **options)
        assert torch.equal(together.tokens[row, 3:], alone.tokens[0, int(real.sum()) :])
        assert together.num_evaluations[row] == alone.num_evaluations[0]
        assert together.num_new[row] == alone.num_new[0]


def test_templates_are_filled():
    template = torch.tensor([[1, HASH_MASK, 3, HASH_MASK], [HASH_MASK, 2, 3, 4]])
    for decoding in DECODINGS.values():
        samples = write(decoding, template, num_tokens=0)
        given = template != HASH_MASK
        assert torch.equal(samples.tokens[given], template[given])
        assert (samples.tokens != HASH_MASK).all()
        assert samples.num_new.tolist() == [2, 1]
    whole = torch.tensor([[1, 2, 3]])
    assert torch.equal(write(HybridDecoding(), whole, num_tokens=0).tokens, whole)
    for decoding in DECODINGS.values():
        samples = write(decoding, whole, num_tokens=0)
        assert torch.equal(samples.tokens, whole)
        assert samples.num_evaluations.tolist() == [0]


def test_what_is_given_is_computed_once_where_it_does_not_see_the_new():
    model = Toy(hash_model())
    plain = write(HybridDecoding(num_steps=3), model=model)
    assert model.contexts == [None] * 3
    blind = Toy(hash_model())
    found = write(HybridDecoding(num_steps=3), model=blind, prompt_attention=True)
    assert torch.equal(found.tokens, plain.tokens)  # the toy's keys are its tokens
    assert blind.slots == [list(range(11)), list(range(3, 11)), list(range(3, 11))]
    for context in blind.contexts:
        assert torch.equal(context, (torch.arange(11) < 3).expand(4, -1))
    ragged = Toy(hash_model())
    template = torch.tensor([[1, HASH_MASK], [HASH_MASK, 2]])
    write(HybridDecoding(num_steps=2), template, num_tokens=0, model=ragged, prompt_attention=True)
    assert ragged.slots == [[0, 1]] * 2
    assert torch.equal(ragged.contexts[0], template != HASH_MASK)


def test_behind_the_end_come_only_ends():
    def logits(tokens, real):
        ends = torch.arange(tokens.shape[1]) == torch.tensor([[2], [9]])
        return torch.nn.functional.one_hot(torch.where(ends, EOS, 3), 10) * 40.0

    samples = write(
        HybridDecoding(num_steps=3), nothing(2), num_tokens=5, model=Toy(logits), eos_id=EOS
    )
    assert samples.tokens.tolist() == [[3, 3, EOS, EOS, EOS], [3] * 5]
    assert samples.num_new.tolist() == [2, 5]


@pytest.mark.parametrize("noise", ["masked", "balanced", "uniform"])
@pytest.mark.parametrize("prior", ["noise", "mask", "uniform"])
def test_priors(noise, prior):
    refused = (noise, prior) in (("masked", "uniform"), ("uniform", "mask"))
    model = Toy(hash_model())
    decoding = HybridDecoding(num_steps=1, prior=prior)
    if refused:
        with pytest.raises(ValueError, match=f"prior {prior} needs"):
            write(decoding, noise=NOISES[noise], model=model)
        return
    write(decoding, PROMPT.repeat(500, 1), noise=NOISES[noise], model=model)
    start = model.calls[0][:, 3:]
    is_text = prior == "uniform" or (prior, noise) == ("noise", "uniform")
    assert float((start != HASH_MASK).double().mean()) == pytest.approx(float(is_text), abs=2e-3)
    if is_text:
        counts = torch.bincount(start.flatten(), minlength=10)[:9]
        assert float((counts / counts.sum() - 1 / 9).abs().max()) < 0.01


def test_bad_input_is_named():
    def decode(*method, **changes):
        return lambda: HybridDecoding(*method, **changes)

    corrected = HybridDecoding(correction_steps=4)
    cases = [
        (decode("best"), "method is 'best'; use one of ancestral, adaptive"),
        (decode(schedule="square"), "schedule is 'square'; use one of cosine, linear"),
        (decode(prior="none"), "prior is 'none'; use one of noise, mask, uniform"),
        (decode(num_steps=0), "num_steps is 0"),
        (decode("adaptive", tokens_per_step=0), "tokens_per_step is 0"),
        (decode(tokens_per_step=2), "belong to method adaptive"),
        (decode(patience=2), "belong to method adaptive"),
        (decode("adaptive", schedule="linear"), "schedule is linear; it belongs to method anc"),
        (decode(correction_patience=4), "no meaning without correction_steps"),
        (decode(correction_steps=-1), "correction_steps is -1"),
        (decode(correction_steps=1, correction_temperature=-1.0), "correction_temperature is -1"),
        (lambda: HybridNoise(scale=1.5), r"scale is 1.5; it must lie in \[0, 1\]"),
        (lambda: HybridNoise(uniform_probability=1.0), "uniform_probability is 1.0"),
        (lambda: write(corrected, noise=NOISES["masked"]), "trained with uniform noise"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
