"""Text from an exported model with `transformers` alone, as anyone would who has the directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.hf.extra import library


@dataclass(frozen=True)
class Written:
    """Texts of one model."""

    loaded_as: str
    """The class that transformers made of the directory, and where its code comes from."""
    texts: list[str]
    """Every prompt with what follows it."""


def write_texts(
    directory: Path,
    prompts: Sequence[str],
    *,
    trust_remote_code: bool,
    num_tokens: int,
    temperature: float,
    seed: int,
) -> Written:
    """Load `directory` and continue every prompt by at most `num_tokens` tokens.

    Without `trust_remote_code` only classes of transformers itself are loaded.
    """
    transformers = library("transformers")
    transformers.utils.logging.disable_progress_bar()
    trust = {"trust_remote_code": trust_remote_code}
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **trust)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **trust)
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    transformers.set_seed(seed)
    tokens = model.generate(
        **batch, max_new_tokens=num_tokens, do_sample=True, temperature=temperature
    )
    origin = "code of the directory" if trust_remote_code else "class of transformers"
    return Written(
        f"{type(model).__name__}, {origin}",
        tokenizer.batch_decode(tokens, skip_special_tokens=True),
    )
