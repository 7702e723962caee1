"""Tiny models of transformers' own classes, with arbitrary weights, saved as the Hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 45
FAMILIES = ("qwen3", "qwen2", "llama")
_PREFIXES = {"qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "qwen2": "Qwen2", "llama": "Llama"}


def write_stock(family: str, directory: Path, **changes: Any) -> nn.Module:
    """Save a tiny model of the family; returns it."""
    import transformers

    prefix = _PREFIXES[family]
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-3,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 3,
    }
    if family.startswith("qwen3"):
        settings["head_dim"] = 10
    if family == "qwen3_moe":
        settings |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**settings, **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(directory, max_shard_size="15KB")
    return model


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).logits
