"""`megatron-dlm import`: a Hugging Face directory as the first checkpoint of a run, on any layout.

The run directory gets checkpoints/iter_0000000 (weights, no optimizer state), from which
`megatron-dlm train` goes on by itself, tokenizer/, and imported.yaml with the settings that the
weights imply.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import yaml
from rich.progress import Progress
from torch import Tensor

from megatron_dlm.checkpoint.new_run import implied_settings, refuse_used_directory
from megatron_dlm.checkpoint.writer import write_checkpoint
from megatron_dlm.config.architecture import ModelConfig, weight_settings
from megatron_dlm.config.hf_commands import ImportConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.tokenizer_metadata import TOKENIZER_FILES, holds_tokenizer
from megatron_dlm.config.validate_moe import check_moe
from megatron_dlm.data.tokenization.tokenizer_source import TokenizerSource, read_source
from megatron_dlm.hf.configuration import Described, read_config
from megatron_dlm.hf.dtypes import DTYPES
from megatron_dlm.hf.mapping import (
    EMBEDDING,
    OUTPUT,
    CheckpointTensor,
    checkpoint_tensors,
    exported_tensors,
)
from megatron_dlm.hf.mask_token import MaskPlan, mask_rows, plan_mask, with_mask
from megatron_dlm.hf.safetensors_reader import CONFIG_FILE, SafetensorsDirectory, read_config_file
from megatron_dlm.models.accounting import count_parameters

SETTINGS_FILE = "imported.yaml"
_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class _Subject:
    """What is imported, and as what."""

    path: Path
    described: Described
    weights: SafetensorsDirectory
    model: ModelConfig
    """With the vocabulary and the length of the run."""
    mask: MaskPlan
    source: TokenizerSource | None
    dtype: torch.dtype


def import_model(config: ImportConfig) -> None:
    """Write the run directory; prints what to type next."""
    subject = _open(config)
    objective = _objective(config, subject)
    # Not every objective may have every kind of experts.
    check_moe(RunConfig(model=subject.model, objective=objective), world_size=1)
    output = Path(config.output_dir)
    refuse_used_directory(output, SETTINGS_FILE)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = None
    if subject.source is not None:
        tokenizer = output / "tokenizer"
        _write_tokenizer(subject, tokenizer, config.mask_token)
    tokenizer_name = None if tokenizer is None else str(tokenizer)
    settings = implied_settings(subject.model, objective, tokenizer_name, output)
    (output / SETTINGS_FILE).write_text(yaml.safe_dump(settings, sort_keys=False))
    path = _write_checkpoint(subject, objective, tokenizer, output)
    print(f"imported {subject.path} ({subject.described.layout}): {path}")
    if subject.mask.token_id is not None:
        print(f"mask: id {subject.mask.token_id}, {subject.mask.origin}")
    print(f"train it: megatron-dlm train --config {output / SETTINGS_FILE} --config YOURS.yaml")


def _open(config: ImportConfig) -> _Subject:
    path = Path(config.model)
    described = read_config(read_config_file(path), path / CONFIG_FILE)
    weights = SafetensorsDirectory(path)
    is_tied = not described.model.untie_embeddings_and_output_weights
    weights.check(exported_tensors(described.model), may_hold=[OUTPUT] if is_tied else [])
    if is_tied and OUTPUT in weights.names:
        _check_tied(weights)
    source = _tokenizer_source(config, path)
    mask = plan_mask(config, described, source, str(path))
    model = replace(
        described.model,
        vocab_size=mask.vocab_size,
        seq_length=config.seq_length or described.model.seq_length,
        make_vocab_size_divisible_by=config.make_vocab_size_divisible_by,
    )
    dtype = weights.dtype(EMBEDDING) if config.dtype == "same" else DTYPES[config.dtype]
    return _Subject(path, described, weights, model, mask, source, dtype)


def _check_tied(weights: SafetensorsDirectory) -> None:
    """A head that is written although it is tied must be the embedding."""
    num_rows = weights.shape(EMBEDDING)[0]
    for start in range(0, num_rows, _BLOCK_ROWS):
        count = min(_BLOCK_ROWS, num_rows - start)
        if not torch.equal(
            weights.rows(EMBEDDING, start, count), weights.rows(OUTPUT, start, count)
        ):
            raise ValueError(
                f"{weights.path / CONFIG_FILE} says tie_word_embeddings, but {OUTPUT} differs from "
                f"{EMBEDDING}; set it to false"
            )


def _tokenizer_source(config: ImportConfig, path: Path) -> TokenizerSource | None:
    if config.tokenizer == "none":
        return None
    if config.tokenizer is not None:
        return read_source(Path(config.tokenizer))
    if not holds_tokenizer(path):
        raise ValueError(
            f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); name one with --tokenizer, "
            "or --tokenizer none to go without"
        )
    return read_source(path)


def _write_tokenizer(subject: _Subject, directory: Path, mask_token: str) -> None:
    assert subject.source is not None
    source, token = subject.source, subject.mask.token_id
    if token is not None:
        source = with_mask(source, token, mask_token)
    directory.mkdir(exist_ok=True)
    for name, content in source.files.items():
        (directory / name).write_bytes(content)
    source.metadata.write(directory)


def _objective(config: ImportConfig, subject: _Subject) -> ObjectiveConfig:
    """What the model learned, or the defaults of what it is to learn."""
    learned = subject.described.objective
    kind = learned.kind if config.objective == "same" else config.objective
    objective = learned if kind == learned.kind else ObjectiveConfig(kind=kind)
    return replace(objective, mask_token_id=subject.mask.token_id)


def _write_checkpoint(
    subject: _Subject, objective: ObjectiveConfig, tokenizer: Path | None, output: Path
) -> Path:
    config = asdict(RunConfig(model=subject.model, objective=objective))
    config["data"]["tokenizer"] = None if tokenizer is None else str(tokenizer)
    config["train"]["output_dir"] = str(output)
    description = {
        "model": weight_settings(subject.model),
        "data": {"digest": None},
        "config": config,
        "num_parameters": count_parameters(subject.model).total,
        "imported_from": {"path": str(subject.path), "mask": asdict(subject.mask)},
    }
    is_tied = not subject.model.untie_embeddings_and_output_weights
    new_rows = mask_rows(subject.mask, subject.weights, is_tied=is_tied)
    tensors = checkpoint_tensors(subject.model)
    with Progress() as progress:
        bar = progress.add_task("writing the checkpoint", total=len(tensors))

        def read(tensor: CheckpointTensor) -> Tensor:
            progress.advance(bar)
            return _read(tensor, subject, new_rows)

        dtypes = {tensor.key: _dtype_of(tensor, subject) for tensor in tensors}
        return write_checkpoint(
            output / "checkpoints", tensors, read, dtype=dtypes, description=description
        )


def _dtype_of(tensor: CheckpointTensor, subject: _Subject) -> torch.dtype:
    return torch.float32 if tensor.is_fp32 else subject.dtype


def _read(tensor: CheckpointTensor, subject: _Subject, new_rows: dict[str, Tensor]) -> Tensor:
    """A tensor of the checkpoint from the rows of the files; rows that only pad are zero."""
    values = torch.zeros(tensor.shape, dtype=_dtype_of(tensor, subject))
    row = 0
    for part in tensor.parts:
        if part.name is not None:
            # A row that is added to the vocabulary is not in the files.
            available = min(part.num_rows, subject.weights.shape(part.name)[0] - part.start)
            for start in range(0, available, _BLOCK_ROWS):
                count = min(_BLOCK_ROWS, available - start)
                block = subject.weights.rows(part.name, part.start + start, count)
                values[row + start : row + start + count] = block
            if part.name in new_rows:
                assert subject.mask.token_id is not None
                values[row + subject.mask.token_id] = new_rows[part.name][0].to(subject.dtype)
        row += part.num_rows
    return values
