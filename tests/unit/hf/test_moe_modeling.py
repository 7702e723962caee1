"""Experts of the shipped model against a float64 loop over tokens; padding, caches, samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_modeling_options import PATTERNS, assert_same, build, expected, some_tokens

from megatron_dlm.generation.hybrid_noise import HybridNoise
from megatron_dlm.generation.hybrid_samplers import HybridDecoding, sample_hybrid
from megatron_dlm.generation.masked_samplers import MaskedDecoding, sample_masked
from megatron_dlm.hf.remote_code.experts import MixtureOfExperts
from megatron_dlm.hf.remote_code.visibility import KeyValueCache

EXPERTS: dict[str, Any] = {"num_experts": 5, "moe_intermediate_size": 7}
SIGMOID: dict[str, Any] = {"moe_score_function": "sigmoid", "moe_expert_bias": True}
SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 9, "shared_expert_gate": True}
CHOSEN: dict[str, Any] = {"moe_routing": "expert_choice"}
SCALES = [0.5, 1.0, 1.5, 0.3, 2.0, 0.7]
# name -> (changes, whether it may be causal)
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "softmax": ({}, True),
    "pre_softmax": ({"moe_pre_softmax": True, "num_experts_per_tok": 3}, True),
    "sigmoid": (SIGMOID, True),
    "one_sigmoid": ({**SIGMOID, "num_experts_per_tok": 1}, True),
    "shared": (SHARED, True),
    "dense_first": ({"num_dense_layers": 1}, True),
    "without_gate": ({"gated_mlp": False, "hidden_act": "relu2"}, True),
    "choice": (CHOSEN, False),
    "choice_pre_softmax": ({**CHOSEN, "moe_pre_softmax": True}, False),
    "choice_sigmoid": ({**CHOSEN, "moe_score_function": "sigmoid"}, False),
    "choice_scaled": ({**CHOSEN, **SHARED, "moe_count_scales": SCALES}, False),
    "choice_of_few": ({**CHOSEN, "num_experts_per_tok": 1}, False),
}


def build_moe(case: str, pattern: str = "bidirectional", **changes: Any) -> Any:
    model = build(pattern, **{**EXPERTS, **CASES[case][0], **changes})
    generator = torch.Generator().manual_seed(8)
    for name, bias in model.named_buffers():
        if name.endswith("expert_bias"):  # large enough to change the choice
            bias.copy_(torch.randn(bias.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("case", "pattern"),
    [
        (case, pattern)
        for case, (_, may_be_causal) in CASES.items()
        for pattern in (PATTERNS if may_be_causal else ["bidirectional"])
    ],
)
def test_experts_as_defined(case: str, pattern: str) -> None:
    model = build_moe(case, pattern)
    tokens = some_tokens(2, 9)
    logits = model(tokens).logits
    for row in range(2):
        assert_same(logits[row], expected(model, tokens[row], PATTERNS[pattern]))


@pytest.mark.parametrize("case", [name for name in CASES if name != "softmax"])
def test_settings_matter(case: str) -> None:
    model, plain = build_moe(case), build_moe("softmax")
    known = plain.state_dict()
    shared = {
        name: weight
        for name, weight in model.state_dict().items()
        if name in known and known[name].shape == weight.shape
    }
    plain.load_state_dict(shared, strict=False)
    tokens = some_tokens(1, 9)
    assert (model(tokens).logits - plain(tokens).logits).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["softmax", "choice", "choice_pre_softmax", "choice_scaled"])
def test_padding_changes_nothing(case: str) -> None:
    """The share of every expert is that of the real tokens of the row."""
    model = build_moe(case)
    tokens = some_tokens(2, 12)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, :5], valid[1, 9:] = False, False
    logits = model(tokens, attention_mask=valid).logits
    for row in range(2):
        real = tokens[row][valid[row]]
        assert_same(logits[row][valid[row]], expected(model, real, PATTERNS["bidirectional"]))


def test_of_equals_the_first_are_chosen() -> None:
    experts: Any = build_moe("choice").model.layers[0].mlp
    assert isinstance(experts, MixtureOfExperts)
    experts.gate.weight.zero_()
    real = torch.ones(2, 10, dtype=torch.bool)
    real[1, :3] = False
    _, chosen = experts.gate(torch.ones(2, 10, 12, dtype=torch.float64), real)
    first = torch.arange(10) < 4  # floor(10 * 2 / 5)
    assert torch.equal(chosen[0], first[:, None].expand(10, 5))
    second = (torch.arange(10) >= 3) & (torch.arange(10) < 5)  # floor(7 * 2 / 5)
    assert torch.equal(chosen[1], second[:, None].expand(10, 5))


def test_tokens_without_experts_have_gradients() -> None:
    """Softmax over nobody is where NaN would come from."""
    model = build_moe("choice_of_few").train().requires_grad_(True)
    experts = model.model.layers[0].mlp
    _, chosen = experts.gate(torch.randn(1, 8, 12).double(), None)
    assert (chosen.sum(-1) == 0).any()
    model(some_tokens(2, 8)).logits.square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert bool(weight.grad.isfinite().all()), name
    assert bool((experts.gate.weight.grad != 0).any())


class TestCaches:
    """Parts of a row can be computed alone where tokens choose, and cannot where experts do."""

    @pytest.mark.parametrize("case", ["softmax", "sigmoid", "shared"])
    def test_are_exact_for_token_choice(self, case: str) -> None:
        model = build_moe(case, "causal")
        tokens, cache = some_tokens(2, 8), model.denoiser().new_cache(2, 8)
        whole = model(tokens).logits
        for first, last in ((0, 5), (5, 6), (6, 8)):
            slots = torch.arange(first, last)
            part = model(tokens[:, slots], cache=cache, slots=slots).logits
            assert_same(part, whole[:, first:last])

    def test_are_refused_for_expert_choice(self) -> None:
        model = build_moe("choice")
        assert model.denoiser().new_cache(1, 4) is None
        with pytest.raises(ValueError, match="experts choose among all its tokens"):
            model(some_tokens(1, 4), cache=KeyValueCache(4), slots=torch.arange(4))

    @pytest.mark.parametrize("cache", ["prompt", "prefix", "dual"])
    def test_samplers_say_so(self, cache: Any) -> None:
        decoding = MaskedDecoding(cache=cache, block_size=2)
        prompt = some_tokens(1, 4)
        with pytest.raises(ValueError, match=f"cache {cache} computes a part of a text, but the"):
            sample_masked(
                build_moe("choice").denoiser(), prompt, mask_id=22, num_tokens=4, decoding=decoding
            )


def test_what_there_is_not() -> None:
    for pattern in ("causal", "block"):
        with pytest.raises(ValueError, match="expert_choice looks at whole rows, but attn"):
            build_moe("choice", pattern)
    with pytest.raises(ValueError, match="mlp_bias is true, but experts have no biases"):
        build_moe("softmax", mlp_bias=True)


@pytest.mark.parametrize("case", ["sigmoid", "choice", "choice_scaled"])
class TestSamples:
    """A text is the same alone and beside a longer one."""

    def prompts(self) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, valid = some_tokens(2, 6) % 22, torch.ones(2, 6, dtype=torch.bool)
        valid[1, :3] = False
        return tokens, valid

    def test_masked(self, case: str) -> None:
        model, (tokens, valid) = build_moe(case), self.prompts()
        options: Any = {"mask_id": 22, "num_tokens": 5, "seed": 3}
        both = sample_masked(model.denoiser(), tokens, valid=valid, **options)
        alone = sample_masked(
            model.denoiser(), tokens[1:, 3:], row_ids=torch.tensor([1]), **options
        )
        assert torch.equal(both.tokens[1, 3:], alone.tokens[0])

    def test_hybrid_with_prompts(self, case: str) -> None:
        """Keys of the prompt are kept for tokens that choose, and computed again otherwise."""
        model, (tokens, valid) = build_moe(case), self.prompts()
        options: Any = {
            "mask_id": 22,
            "vocab_size": 23,
            "noise": HybridNoise(0.0, 1.0),
            "num_tokens": 5,
            "prompt_attention": True,
            "decoding": HybridDecoding(num_steps=4),
            "seed": 3,
        }
        both = sample_hybrid(model.denoiser(), tokens, valid=valid, **options)
        alone = sample_hybrid(
            model.denoiser(), tokens[1:, 3:], row_ids=torch.tensor([1]), **options
        )
        assert torch.equal(both.tokens[1, 3:], alone.tokens[0])
