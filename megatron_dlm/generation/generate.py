"""Text from a run directory: loads its newest checkpoint on one rank and samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dlm.checkpoint.retention import whole_checkpoints
from megatron_dlm.config.architecture import ParallelConfig
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.generation.samplers import Denoiser, sample_autoregressive, sample_masked
from megatron_dlm.runtime.device import open_device


class Loaded(NamedTuple):
    """A model ready to sample from."""

    denoiser: Denoiser
    """tokens int64 [b, S] -> logits [b, S, vocab_size], any S."""
    tokenizer: Tokenizer
    config: RunConfig


def sample_run(
    run_directory: str | Path,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Each prompt with its continuation by `num_tokens` tokens, from the newest checkpoint.

    Autoregressive runs sample left to right; masked runs by the reverse process, one step per
    token. Raises ValueError when the directory holds no run, checkpoint or tokenizer.
    """
    texts = []
    with loaded(run_directory) as model:
        for row, prompt in enumerate(prompts):
            tokens = _sample(model, prompt, row, num_tokens, temperature=temperature, seed=seed)
            texts.append(model.tokenizer.decode(tokens[0].tolist()))
    return texts


@contextmanager
def loaded(run_directory: str | Path) -> Iterator[Loaded]:
    """The model of the newest whole checkpoint, on one rank, in evaluation mode."""
    root = Path(run_directory)
    config = parse(RunConfig, ["--config", str(root / "config.yaml")], "generate")
    if config.data.tokenizer is None:
        raise ValueError(f"{root}/config.yaml names no data.tokenizer; text needs one")
    tokenizer = load_tokenizer(config.data.tokenizer)
    whole, _ = whole_checkpoints(root / "checkpoints")
    if not whole:
        raise ValueError(f"{root}/checkpoints holds no whole checkpoint; train first")
    device = open_device(config.train.device)  # before megatron.core is imported
    from megatron_dlm.checkpoint.store import load_weights
    from megatron_dlm.models.build import build_model
    from megatron_dlm.runtime.parallel import parallel_context
    from megatron_dlm.runtime.seeding import seed_dropout

    layout = ParallelConfig()
    with parallel_context(layout, device) as parallel:
        seed_dropout(config.train.seed, 0, parallel)
        (model,) = build_model(
            replace(config.model, recompute_granularity="none"),
            layout,
            config.objective.attention,
            precision=config.train.precision,
            seed=config.train.seed,
            device=device,
            parallel=parallel,
        )
        load_weights(whole[-1], [model], parallel)
        model.eval()

        @torch.no_grad()
        def denoiser(tokens: Tensor) -> Tensor:
            tokens = tokens.to(device.torch_device)
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            logits = model(tokens, positions)[:, : config.model.vocab_size]
            return logits.float().unflatten(0, tuple(tokens.shape))

        yield Loaded(denoiser, tokenizer, config)


def _sample(
    model: Loaded, prompt: str, row: int, num_tokens: int, *, temperature: float, seed: int
) -> Tensor:
    tokenizer = model.tokenizer
    tokens = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64)
    row_ids = torch.tensor([row])
    forbidden = [token for token in tokenizer.special_ids if token != tokenizer.eod_id]
    if model.config.objective.kind == "autoregressive":
        return sample_autoregressive(
            model.denoiser,
            tokens,
            num_tokens=num_tokens,
            temperature=temperature,
            forbidden_ids=forbidden,
            seed=seed,
            row_ids=row_ids,
        )
    return sample_masked(
        model.denoiser,
        tokens,
        num_tokens=num_tokens,
        num_steps=num_tokens,
        mask_id=tokenizer.mask_id,
        order="ancestral",
        temperature=temperature,
        forbidden_ids=forbidden,
        seed=seed,
        row_ids=row_ids,
    )
