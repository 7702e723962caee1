"""Small models of every kind with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_models import write_model
from tiny_corpus import TinyCorpus

from megatron_dlm.config.objective import ObjectiveConfig


@pytest.fixture(scope="session")
def models(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directory of every kind."""
    root = tmp_path_factory.mktemp("models")
    ar, masked = ObjectiveConfig(kind="autoregressive"), ObjectiveConfig()
    hybrid = ObjectiveConfig(kind="hybrid", noise_type="low_uniform")
    objectives = {
        "ar": ar,
        "masked": masked,
        "shallow": masked,
        "hybrid": hybrid,
        "prompted": replace(hybrid, noise_type="balanced", prompt_share=0.2),
        "block": ObjectiveConfig(kind="block", block_size=4),
    }
    return {
        name: write_model(
            root / name, tiny_corpus.tokenizer, objective, num_layers=1 + (name != "shallow")
        )
        for name, objective in objectives.items()
    }
