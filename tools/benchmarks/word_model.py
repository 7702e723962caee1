"""A small masked-diffusion model of a language whose texts can be checked.

A text is a sequence of words drawn at random from a made-up lexicon; every word begins with a
capital, so any text can be cut into words and each of them is right or wrong.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_dlm.hf.remote_code.configuration_megatron_dlm import MegatronDLMConfig
from megatron_dlm.hf.remote_code.modeling_megatron_dlm import MegatronDLMForCausalLM

NUM_LETTERS = 26  # ids 0..25 are capitals, 26..51 small letters
MASK_ID = 2 * NUM_LETTERS
WINDOW = 256
_NUM_WORDS, _SHORTEST, _LONGEST = 32, 6, 10
# Short windows teach the words, a last fifth of long ones the distances.
_SHORT_WINDOW, _BATCH_TOKENS, _SHORT_SHARE = 64, 1024, 0.8
_LEARNING_RATE, _WARMUP_STEPS = 4e-3, 30


@dataclass(frozen=True)
class Quality:
    """How good sampled texts are."""

    num_words: int
    valid_share: float
    """Of the words that are in the lexicon."""
    standard_error: float
    word_entropy_nats: float
    """Of the valid words; log of the number of words where all are equally frequent."""


class Language:
    """The lexicon and its texts."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.words: list[tuple[int, ...]] = []
        while len(self.words) < _NUM_WORDS:
            capital = self._integers(NUM_LETTERS, 1)
            length = self._integers(_LONGEST - _SHORTEST + 1, 1)[0] + _SHORTEST
            letters = [NUM_LETTERS + i for i in self._integers(NUM_LETTERS, length - 1)]
            self.words.append((*capital, *letters))

    def texts(self, num_rows: int, length: int) -> Tensor:
        """int64 [num_rows, length], one text cut anywhere."""
        num_ids = (num_rows + 1) * length
        drawn = self._integers(_NUM_WORDS, num_ids // _SHORTEST + 1)
        ids = [letter for word in drawn for letter in self.words[word]]
        start = self._integers(length, 1)[0]
        return torch.tensor(ids[start : start + num_rows * length]).view(num_rows, length)

    def hidden(self, num_rows: int, length: int) -> Tensor:
        """bool [num_rows, length]: of every row a uniform number of slots, at least one."""
        counts = torch.tensor(self._integers(length, num_rows))[:, None] + 1
        noise = torch.rand(num_rows, length, generator=self._generator)
        return noise.argsort(1).argsort(1) < counts

    def quality(self, texts: Tensor) -> Quality:
        """Of the words that begin and end inside the rows of texts, int64 [b, s]."""
        words = [word for row in texts.tolist() for word in _cut(row)]
        valid = Counter(word for word in words if word in set(self.words))
        share = valid.total() / len(words)
        frequencies = [count / valid.total() for count in valid.values()]
        return Quality(
            num_words=len(words),
            valid_share=share,
            standard_error=math.sqrt(share * (1 - share) / len(words)),
            word_entropy_nats=-sum(p * math.log(p) for p in frequencies),
        )

    def _integers(self, high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=self._generator).tolist()


def _cut(row: list[int]) -> Iterator[tuple[int, ...]]:
    starts = [place for place, letter in enumerate(row) if letter < NUM_LETTERS]
    for start, stop in pairwise(starts):
        yield tuple(row[start:stop])


def train(language: Language, num_steps: int, *, seed: int) -> Any:
    """A three-layer model, trained on the count form of the bound; tells how it goes."""
    torch.manual_seed(seed)
    config = MegatronDLMConfig(
        vocab_size=MASK_ID + 1,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        mask_token_id=MASK_ID,
    )
    model = MegatronDLMForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    started = time.perf_counter()
    for step in range(num_steps):
        rate = min(1.0, (step + 1) / _WARMUP_STEPS) * (1 - step / num_steps)
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * rate
        length = _SHORT_WINDOW if step < _SHORT_SHARE * num_steps else WINDOW
        loss = _loss(model, language, _BATCH_TOKENS // length, length)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % (num_steps // 5) == 0:
            seconds = time.perf_counter() - started
            print(
                f"  step {step + 1}: {loss.item():.3f} nats per token, {seconds:.0f} s", flush=True
            )
    return model.eval().requires_grad_(False)


def _loss(model: Any, language: Language, num_rows: int, length: int) -> Tensor:
    """Mean over the rows of the mean cross entropy of their hidden slots."""
    clean, hidden = language.texts(num_rows, length), language.hidden(num_rows, length)
    logits = model(clean.masked_fill(hidden, MASK_ID)).logits
    losses = functional.cross_entropy(logits.flatten(0, 1), clean.flatten(), reduction="none")
    return (losses.view_as(clean) * hidden / hidden.sum(1, keepdim=True)).sum() / num_rows
