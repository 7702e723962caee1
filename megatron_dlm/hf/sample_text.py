"""A page of prose and code to compare logits on; written for this purpose."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.data.tokenization.tokenizer import Tokenizer

SAMPLE_TEXT = '''\
The ferry left the island at noon, twenty minutes late, and nobody complained. On the upper deck a
boy counted gulls; when he reached seventeen he began again, because two of them had changed places.
"You cannot count what moves," said his sister. He answered: "Then how do they count the stars?"

A language model gives every next word a probability. If the word that follows was thought unlikely,
the surprise is large: minus the logarithm of that probability, in nats. A diffusion model hides
words at random and learns to restore them from both sides, so its surprise is only bounded from
above. Neither of them knows the sea.

def running_mean(values, window=3):
    """Mean of the last `window` values at every place."""
    total = 0.0
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        yield total / min(i + 1, window)

assert list(running_mean([3, 6, 9, 12])) == [3.0, 4.5, 6.0, 9.0]

In 1869 the canal was 164 km long, 8 m deep and cost 432,807,882 francs; today it is deeper (24 m)
and wider. Le café était fermé, also ging sie weiter; на площади играли дети. 日本語の文も少し。
'''


def sample_tokens(
    model: ModelConfig,
    objective: ObjectiveConfig,
    tokenizer: Tokenizer | None,
    *,
    text: str | None,
    num_tokens: int,
) -> tuple[Tensor, str]:
    """Two windows int64 [2, s] to compare on, and what they are: s at most the model's length.

    Diffusion models get them as in training: half of the slots hold the mask, a quarter of a hybrid
    model's any token, and a block model's clean text stands behind them, int64 [2, 2 s]. Without a
    tokenizer the tokens are arbitrary.
    """
    assert model.vocab_size is not None
    random = np.random.default_rng(0)
    length = max(1, min(model.seq_length, num_tokens // 2))
    if tokenizer is None:
        flat = random.integers(0, model.vocab_size, 2 * length)
        origin = "arbitrary tokens, as no tokenizer is known"
    else:
        flat = np.array(tokenizer.encode(SAMPLE_TEXT if text is None else text))
        origin = "a page of prose and code" if text is None else "the text given"
    if len(flat) < 2:
        raise ValueError("parity_text has fewer than two tokens; name a longer file")
    length = min(length, len(flat) // 2)
    tokens = torch.from_numpy(flat[: 2 * length]).view(2, length)
    mask = objective.mask_token_id
    mask = tokenizer.mask_id if mask is None and tokenizer is not None else mask
    noisy, noise = tokens, torch.from_numpy(random.random(tokens.shape))
    if objective.kind != "autoregressive" and mask is not None:
        noisy = tokens.masked_fill(noise < 0.5, mask)
        origin += ", half of it masked"
    if objective.kind == "hybrid":
        drawn = torch.from_numpy(random.integers(0, model.vocab_size, tokens.shape))
        noisy = torch.where(noise > 0.75, drawn, noisy)
        origin += ", a quarter replaced"
    if objective.kind == "block":
        return torch.cat([noisy, tokens], dim=1), origin + ", and the clean text behind it"
    return noisy, origin
