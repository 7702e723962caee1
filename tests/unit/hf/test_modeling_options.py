"""Options and attention patterns of the shipped model, against a float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modeling_reference import Visible, reference_logits
from torch import Tensor

from megatron_dlm.hf.remote_code import layers
from megatron_dlm.hf.remote_code.configuration_megatron_dlm import MegatronDLMConfig
from megatron_dlm.hf.remote_code.modeling_megatron_dlm import MegatronDLMForCausalLM

VOCABULARY = 23
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "no_query_norm": {"qk_layernorm": False},
    "query_bias": {"attention_bias": True},
    "gated_bias": {"mlp_bias": True},
    "squared_relu_bias": {"mlp_bias": True, "gated_mlp": False, "hidden_act": "relu2"},
    "full_width_norm": {"qk_layernorm_scope": "full"},
    "softcap": {"attn_logit_softcapping": 0.7},
    "sink": {"attention_sink": True},
    "zero_centered": {"layernorm_zero_centered_gamma": True},
    "multipliers": {"residual_multiplier": 0.4, "output_multiplier": 1.7},
}
OPTIONS["all"] = {
    name: value
    for changes in OPTIONS.values()
    for name, value in changes.items()
    if name not in ("qk_layernorm", "attention_bias")
}
PATTERNS: dict[str, Visible] = {
    "causal": lambda query, key: key <= query,
    "bidirectional": lambda query, key: True,
    "block": lambda query, key: key // 3 <= query // 3,
}


def build(pattern: str = "block", **changes: Any) -> MegatronDLMForCausalLM:
    """Float64, arbitrary values everywhere; blocks of three."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rope_theta": 100.0,
        "rms_norm_eps": 1e-2,
        "attn_mask_type": pattern,
        "block_size": 3,
    }
    model = MegatronDLMForCausalLM(MegatronDLMConfig(**{**settings, **changes})).double().eval()
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.4
        weight.data = noise + ("norm" in name)
    return model.requires_grad_(False)


def some_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def expected(
    model: MegatronDLMForCausalLM, row: Tensor, sees: Visible, positions: list[int] | None = None
) -> Tensor:
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    positions = list(range(len(row))) if positions is None else positions
    return torch.from_numpy(reference_logits(model.config, weights, row.tolist(), positions, sees))


def assert_same(found: Tensor, wanted: Tensor) -> None:
    # Angles of the rotary embedding are float32.
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_as_defined(option: str, pattern: str) -> None:
    model = build(pattern, **OPTIONS[option])
    tokens = some_tokens(1, 8)
    assert_same(model(tokens).logits[0], expected(model, tokens[0], PATTERNS[pattern]))


@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "none"])
def test_options_matter(option: str) -> None:
    """What a model without the option computes from the same weights is something else."""
    model, plain = build(**OPTIONS[option]), build()
    known = plain.state_dict()
    shared = {
        name: weight
        for name, weight in model.state_dict().items()
        if name in known and known[name].shape == weight.shape
    }
    plain.load_state_dict(shared, strict=False)
    tokens = some_tokens(1, 8)
    assert (model(tokens).logits - plain(tokens).logits).abs().max() > 1e-3


@pytest.mark.parametrize("option", ["none", "all"])
class TestPadding:
    """On either side, and of every pattern."""

    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_changes_nothing(self, pattern: str, option: str) -> None:
        model = build(pattern, **OPTIONS[option])
        tokens = some_tokens(2, 9)
        valid = torch.ones(2, 9, dtype=torch.bool)
        valid[0, :4], valid[1, 7:] = False, False
        logits = model(tokens, attention_mask=valid).logits
        for row in range(2):
            real = tokens[row][valid[row]]
            assert_same(logits[row][valid[row]], expected(model, real, PATTERNS[pattern]))

    def test_with_context_and_cache(self, option: str) -> None:
        """A prompt that is blind to the rest is computed once, whatever the rest is."""
        model = build("bidirectional", **OPTIONS[option])
        tokens = some_tokens(2, 9)
        valid, context = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
        valid[1, :2], context[:, :5] = False, True
        denoiser = model.denoiser()
        cache = denoiser.new_cache(2, 9)
        told = {"valid": valid, "context": context, "cache": cache}
        first = denoiser(tokens[:, :5], slots=torch.arange(5), **told)
        denoiser(tokens[:, :4], slots=torch.arange(5, 9), **told)  # something else
        rest = denoiser(tokens[:, 5:], slots=torch.arange(5, 9), **told)
        found = torch.cat([first, rest], dim=1)
        torch.testing.assert_close(
            found[valid], denoiser(tokens, valid=valid, context=context)[valid], rtol=0, atol=1e-12
        )
        for row, num_padded in ((0, 0), (1, 2)):
            is_context = context[row, num_padded:].tolist()

            def sees(query: int, key: int, is_context: list[bool] = is_context) -> bool:
                return is_context[key] or not is_context[query]

            wanted = expected(model, tokens[row, num_padded:], sees)
            assert_same(found[row, num_padded:], wanted)


class TestBlocks:
    """A slot sees its own block and those before."""

    def test_limits(self) -> None:
        """Blocks of one are causal, one block is bidirectional."""
        tokens = some_tokens(2, 8)
        for size, pattern in ((1, "causal"), (8, "bidirectional")):
            found, wanted = build(block_size=size)(tokens), build(pattern)(tokens)
            torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("option", ["none", "all"])
    def test_doubled_input(self, option: str) -> None:
        model, size = build(**OPTIONS[option]), 8
        tokens = some_tokens(1, 2 * size)

        def sees(query: int, key: int) -> bool:
            own, other = query % size // 3, key % size // 3
            if query < size:
                return other == own if key < size else other < own
            return key >= size and other <= own

        positions = [*range(size), *range(size)]
        found = model(tokens, doubled=True).logits
        assert_same(found[0], expected(model, tokens[0], sees, positions))
        # A corrupted block sees what a plain pass over [clean blocks; corrupted block] sees.
        for start in range(0, size, 3):
            stop = min(start + 3, size)
            plain = torch.cat([tokens[:, size : size + start], tokens[:, start:stop]], dim=1)
            wanted = model(plain).logits[:, start:stop]
            torch.testing.assert_close(found[:, start:stop], wanted, rtol=0, atol=1e-12)

    def test_doubled_input_with_padding(self) -> None:
        model, tokens = build(), some_tokens(2, 16)
        valid = torch.ones(2, 8, dtype=torch.bool)
        valid[1, :2] = False
        both = torch.cat([valid, valid], dim=1)
        found = model(tokens, attention_mask=both, doubled=True).logits
        short = tokens[1:].masked_select(both[1:]).view(1, 12)
        wanted = model(short, doubled=True).logits[0]
        torch.testing.assert_close(found[1][both[1]], wanted, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("option", ["none", "all"])
    def test_cache_equals_no_cache(self, option: str) -> None:
        """Each block is denoised in two steps; its clean keys are written with the next block's
        first step. The rows' prompts have different lengths, so their blocks lie elsewhere."""
        model = build(**OPTIONS[option])
        text, mask = some_tokens(2, 12), VOCABULARY - 1
        valid = torch.ones(2, 12, dtype=torch.bool)
        valid[1, :2] = False
        starts = torch.tensor([0, 2])
        denoiser = model.denoiser()
        cache = denoiser.new_cache(2, 12)
        for block in range(3):
            own = starts[:, None] + 3 * block + torch.arange(3)
            with_last = own if block == 0 else torch.cat([own - 3, own], dim=1)
            for step, slots in enumerate((with_last, own)):
                row = text.clone()
                hidden = own[:, step:]  # one more token is known in the second step
                row.scatter_(1, hidden, mask)
                stop = int(own.max()) + 1
                seen = valid & (torch.arange(12) <= own[:, -1:])
                told = {"valid": valid, "slots": slots, "cache": cache}
                found = denoiser(row.gather(1, slots), **told)[:, -3:]
                whole = denoiser(row[:, :stop], valid=seen[:, :stop])
                wanted = whole.gather(1, own[:, :, None].expand(-1, -1, VOCABULARY))
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)

    def test_doubled_input_is_refused_elsewhere(self) -> None:
        for model, length in ((build("bidirectional"), 8), (build(), 7)):
            with pytest.raises(ValueError, match=f"doubled input of {length} slots for attn_mask"):
                model(some_tokens(1, length), doubled=True)
        cached = {"cache": build().denoiser().new_cache(1, 8), "slots": torch.arange(8)}
        with pytest.raises(ValueError, match="only block models without a cache"):
            build()(some_tokens(1, 8), doubled=True, **cached)


def test_capped_scores_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build(**OPTIONS["all"]), some_tokens(2, 8)
    whole = model(tokens).logits
    monkeypatch.setattr(layers, "_LARGEST_SCORES", 2 * 4 * 9 * 3)  # three queries
    torch.testing.assert_close(model(tokens).logits, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("option", OPTIONS)
def test_saved_and_loaded_again(option: str, tmp_path: Path) -> None:
    model, tokens = build(**OPTIONS[option]), some_tokens(1, 8)
    model.save_pretrained(tmp_path)
    again = MegatronDLMForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_fresh_weights() -> None:
    """Gains are one, sinks and biases nothing, whatever the gains are stored as."""
    for is_zero_centered in (False, True):
        config = build(**OPTIONS["all"]).config
        config.layernorm_zero_centered_gamma = is_zero_centered
        for name, weight in MegatronDLMForCausalLM(config).named_parameters():
            if "norm" in name:
                assert (weight == (0.0 if is_zero_centered else 1.0)).all()
            if "bias" in name or "sink" in name:
                assert not weight.any()


def test_wanted_slots_are_those_of_all_logits() -> None:
    model, tokens = build(output_multiplier=3.0), some_tokens(2, 6)
    wanted = torch.rand(2, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    denoiser = model.denoiser()
    torch.testing.assert_close(
        denoiser(tokens, wanted=wanted), denoiser(tokens)[wanted], rtol=0, atol=1e-12
    )
    assert denoiser(tokens, wanted=torch.zeros_like(wanted)).shape == (0, VOCABULARY)


def test_context_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"context has shape \[2, 5\]; it must be \[2, 6\]"):
        build()(some_tokens(2, 6), context=torch.ones(2, 5, dtype=torch.bool))


def test_small_gains_survive_bf16() -> None:
    """1 + 0.001 is 1 in bf16; the gain must be made in fp32."""
    norm = build(layernorm_zero_centered_gamma=True).model.norm.to(torch.bfloat16)
    norm.weight.data.fill_(1e-3)
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + norm.eps).sqrt()
    wanted = (exact * (1 + norm.weight.double())).to(torch.bfloat16)
    assert (norm(x) == wanted).double().mean() > 0.999
    assert (exact.to(torch.bfloat16) == wanted).double().mean() < 0.95
