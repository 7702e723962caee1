"""A Hugging Face directory of our layout with random weights, large enough for an opinion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer
from megatron_dlm.hf.configuration import write_config
from megatron_dlm.hf.load import special_ids

WINDOW = 64
NUM_UNUSED_ROWS = 8


def write_model(
    directory: Path, tokenizer: Path, objective: ObjectiveConfig, *, num_layers: int = 2
) -> Path:
    """The directory, with a copy of the tokenizer in it."""
    from megatron_dlm.hf.remote_code.configuration_megatron_dlm import MegatronDLMConfig
    from megatron_dlm.hf.remote_code.modeling_megatron_dlm import MegatronDLMForCausalLM

    shutil.copytree(tokenizer, directory)
    vocabulary = load_tokenizer(tokenizer)
    model = ModelConfig(
        num_layers=num_layers,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=WINDOW,
        vocab_size=vocabulary.vocab_size + NUM_UNUSED_ROWS,
        init_method_std=0.3,
    )
    ids = special_ids(vocabulary, vocabulary.mask_id)
    config = write_config(model, objective, "megatron_dlm", ids=ids, dtype="float32")
    torch.manual_seed(7)
    weights = MegatronDLMForCausalLM(MegatronDLMConfig(**config)).state_dict()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        directory / "model.safetensors",
    )
    return directory
