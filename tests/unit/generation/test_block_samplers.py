"""The sampler of block diffusion, against exact laws, its limits and the shipped model."""

from __future__ import annotations

import pytest
import torch
from exact_models import (
    MASK,
    Toy,
    autoregressive_model,
    hash_model,
    masked_model,
    p_value,
    random_joint,
)
from torch.nn import functional

from megatron_dlm.generation.block_samplers import sample_block
from megatron_dlm.generation.masked_samplers import MaskedDecoding, sample_masked
from megatron_dlm.generation.samplers import TokenChoice, sample_autoregressive
from megatron_dlm.hf.load import load_model

ROWS = 20_000
PROMPT = torch.tensor([[1, 2, 3, 4, 6], [4, 5, 6, 7, 8], [7, 8, 1, 2, 1], [2, 2, 2, 2, 2]])
VALID = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
HASH_MASK, FORBIDDEN, EOS = 9, 0, 5
SIZE = 4
DECODINGS = {
    "first_hitting": MaskedDecoding(),
    "ancestral": MaskedDecoding("ancestral", num_steps=7),
    "random": MaskedDecoding("random"),
    "low_confidence": MaskedDecoding("low_confidence", num_steps=5),
    "threshold": MaskedDecoding("low_confidence", threshold=0.4),
    "entropy": MaskedDecoding("entropy"),
}
each_decoding = pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)


def nothing(rows: int = ROWS) -> torch.Tensor:
    return torch.zeros(rows, 0, dtype=torch.int64)


def table_model(joint: torch.Tensor) -> Toy:
    """Of three tokens; what is not there, or not yet in the cache, is a mask."""
    function = masked_model(joint, 3)

    def logits(tokens, real):
        seen = functional.pad(tokens.masked_fill(~real, MASK), (0, 3 - tokens.shape[1]), value=MASK)
        return function(seen, seen >= 0)[:, : tokens.shape[1]]

    return Toy(logits)


def cached(decoding: MaskedDecoding, cache: str) -> MaskedDecoding:
    return MaskedDecoding(
        decoding.order,
        num_steps=decoding.num_steps,
        threshold=decoding.threshold,
        cache=cache,  # type: ignore[arg-type]
    )


def fill(decoding, prompt=PROMPT, num_tokens=10, **changes):
    choice = changes.pop("choice", TokenChoice(forbidden_ids=(FORBIDDEN,)))
    return sample_block(
        changes.pop("model", None) or Toy(hash_model(block_size=SIZE)),
        prompt,
        mask_id=HASH_MASK,
        block_size=SIZE,
        num_tokens=num_tokens,
        decoding=decoding,
        choice=choice,
        **changes,
    )


@pytest.mark.parametrize("cache", ["exact", "none"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
@pytest.mark.parametrize("order", ["first_hitting", "random"])
def test_one_token_at_a_time_has_the_joint_law(block_size, order, cache):
    joint = random_joint(3)
    samples = sample_block(
        table_model(joint),
        nothing(),
        num_tokens=3,
        mask_id=MASK,
        block_size=block_size,
        decoding=MaskedDecoding(order, cache=cache),
        seed=2,
    )
    assert p_value(samples.tokens, joint) > 1e-3
    assert (samples.num_evaluations == 3).all()


@pytest.mark.parametrize("num_steps", [2, 3, 40])
def test_ancestral_steps_of_a_block_have_the_law_of_its_masks(num_steps):
    """Blocks of two, then one: two tokens are revealed at once with probability 1 / their steps."""
    joint = random_joint(3)
    samples = sample_block(
        table_model(joint),
        nothing(),
        num_tokens=3,
        mask_id=MASK,
        block_size=2,
        decoding=MaskedDecoding("ancestral", num_steps=num_steps),
        seed=1,
    ).tokens
    steps = max(1, 2 * num_steps // 3)
    table = joint.reshape(3, 3, 3)
    pair = table.sum(2)
    law = torch.outer(pair.sum(1), pair.sum(0)) / steps + pair * (1 - 1 / steps)
    assert p_value(samples, (law[..., None] * table / pair[..., None]).flatten()) > 1e-3


def test_blocks_of_one_token_are_autoregression():
    joint = random_joint(3)
    samples = sample_block(
        table_model(joint), nothing(), num_tokens=3, mask_id=MASK, block_size=1, seed=4
    )
    assert p_value(samples.tokens, joint) > 1e-3
    # Draw by draw the chain rule: draws are named by row and position. One start token comes first.
    start = torch.zeros(200, 1, dtype=torch.int64)
    choice = TokenChoice(forbidden_ids=(MASK,))
    chain = sample_autoregressive(
        Toy(autoregressive_model(joint, 3)), start, num_tokens=3, choice=choice, seed=4
    )
    table = table_model(joint).function

    def behind_start(tokens, real):
        return functional.pad(table(tokens[:, 1:], real[:, 1:]), (0, 0, 1, 0))

    found = sample_block(
        Toy(behind_start),
        start,
        num_tokens=3,
        mask_id=MASK,
        block_size=1,
        decoding=MaskedDecoding(cache="none"),
        seed=4,
    )
    assert torch.equal(found.tokens, chain.tokens)


@each_decoding
def test_one_block_is_masked_diffusion(decoding):
    expected = sample_masked(
        Toy(hash_model()),
        PROMPT,
        mask_id=HASH_MASK,
        num_tokens=10,
        decoding=decoding,
        choice=TokenChoice(forbidden_ids=(FORBIDDEN,)),
        seed=3,
    )
    found = sample_block(
        Toy(hash_model()),
        PROMPT,
        mask_id=HASH_MASK,
        block_size=100,
        num_tokens=10,
        decoding=decoding,
        choice=TokenChoice(forbidden_ids=(FORBIDDEN,)),
        seed=3,
    )
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.num_evaluations, expected.num_evaluations)


@each_decoding
@pytest.mark.parametrize("eos_id", [None, EOS])
def test_the_cache_changes_nothing_and_rows_stand_alone(decoding, eos_id):
    """Prompts of different lengths, whose blocks lie at different slots, in one batch."""
    options = {"valid": VALID, "eos_id": eos_id, "seed": 3}
    kept, plain = (fill(cached(decoding, cache), **options) for cache in ("exact", "none"))
    assert torch.equal(kept.tokens, plain.tokens)
    assert torch.equal(kept.num_evaluations, plain.num_evaluations)
    assert not torch.isin(kept.tokens[:, 5:], torch.tensor([FORBIDDEN, HASH_MASK])).any()
    for row, real in enumerate(VALID):
        alone = fill(
            decoding,
            PROMPT[row : row + 1, real],
            eos_id=eos_id,
            seed=3,
            row_ids=torch.tensor([row]),
        )
        assert torch.equal(kept.tokens[row, 5:], alone.tokens[0, int(real.sum()) :])
        assert kept.num_evaluations[row] == alone.num_evaluations[0]
        assert kept.num_new[row] == alone.num_new[0]


def test_what_is_computed():
    """Behind a prompt of five: its block of four and the rest, then two blocks at a time."""
    model = Toy(hash_model(block_size=SIZE))
    fill(MaskedDecoding("random", num_steps=5), PROMPT[:1], num_tokens=10, model=model)
    spans = [(slots[0][0], slots[0][-1] + 1) for slots in model.slots]
    # Masks at 5..7, 8..11, 12..14: their shares of five steps are one, two and two.
    assert spans == [(0, 8), (4, 12), (8, 12), (7, 15), (11, 15)]
    plain = Toy(hash_model(block_size=SIZE))
    decoding = MaskedDecoding("random", num_steps=5, cache="none")
    fill(decoding, PROMPT[:1], num_tokens=10, model=plain)
    assert [len(slots) for slots in plain.slots] == [8, 12, 12, 15, 15]


def test_templates():
    """Masks in the middle, with blocks in between that have none."""
    template = torch.tensor(
        [
            [1, HASH_MASK, 3, 4, 5, 6, 7, 8, 1, 2, HASH_MASK, HASH_MASK, 3],
            [1, 2, 3, 4, 5, 6, 7, HASH_MASK, 1, 2, 3, HASH_MASK, 3],
        ]
    )
    for decoding in DECODINGS.values():
        kept, plain = (
            fill(cached(decoding, cache), template, num_tokens=0) for cache in ("exact", "none")
        )
        assert torch.equal(kept.tokens, plain.tokens)
        assert torch.equal(kept.tokens[template != HASH_MASK], template[template != HASH_MASK])
        assert (kept.tokens != HASH_MASK).all()
        assert kept.num_new.tolist() == [3, 2]


@each_decoding
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_shipped_model_with_and_without_its_cache(models, decoding, temperature):
    model = load_model(models["block"])
    assert model.objective.block_size == SIZE
    denoiser = model.model.double().denoiser()
    prompt = torch.tensor([[9, 8, 40, 50, 51], [9, 61, 62, 63, 64], [70, 71, 72, 73, 74]])
    valid = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()

    def sample(cache, rows=slice(None), **changes):
        return sample_block(
            denoiser,
            changes.pop("prompt", prompt[rows]),
            mask_id=3,
            block_size=SIZE,
            num_tokens=11,
            decoding=cached(decoding, cache),
            choice=TokenChoice(temperature),
            **changes,
        )

    kept, plain = (sample(cache, valid=valid) for cache in ("exact", "none"))
    assert torch.equal(kept.tokens, plain.tokens)
    assert torch.equal(kept.num_evaluations, plain.num_evaluations)
    for row, real in enumerate(valid):
        alone = sample("exact", prompt=prompt[row : row + 1, real], row_ids=torch.tensor([row]))
        assert torch.equal(alone.tokens[0, int(real.sum()) :], plain.tokens[row, 5:])


def test_bad_input_is_named():
    cases = [
        (MaskedDecoding(block_size=3), "block_size is 3; the model was trained on blocks of 4"),
        (MaskedDecoding(guidance=1.0), "guidance is 1.0"),
        (MaskedDecoding(cache="prompt"), "cache is prompt; block diffusion has exact and none"),
    ]
    for decoding, message in cases:
        with pytest.raises(ValueError, match=message):
            fill(decoding)
    assert fill(MaskedDecoding(block_size=4)).tokens.shape == (4, 15)
