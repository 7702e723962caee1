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

    Half of the slots of a masked model hold the mask, as in training. Without a tokenizer the
    tokens are arbitrary.
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
    if objective.kind == "masked" and objective.mask_token_id is not None:
        is_hidden = torch.from_numpy(random.random(tokens.shape) < 0.5)
        tokens = tokens.masked_fill(is_hidden, objective.mask_token_id)
        origin += ", half of it masked"
    return tokens, origin
