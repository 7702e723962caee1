"""The model that ships with exports: padding, cache, loss; its numbers are checked elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dlm.hf.remote_code.configuration_megatron_dlm import MegatronDLMConfig
from megatron_dlm.hf.remote_code.modeling_megatron_dlm import MegatronDLMForCausalLM

VOCABULARY = 40


def build(pattern: str = "bidirectional", **changes: Any) -> MegatronDLMForCausalLM:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 100.0,
        "initializer_range": 0.3,
        "attn_mask_type": pattern,
        "objective_kind": "autoregressive" if pattern == "causal" else "masked",
        "mask_token_id": VOCABULARY - 1,
    }
    torch.manual_seed(0)
    return MegatronDLMForCausalLM(MegatronDLMConfig(**{**settings, **changes})).eval()


def some_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pattern: str, side: str) -> None:
    model = build(pattern)
    tokens = some_tokens(3, 9)
    alone = model(tokens).logits
    padding = torch.full((3, 4), 7)
    real, unreal = torch.ones(3, 9, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
    parts = [(padding, unreal), (tokens, real)][:: 1 if side == "left" else -1]
    padded, mask = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    place = slice(4, 13) if side == "left" else slice(0, 9)
    logits = model(padded, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[:, place], alone, rtol=0, atol=1e-5)
    if pattern == "bidirectional" or side == "left":  # else nothing looks at the padding anyway
        without = model(padded).logits[:, place]
        assert (without - alone).abs().max() > 1e-2


def test_rows_padded_by_different_lengths() -> None:
    model = build("causal")
    tokens, mask = some_tokens(2, 6), torch.ones(2, 6, dtype=torch.bool)
    mask[1, :3] = False
    both = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(both[1:, 3:], model(tokens[1:, 3:]).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(both[:1], model(tokens[:1]).logits, rtol=0, atol=1e-5)


def test_causal_sees_no_later_token_and_bidirectional_does() -> None:
    tokens = some_tokens(1, 8)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % VOCABULARY
    for pattern, must_differ in (("causal", False), ("bidirectional", True)):
        model = build(pattern)
        before, after = model(tokens).logits[:, :-1], model(other).logits[:, :-1]
        assert bool((before != after).any()) == must_differ


@pytest.mark.parametrize("is_padded", [False, True])
def test_decoding_token_by_token_equals_the_whole(is_padded: bool) -> None:
    model = build("causal")
    tokens = some_tokens(2, 10)
    valid = torch.ones(2, 10, dtype=torch.bool)
    if is_padded:
        valid[1, :2] = False
    whole = model(tokens, attention_mask=valid).logits
    denoiser = model.denoiser()
    cache = denoiser.new_cache(2, 10)
    pieces = []
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 10)):
        slots = torch.arange(start, stop)
        seen = valid if is_padded else None
        pieces.append(denoiser(tokens[:, start:stop], valid=seen, slots=slots, cache=cache))
    real = valid[:, :, None]
    torch.testing.assert_close(torch.cat(pieces, 1) * real, whole * real, rtol=0, atol=1e-5)


def test_a_rewritten_block_sees_what_is_kept_left_and_right() -> None:
    """All slots are filled; a block written again with the same tokens gives the same logits, and
    with other tokens those of a model that reads the kept slots as they were."""
    model = build()
    tokens, block = some_tokens(2, 12), slice(4, 8)
    denoiser = model.denoiser()
    cache = denoiser.new_cache(2, 12)
    whole = denoiser(tokens, slots=torch.arange(12), cache=cache)
    torch.testing.assert_close(whole, model(tokens).logits, rtol=0, atol=1e-5)
    again = denoiser(tokens[:, block], slots=torch.arange(4, 8), cache=cache)
    # Deeper layers of the kept slots would change with the block, so only equal tokens agree.
    torch.testing.assert_close(again, whole[:, block], rtol=0, atol=1e-5)
    changed = tokens.clone()
    changed[:, block] = VOCABULARY - 1
    masked = denoiser(changed[:, block], slots=torch.arange(4, 8), cache=cache)
    assert (masked - model(changed).logits[:, block]).abs().max() > 1e-3
    back = denoiser(tokens[:, block], slots=torch.arange(4, 8), cache=cache)
    torch.testing.assert_close(back, again, rtol=0, atol=0)


def test_one_layer_reads_a_frozen_cache_exactly() -> None:
    """With one layer the keys of kept slots do not depend on the block: rewriting is exact."""
    model = build(num_hidden_layers=1)
    tokens, block = some_tokens(2, 12), torch.arange(4, 8)
    denoiser = model.denoiser()
    cache = denoiser.new_cache(2, 12)
    denoiser(tokens, slots=torch.arange(12), cache=cache)
    changed = tokens.clone()
    changed[:, block] = VOCABULARY - 1
    cached = denoiser(changed[:, block], slots=block, cache=cache)
    torch.testing.assert_close(cached, model(changed).logits[:, block], rtol=0, atol=1e-5)


def test_rows_at_different_slots() -> None:
    model = build("causal")
    tokens = some_tokens(2, 6)
    denoiser = model.denoiser()
    cache = denoiser.new_cache(2, 9)
    slots = torch.stack([torch.arange(6), torch.arange(3, 9)])
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, 6:], valid[1, :3] = False, False
    logits = denoiser(tokens, valid=valid, slots=slots, cache=cache)
    torch.testing.assert_close(logits, model(tokens).logits, rtol=0, atol=1e-5)


def test_loss_is_shifted_for_causal_models_only() -> None:
    tokens = some_tokens(2, 7)
    labels = tokens.clone()
    labels[:, :2] = -100
    for pattern, shift in (("causal", 1), ("bidirectional", 0)):
        model = build(pattern)
        output = model(tokens, labels=labels)
        log_probs = output.logits.log_softmax(-1)
        picked = [
            -log_probs[row, place - shift, labels[row, place]]
            for row in range(2)
            for place in range(2, 7)
        ]
        torch.testing.assert_close(output.loss, torch.stack(picked).mean(), rtol=1e-6, atol=0)
        output.loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())


def test_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 5\]; it must be \[2, 6\]"):
        build()(some_tokens(2, 6), attention_mask=torch.ones(2, 5))


def test_configuration_refuses_what_the_model_has_not() -> None:
    with pytest.raises(ValueError, match="rope_type 'yarn' is not known"):
        MegatronDLMConfig(rope_scaling={"rope_type": "yarn", "factor": 8.0})
    with pytest.raises(ValueError, match="attn_mask_type is 'sideways'"):
        MegatronDLMConfig(attn_mask_type="sideways")
    base = MegatronDLMConfig(rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    assert base.rope_theta == 77.0


def test_saved_and_loaded_again(tmp_path: Any) -> None:
    for tied in (True, False):
        model = build(tie_word_embeddings=tied, attention_bias=True, qk_layernorm=False)
        model.save_pretrained(tmp_path / str(tied))
        again = MegatronDLMForCausalLM.from_pretrained(tmp_path / str(tied))
        tokens = some_tokens(2, 5)
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert (again.lm_head is None) == tied
        assert again.config.rope_theta == 100.0
