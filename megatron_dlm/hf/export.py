"""`megatron-dlm export`: a checkpoint of any layout as a Hugging Face directory.

Weights stream from the checkpoint's chunks into safetensors, a block of rows at a time; no ranks,
no model. Everything is written under a temporary name, compared with the checkpoint, and renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

import megatron_dlm
from megatron_dlm.checkpoint.find import find_checkpoint, model_of
from megatron_dlm.checkpoint.retention import Checkpoint
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.hf_commands import ExportConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.data.tokenization.tokenizer import Tokenizer
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.configuration import SpecialIds, write_config
from megatron_dlm.hf.dtypes import DTYPES
from megatron_dlm.hf.layouts import Layout, choose_layout
from megatron_dlm.hf.load import special_ids
from megatron_dlm.hf.mapping import ExportedTensor, exported_tensors
from megatron_dlm.hf.model_card import model_card
from megatron_dlm.hf.parity import Parity, compare
from megatron_dlm.hf.safetensors_reader import CONFIG_FILE
from megatron_dlm.hf.safetensors_writer import Entry, write_sharded
from megatron_dlm.hf.sample_text import sample_tokens
from megatron_dlm.hf.tokenizer_files import TokenizerParity, write_tokenizer

PARITY_FILE = "parity.json"
_UNFINISHED = ".unfinished"
_BLOCK_BYTES = 64 << 20
# What ships beside the weights of our own layout, under the package.
_CODE = (
    "hf/remote_code/configuration_megatron_dlm.py",
    "hf/remote_code/modeling_megatron_dlm.py",
    "hf/remote_code/denoiser.py",
    "hf/remote_code/experts.py",
    "hf/remote_code/layers.py",
    "hf/remote_code/rotary.py",
    "hf/remote_code/visibility.py",
    "generation/samplers.py",
    "generation/masked_samplers.py",
    "generation/hybrid_noise.py",
    "generation/hybrid_samplers.py",
    "generation/block_samplers.py",
)


@dataclass(frozen=True)
class _Subject:
    """What is exported, and as what."""

    checkpoint: Checkpoint
    reader: CheckpointReader
    model: ModelConfig
    objective: ObjectiveConfig
    layout: Layout
    dtype: torch.dtype


def export(config: ExportConfig) -> None:
    """Write and compare; prints where it is. Raises ValueError where the two sides differ."""
    output = Path(config.output_dir)
    subject = _open(config)
    _check_output(output, overwrite=config.overwrite)
    unfinished = output.absolute().with_name(output.absolute().name + _UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tokenizer, tokenizer_parity = _write_tokenizer(subject, config, unfinished)
    assert subject.model.vocab_size is not None
    ids = special_ids(tokenizer, subject.objective.mask_token_id, subject.model.vocab_size)
    _write_settings(subject, ids, unfinished, eager_attention=config.eager_attention)
    _write_weights(subject, unfinished, config.max_shard_bytes)
    parity = _compare(subject, config, unfinished, tokenizer)
    _write_parity(unfinished, parity, tokenizer_parity)
    card = model_card(
        name=config.model_name or output.name,
        license=config.license,
        checkpoint=subject.checkpoint,
        model=subject.model,
        objective=subject.objective,
        layout=subject.layout,
        parity=parity,
    )
    (unfinished / "README.md").write_text(card, encoding="utf-8")
    if parity is not None and not parity.is_equal:
        # Rounding decides between experts of equal scores.
        hint = "; if a token's experts tie, another parity_text passes" * subject.model.moe.is_moe
        raise ValueError(
            f"{unfinished}: the largest difference of a logit is {parity.maximum_difference:.2e}, "
            f"over parity_tolerance {parity.tolerance:.0e} (see {PARITY_FILE}); not published{hint}"
        )
    if output.exists():
        shutil.rmtree(output)
    unfinished.rename(output)
    print(f"exported {subject.checkpoint.path} as {subject.layout}: {output}")
    if parity is not None:
        print(f"largest difference of a logit: {parity.maximum_difference:.1e}")


def _open(config: ExportConfig) -> _Subject:
    checkpoint = find_checkpoint(Path(config.checkpoint), config.step)
    model, objective = model_of(checkpoint)
    layout = choose_layout(model, objective, config.layout)
    reader = CheckpointReader(checkpoint.path)
    reader.check(model)
    stored = reader.stored("embedding.word_embeddings.weight").dtype
    dtype = stored if config.dtype == "checkpoint" else DTYPES[config.dtype]
    return _Subject(checkpoint, reader, model, objective, layout, dtype)


def _check_output(output: Path, *, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    is_export = (output / CONFIG_FILE).is_file() and any(output.glob("*.safetensors"))
    if not is_export:
        raise ValueError(f"output_dir {output} holds other files; name a new directory")
    if not overwrite:
        raise ValueError(f"output_dir {output} holds a model; name another or --overwrite true")


def _write_tokenizer(
    subject: _Subject, config: ExportConfig, directory: Path
) -> tuple[Tokenizer | None, TokenizerParity | None]:
    path = config.tokenizer or subject.checkpoint.manifest["config"]["data"]["tokenizer"]
    if path is None or path == "none":
        return None, None
    tokenizer, parity = write_tokenizer(Path(path), directory, max_length=subject.model.seq_length)
    assert subject.model.vocab_size is not None
    if tokenizer.vocab_size > subject.model.vocab_size:
        raise ValueError(
            f"tokenizer {path} has {tokenizer.vocab_size} tokens, the model "
            f"{subject.model.vocab_size}; name the one it was trained with: --tokenizer DIR"
        )
    return tokenizer, parity


def _write_settings(
    subject: _Subject, ids: SpecialIds, directory: Path, *, eager_attention: bool
) -> None:
    objective, layout = subject.objective, subject.layout
    dtype = str(subject.dtype).removeprefix("torch.")
    settings = write_config(subject.model, objective, layout, ids=ids, dtype=dtype)
    if eager_attention:
        settings["_attn_implementation"] = "eager"
    _write_json(directory / CONFIG_FILE, settings)
    named = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    generation: dict[str, Any] = {name: id for name, id in named.items() if id is not None}
    if ids.silent:
        generation["suppress_tokens"] = list(ids.silent)
    _write_json(directory / "generation_config.json", generation)
    if layout == "megatron_dlm":
        package = Path(megatron_dlm.__file__).parent
        for name in _CODE:
            code = (package / name).read_text(encoding="utf-8")
            # Beside the weights the files find each other by relative imports.
            code = code.replace("from megatron_dlm.generation.", "from .")
            (directory / Path(name).name).write_text(code, encoding="utf-8")


def _write_weights(subject: _Subject, directory: Path, max_shard_bytes: int) -> None:
    tensors = {tensor.name: tensor for tensor in exported_tensors(subject.model)}
    entries = [
        Entry(name, tensor.shape, _dtype_of(tensor, subject)) for name, tensor in tensors.items()
    ]
    total = sum(entry.num_bytes for entry in entries)
    free = shutil.disk_usage(directory).free
    if free < total:
        raise ValueError(
            f"{directory}: the weights take {total / 1e9:.2f} GB but {free / 1e9:.2f} GB are free; "
            "free some space or name another output_dir"
        )
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("writing weights", total=total)

        def blocks(entry: Entry) -> Iterator[Tensor]:
            for block in _blocks(subject, tensors[entry.name]):
                yield block
                progress.advance(bar, block.nbytes)

        write_sharded(directory, entries, blocks, max_shard_bytes=max_shard_bytes)


def _dtype_of(tensor: ExportedTensor, subject: _Subject) -> torch.dtype:
    return torch.float32 if tensor.is_fp32 else subject.dtype


def _blocks(subject: _Subject, tensor: ExportedTensor) -> Iterator[Tensor]:
    dtype = _dtype_of(tensor, subject)
    row_bytes = (tensor.num_columns or 1) * dtype.itemsize
    size = max(1, _BLOCK_BYTES // row_bytes)
    for source in tensor.sources:
        end = source.start + source.num_rows
        for start in range(source.start, end, size):
            count = min(size, end - start)
            rows = subject.reader.rows(source.key, source.layer, start, count)
            yield rows.to(dtype)


def _compare(
    subject: _Subject, config: ExportConfig, directory: Path, tokenizer: Tokenizer | None
) -> Parity | None:
    if not config.parity:
        return None
    text = None if config.parity_text is None else Path(config.parity_text).read_text("utf-8")
    tokens, origin = sample_tokens(
        subject.model, subject.objective, tokenizer, text=text, num_tokens=config.parity_tokens
    )
    return compare(
        directory,
        subject.reader,
        subject.model,
        subject.objective,
        tokens=tokens,
        text=origin,
        tolerance=config.parity_tolerance,
    )


def _write_parity(
    directory: Path, parity: Parity | None, tokenizer: TokenizerParity | None
) -> None:
    found = {} if parity is None else parity.as_dict()
    if tokenizer is not None:
        found["tokenizer"] = tokenizer.as_dict()
    if found:
        _write_json(directory / PARITY_FILE, found)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
