"""The samplers with the keys and values of a real transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_dlm.generation.hybrid_samplers import HybridDecoding, sample_hybrid
from megatron_dlm.generation.masked_samplers import MaskedDecoding, sample_masked
from megatron_dlm.generation.samplers import TokenChoice, sample_autoregressive
from megatron_dlm.generation.texts import noise_of
from megatron_dlm.hf.load import load_model

PROMPT = torch.tensor([[9, 8, 40, 50], [9, 61, 62, 63], [70, 71, 72, 73]])
VALID = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
GREEDY = TokenChoice(temperature=0.0)


def denoiser(path):
    """In float64, so that equal means equal and not lucky."""
    return load_model(path).model.double().denoiser()


@pytest.mark.parametrize("choice", [GREEDY, TokenChoice()], ids=["greedy", "drawn"])
def test_autoregressive_keys_and_values_change_nothing(models, choice):
    model = denoiser(models["ar"])

    def sample(prompt, cache, **changes):
        return sample_autoregressive(
            model, prompt, num_tokens=12, choice=choice, cache=cache, **changes
        ).tokens

    cached, plain = (sample(PROMPT, cache, valid=VALID) for cache in ("exact", "none"))
    assert torch.equal(cached, plain)
    for row, real in enumerate(VALID):
        alone = sample(PROMPT[row : row + 1, real], "exact", row_ids=torch.tensor([row]))
        assert torch.equal(alone[0, int(real.sum()) :], plain[row, 4:])


def fill(model, decoding, **changes):
    return sample_masked(
        model,
        PROMPT,
        mask_id=3,
        num_tokens=16,
        decoding=decoding,
        choice=GREEDY,
        valid=VALID,
        **changes,
    )


CACHES = ["exact", "prompt", "prefix", "dual"]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_caches_of_one_layer_are_exact(models, cache, guidance):
    """Keys and values of the first layer depend on their own token alone: nothing grows stale."""
    model = denoiser(models["shallow"])
    decoding = MaskedDecoding("low_confidence", num_steps=8, block_size=4, guidance=guidance)
    plain = fill(model, decoding)
    cached = fill(model, replace(decoding, cache=cache))
    assert torch.equal(plain.tokens, cached.tokens)
    assert torch.equal(plain.num_evaluations, cached.num_evaluations)


@pytest.mark.parametrize("cache", CACHES)
def test_one_step_per_block_is_exact(models, cache):
    """The first step of a block computes everything again; the prompt's cache does so once."""
    model = denoiser(models["masked"])
    decoding = MaskedDecoding("low_confidence", num_steps=4, block_size=4)
    if cache == "prompt":
        decoding = replace(decoding, num_steps=1, block_size=None)
    plain = fill(model, decoding)
    cached = fill(model, replace(decoding, cache=cache))
    assert torch.equal(plain.tokens, cached.tokens)


@pytest.mark.parametrize("cache", ["prompt", "prefix", "dual"])
def test_deeper_caches_are_approximate_but_do_not_depend_on_the_batch(models, cache):
    model = denoiser(models["masked"])
    decoding = MaskedDecoding("low_confidence", num_steps=16, block_size=8, cache=cache)
    plain, cached = fill(model, replace(decoding, cache="none")), fill(model, decoding)
    assert not torch.equal(plain.tokens, cached.tokens)
    for row, real in enumerate(VALID):
        alone = sample_masked(
            model,
            PROMPT[row : row + 1, real],
            mask_id=3,
            num_tokens=16,
            decoding=decoding,
            choice=GREEDY,
        )
        assert torch.equal(alone.tokens[0, int(real.sum()) :], cached.tokens[row, 4:])


class Recomputing:
    """A denoiser whose cache holds tokens: all is computed again in every step."""

    def __init__(self, model):
        self.model = model

    def new_cache(self, batch_size, num_slots):
        return torch.zeros(batch_size, num_slots, dtype=torch.int64)

    def __call__(self, tokens, *, slots=None, cache=None, wanted=None, **others):
        if cache is None:
            return self.model(tokens, wanted=wanted, **others)
        cache[:, slots] = tokens
        everywhere = torch.zeros_like(cache, dtype=torch.bool)
        everywhere[:, slots] = wanted
        return self.model(cache, wanted=everywhere, **others)


@pytest.mark.parametrize("name", ["prompted", "hybrid"])
@pytest.mark.parametrize("method", ["ancestral", "adaptive"])
def test_prompts_that_see_no_noise_keep_their_keys(models, name, method):
    """The same texts as without a cache, which sees the prompt with and without its rule."""
    loaded = load_model(models[name])
    model = loaded.model.double().denoiser()
    prompt_attention = loaded.model.config.prompt_attention
    assert prompt_attention == (name == "prompted")

    def sample(denoiser, **changes):
        return sample_hybrid(
            denoiser,
            PROMPT,
            mask_id=3,
            vocab_size=loaded.model.config.vocab_size,
            noise=noise_of(loaded.model.config),
            num_tokens=12,
            decoding=HybridDecoding(method, num_steps=8),
            valid=VALID,
            **changes,
        ).tokens

    plain = sample(Recomputing(model), prompt_attention=prompt_attention)
    assert torch.equal(sample(model, prompt_attention=prompt_attention), plain)
    assert not torch.equal(sample(model, prompt_attention=not prompt_attention), plain)


def test_guidance_is_the_formula_on_two_plain_passes(models):
    model, weight = denoiser(models["masked"]), 0.8
    template = torch.tensor([[20, 21, 3, 22]])
    seen = []

    def record(tokens, **others):
        logits = model(tokens, **others)
        seen.append((tokens, logits))
        return logits

    sample_masked(
        record, template, mask_id=3, decoding=MaskedDecoding(guidance=weight), choice=GREEDY
    )
    ((tokens, logits),) = seen
    assert tokens.tolist() == [[20, 21, 3, 22], [3, 3, 3, 3]]
    conditional, free = model(template), model(torch.full_like(template, 3))
    assert torch.allclose(logits, torch.cat([conditional, free])[:, 2])
    expected = (free + (1 + weight) * (conditional - free))[0, 2]
    expected[3] = float("-inf")
    filled = sample_masked(
        model, template, mask_id=3, decoding=MaskedDecoding(guidance=weight), choice=GREEDY
    )
    assert filled.tokens[0, 2] == expected.argmax()
