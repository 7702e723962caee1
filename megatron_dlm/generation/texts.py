"""Prompts in, texts out: tokenizer, batches, sampler and clock around a loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.generation.block_samplers import sample_block
from megatron_dlm.generation.hybrid_noise import HybridNoise
from megatron_dlm.generation.hybrid_samplers import (
    REVERSE_DIFFUSION,
    HybridDecoding,
    sample_hybrid,
)
from megatron_dlm.generation.masked_samplers import REVERSE_PROCESS, MaskedDecoding, sample_masked
from megatron_dlm.generation.prompts import Prompt, encode_template, pad_left
from megatron_dlm.generation.samplers import (
    PLAIN_CHOICE,
    Samples,
    TokenChoice,
    sample_autoregressive,
)
from megatron_dlm.hf.load import LoadedModel

Watch = Callable[[Prompt, Tensor], None]
"""Called with the first prompt of the batch and its tokens (int64 [s]) after every step."""


@dataclass(frozen=True)
class Sampling:
    """How texts are sampled."""

    num_tokens: int = 128
    """New tokens per text."""
    infill: bool = False
    """Fill the gaps of templates instead of continuing prompts."""
    choice: TokenChoice = PLAIN_CHOICE
    decoding: MaskedDecoding = REVERSE_PROCESS
    """Masked and block models."""
    hybrid: HybridDecoding = REVERSE_DIFFUSION
    """Hybrid models."""
    keeps_keys: bool = True
    """Autoregressive models: compute every token once."""
    stop: bool = True
    """End texts at the end-of-document token."""
    seed: int = 0


@dataclass(frozen=True)
class Text:
    """One text and what it cost."""

    model: str
    prompt: str
    sample: int
    """Number of the text among those of its prompt."""
    text: str
    """What follows the prompt; of a template the whole, its gaps filled."""
    is_filled_template: bool
    tokens: list[int]
    """Ids of the new tokens, without the end."""
    num_evaluations: int
    """Forward passes until this text was complete."""
    batch_size: int
    """Texts of the batch that this one was in."""
    seconds: float
    """Time of that batch."""
    tokens_per_second: float
    """Tokens of all texts of that batch per second."""
    seed: int


def generate_texts(
    model: LoadedModel,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    batch_size: int = 8,
    watch: Watch | None = None,
) -> Iterator[Text]:
    """`num_samples` texts for every prompt, in order; yields a batch when it is complete.

    A text depends on the seed and on its number, not on its batch (but for rounding in the model).
    Raises ValueError for a model without tokenizer and for prompts that leave no room.
    """
    writer = _Writer(model, sampling)
    encoded = [writer.encode(text) for text in prompts]
    for number, prompt in enumerate(encoded, start=1):
        _check_room(number, prompt, model, sampling)
    rows = [(row, encoded[row // num_samples]) for row in range(len(encoded) * num_samples)]
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        clock = _Clock()
        samples = writer.sample(batch, clock.without_pauses(watch, batch[0][1]))
        texts = [
            writer.text(prompt, tokens, num_new)
            for (_, prompt), tokens, num_new in zip(
                batch, samples.tokens.tolist(), samples.num_new.tolist(), strict=True
            )
        ]
        seconds = clock.seconds()
        speed = sum(len(tokens) for _, tokens in texts) / seconds
        for place, (row, prompt) in enumerate(batch):
            text, tokens = texts[place]
            yield Text(
                model=model.source,
                prompt=prompt.text,
                sample=row % num_samples,
                text=text,
                is_filled_template=sampling.infill,
                tokens=tokens,
                num_evaluations=int(samples.num_evaluations[place]),
                batch_size=len(batch),
                seconds=seconds,
                tokens_per_second=speed,
                seed=sampling.seed,
            )


def _check_room(number: int, prompt: Prompt, model: LoadedModel, sampling: Sampling) -> None:
    num_new = 0 if sampling.infill else sampling.num_tokens
    if len(prompt.tokens) + num_new > model.max_length:
        raise ValueError(
            f"prompt {number} ({prompt.text[:30]!r}) has {len(prompt.tokens)} tokens and {num_new} "
            f"follow; {model.source} was trained on {model.max_length}: shorten one of them"
        )


class _Writer:
    """Tokens of prompts, sampled tokens and their text, for one model."""

    def __init__(self, model: LoadedModel, sampling: Sampling) -> None:
        if model.tokenizer is None:
            raise ValueError(f"{model.source} has no tokenizer; text needs one")
        self._has_gaps = model.objective_kind != "autoregressive"
        if self._has_gaps and model.mask_token_id is None:
            raise ValueError(
                f"{model.source} is a {model.objective_kind} model but names no mask id"
            )
        if sampling.infill and not self._has_gaps:
            raise ValueError(f"{model.source} is autoregressive; only diffusion models fill gaps")
        self._tokenizer, self._sampling = model.tokenizer, sampling
        self._kind, self._config = model.objective_kind, model.model.config
        self._denoiser, self._device = model.model.denoiser(), model.model.device
        self._mask_id = -1 if model.mask_token_id is None else model.mask_token_id
        eod_id = model.tokenizer.eod_id
        self._eos_id = model.eos_token_id if eod_id is None else eod_id
        # Rows of the embedding behind the vocabulary stand for no text either.
        silent = {*range(model.tokenizer.vocab_size, model.model.config.vocab_size)}
        silent |= {*model.tokenizer.special_ids}
        if not sampling.infill:
            silent -= {self._eos_id}
        forbidden = (*sampling.choice.forbidden_ids, *sorted(silent))
        self._choice = replace(sampling.choice, forbidden_ids=forbidden)

    def encode(self, text: str) -> Prompt:
        """The prompt as tokens; an empty one of an autoregressive model starts behind an end."""
        if self._sampling.infill:
            return encode_template(text, self._tokenizer, self._mask_id)
        tokens = self._tokenizer.encode(text)
        if not tokens and not self._has_gaps and self._eos_id is not None:
            tokens = [self._eos_id]
        return Prompt(text, tokens)

    def sample(
        self, batch: Sequence[tuple[int, Prompt]], watch: Callable[[Tensor], None] | None
    ) -> Samples:
        """Sampled rows for (number of the text, prompt) pairs."""
        sampling = self._sampling
        tokens, valid = pad_left([prompt.tokens for _, prompt in batch], filler=0)
        given: dict[str, Any] = {
            "num_tokens": 0 if sampling.infill else sampling.num_tokens,
            "choice": self._choice,
            "valid": valid.to(self._device),
            "eos_id": self._eos_id if sampling.stop and not sampling.infill else None,
            "seed": sampling.seed,
            "row_ids": torch.tensor([number for number, _ in batch]),
            "watch": watch,
        }
        return self._sampler()(self._denoiser, tokens.to(self._device), **given)

    def _sampler(self) -> Callable[..., Samples]:
        """That of the model's kind, with the options of that kind."""
        sampling, config, mask_id = self._sampling, self._config, self._mask_id
        if self._kind == "autoregressive":
            return partial(sample_autoregressive, cache="exact" if sampling.keeps_keys else "none")
        if self._kind == "hybrid":
            return partial(
                sample_hybrid,
                mask_id=mask_id,
                vocab_size=config.vocab_size,
                noise=noise_of(config),
                decoding=sampling.hybrid,
                prompt_attention=config.prompt_attention,
            )
        decoding = sampling.decoding
        if self._kind == "block":
            size = config.block_size
            return partial(sample_block, mask_id=mask_id, block_size=size, decoding=decoding)
        return partial(sample_masked, mask_id=mask_id, decoding=decoding)

    def text(self, prompt: Prompt, row: Sequence[int], num_new: int) -> tuple[str, list[int]]:
        """Text and ids of what is new in a sampled row; of a template the whole text."""
        if self._sampling.infill:
            filled = list(row[len(row) - len(prompt.tokens) :])
            pairs = zip(filled, prompt.tokens, strict=True)
            return self._tokenizer.decode(filled), [
                token for token, given in pairs if given == self._mask_id
            ]
        start = len(row) - self._sampling.num_tokens
        new = list(row[start : start + num_new])
        # Decoded behind the prompt: some tokenizers drop the blank that a text begins with.
        before = self._tokenizer.decode(prompt.tokens)
        whole = self._tokenizer.decode([*prompt.tokens, *new])
        if whole.startswith(before):
            return whole[len(before) :], new
        return self._tokenizer.decode(new), new


def noise_of(config: Any) -> HybridNoise:
    """The noise of a hybrid model, from the configuration that ships with it."""
    if config.noise_type == "time":
        return HybridNoise(uniform_probability=config.uniform_probability)
    return HybridNoise(config.noise_bias, config.noise_scale)


class _Clock:
    """Seconds since its making, without those spent watching."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def without_pauses(
        self, watch: Watch | None, prompt: Prompt
    ) -> Callable[[Tensor], None] | None:
        """A watch of the first row's tokens that stops this clock."""
        if watch is None:
            return None

        def show(tokens: Tensor) -> None:
            before = time.perf_counter()
            watch(prompt, tokens[0])
            self._started += time.perf_counter() - before

        return show
