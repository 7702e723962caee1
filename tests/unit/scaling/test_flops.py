"""FLOPs by hand, and the published range of what diffusion costs to sample."""

from __future__ import annotations

import pytest

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parse import PRESETS, parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.models.accounting import count_parameters
from megatron_dlm.scaling.flops import generation_flops, training_flops

SMALL = ModelConfig(
    num_layers=2, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, seq_length=4,
    vocab_size=10, make_vocab_size_divisible_by=1, activation="gelu", qk_layernorm=False,
)  # fmt: skip
BILLION = parse(RunConfig, ["--config", f"{PRESETS / 'sdl_1b.yaml'}"], "test").model


def test_training_by_hand() -> None:
    matrices = 2 * (4 * 8 * 8 + 2 * 8 * 16)
    parameters = matrices + 2 * 2 * 8 + 8 + 10 * 8
    found = training_flops(SMALL, ObjectiveConfig(kind="masked"))
    assert count_parameters(SMALL).total == parameters
    assert found.six_n == 6 * parameters
    assert found.six_p_and_attention == 6 * (parameters - 80) + 12 * 2 * 8 * 4
    # The norms multiply nothing, and half of the slots are scored.
    assert found.fine == 6 * matrices + 12 * 2 * 8 * 4 + 6 * 80 / 2


def test_how_far_conventions_lie_apart() -> None:
    """Nothing for AR at 1B; a factor of four where a small model has a large vocabulary."""
    found = training_flops(BILLION, ObjectiveConfig(kind="autoregressive"))
    assert found.fine / found.six_p_and_attention == pytest.approx(1, abs=0.01)
    grid_25m = ModelConfig(
        num_layers=8, hidden_size=512, num_attention_heads=8, ffn_hidden_size=2048,
        seq_length=2048, vocab_size=131_072, activation="squared_relu",
        untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    found = training_flops(grid_25m, ObjectiveConfig(kind="masked"))
    assert found.six_n / found.six_p_and_attention == pytest.approx(3.8, abs=0.05)


def test_generation_by_hand() -> None:
    matrices = 2 * (4 * 8 * 8 + 2 * 8 * 16)
    found = generation_flops(SMALL, new_tokens=3, prompt_tokens=2, num_steps=2)
    pairs = 1 + 2 + 3 + 4 + 5
    assert found.autoregressive == 2 * matrices * 5 + 4 * 2 * 8 * pairs + 3 * 2 * 80
    assert found.diffusion == 2 * (2 * matrices * 5 + 4 * 2 * 8 * 25 + 3 * 2 * 80)


@pytest.mark.parametrize(("tokens", "published"), [(16, 16), (4096, 4700)])
def test_the_published_range(tokens: int, published: float) -> None:
    assert generation_flops(BILLION, new_tokens=tokens).ratio == pytest.approx(published, rel=0.02)


def test_fewer_steps_cost_less() -> None:
    whole = generation_flops(BILLION, new_tokens=256)
    tenth = generation_flops(BILLION, new_tokens=256, num_steps=25)
    assert tenth.ratio / whole.ratio == pytest.approx(25 / 256)
