"""One model for all that follows training, from a run, a checkpoint or a Hugging Face directory.

The weights go straight into the small model that ships with exports: no Megatron, no ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.checkpoint.find import find_checkpoint, model_of
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig, ObjectiveKind
from megatron_dlm.config.tokenizer_metadata import holds_tokenizer
from megatron_dlm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.configuration import SpecialIds, read_config, write_config
from megatron_dlm.hf.dtypes import DTYPES
from megatron_dlm.hf.extra import library
from megatron_dlm.hf.layouts import check_expressible
from megatron_dlm.hf.mapping import OUTPUT, ExportedTensor, exported_tensors
from megatron_dlm.hf.safetensors_reader import CONFIG_FILE, SafetensorsDirectory, read_config_file


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and what must be known to use it."""

    model: Any
    """MegatronDLMForCausalLM, whatever the layout of the files."""
    tokenizer: Tokenizer | None
    objective: ObjectiveConfig
    """What was learned. Of an exported directory only what samplers and likelihoods must know."""
    mask_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    max_length: int
    """Longest sequence the model was trained on, in tokens."""
    source: str
    """The directory the weights came from."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What is known of the run: step, manifest or config.json."""

    @property
    def objective_kind(self) -> ObjectiveKind:
        return self.objective.kind


@dataclass(frozen=True)
class _Origin:
    """Where weights come from."""

    model: ModelConfig
    objective: ObjectiveConfig
    ids: SpecialIds
    tokenizer: Tokenizer | None
    read: Callable[[ExportedTensor], Tensor]
    source: Path
    facts: dict[str, Any]


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    step: int | None = None,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """The model of a run directory (its newest whole checkpoint, or that of `step`), of one
    checkpoint directory, or of a Hugging Face directory (exported by us, or stock Qwen3,
    Qwen3-MoE, Qwen2, Llama).

    dtype: fp32, bf16 or fp16; by default as stored. tokenizer: where it lies, by default in the
    directory or where the run was trained with it. Raises ValueError naming the file for what
    cannot be read.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; use {', '.join(DTYPES)}")
    path = Path(path)
    is_hugging_face = (path / CONFIG_FILE).is_file()
    if is_hugging_face and step is not None:
        raise ValueError(f"{path} is a Hugging Face directory; it has no step {step}")
    if is_hugging_face:
        origin = _hugging_face(path, tokenizer)
    else:
        origin = _checkpoint(path, step, tokenizer)
    model = build_inference_model(origin.model, origin.objective, origin.ids)
    wanted = None if dtype is None else DTYPES[dtype]
    state = {
        tensor.name: origin.read(tensor).to(device, torch.float32 if tensor.is_fp32 else wanted)
        for tensor in exported_tensors(origin.model)
    }
    model.load_state_dict(state, assign=True)
    ids = origin.ids
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=origin.tokenizer,
        objective=replace(origin.objective, mask_token_id=ids.mask),
        mask_token_id=ids.mask,
        eos_token_id=ids.eos,
        pad_token_id=ids.pad,
        max_length=origin.model.seq_length,
        source=str(origin.source),
        facts=origin.facts,
    )


def build_inference_model(model: ModelConfig, objective: ObjectiveConfig, ids: SpecialIds) -> Any:
    """MegatronDLMForCausalLM without weights (on the meta device)."""
    library("transformers")
    from megatron_dlm.hf.remote_code.configuration_megatron_dlm import MegatronDLMConfig
    from megatron_dlm.hf.remote_code.modeling_megatron_dlm import MegatronDLMForCausalLM

    check_expressible(model)
    config = write_config(model, objective, "megatron_dlm", ids=ids, dtype="float32")
    with torch.device("meta"):
        return MegatronDLMForCausalLM(MegatronDLMConfig(**config))


def special_ids(
    tokenizer: Tokenizer | None, mask_token_id: int | None, vocab_size: int | None = None
) -> SpecialIds:
    """The ids of a run: the mask as trained, the others from its tokenizer.

    `vocab_size` names the rows of the model, where those behind the tokenizer's are to be silent.
    """
    if tokenizer is None:
        silent = () if mask_token_id is None else (mask_token_id,)
        return SpecialIds(mask=mask_token_id, silent=silent)
    mask = tokenizer.mask_id if mask_token_id is None else mask_token_id
    unused = range(tokenizer.vocab_size, vocab_size or tokenizer.vocab_size)
    silent_ids = {*tokenizer.special_ids, *unused} - {tokenizer.eod_id}
    return SpecialIds(
        mask=mask,
        pad=tokenizer.pad_id,
        bos=tokenizer.bos_id,
        eos=tokenizer.eod_id,
        silent=tuple(sorted(silent_ids)),
    )


def _checkpoint(path: Path, step: int | None, tokenizer_path: str | Path | None) -> _Origin:
    checkpoint = find_checkpoint(path, step)
    model, objective = model_of(checkpoint)
    reader = CheckpointReader(checkpoint.path)
    reader.check(model)
    name = tokenizer_path or checkpoint.manifest["config"]["data"]["tokenizer"]
    tokenizer = None if name is None else load_tokenizer(name)
    assert model.vocab_size is not None
    ids = special_ids(tokenizer, objective.mask_token_id, model.vocab_size)
    facts = {"step": checkpoint.step, "manifest": dict(checkpoint.manifest)}
    return _Origin(model, objective, ids, tokenizer, reader.read, checkpoint.path, facts)


def _hugging_face(path: Path, tokenizer_path: str | Path | None) -> _Origin:
    config = read_config_file(path)
    described = read_config(config, path / CONFIG_FILE)
    weights = SafetensorsDirectory(path)
    weights.check(exported_tensors(described.model), may_hold=[OUTPUT])
    where = tokenizer_path or (path if holds_tokenizer(path) else None)
    tokenizer = None if where is None else load_tokenizer(where)
    return _Origin(
        described.model,
        described.objective,
        _completed(described.ids, tokenizer),
        tokenizer,
        lambda tensor: weights.rows(tensor.name),
        path,
        {"config": config},
    )


def _completed(ids: SpecialIds, tokenizer: Tokenizer | None) -> SpecialIds:
    """The ids of a config.json; what it does not say, from the tokenizer."""
    if tokenizer is None:
        return ids
    return replace(
        ids,
        mask=tokenizer.mask_id if ids.mask is None else ids.mask,
        pad=tokenizer.pad_id if ids.pad is None else ids.pad,
        bos=tokenizer.bos_id if ids.bos is None else ids.bos,
        eos=tokenizer.eod_id if ids.eos is None else ids.eos,
    )
