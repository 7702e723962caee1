"""Configuration of `generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dlm.config.checks import require, require_positive


@dataclass(frozen=True)
class GenerateConfig:
    """Text from a trained model, or from several side by side."""

    model: str | None = None
    """Run directory (its newest checkpoint), one checkpoint, or Hugging Face directory."""
    compare: list[str] = field(default_factory=list)
    """Two or more models instead of one: their texts side by side. Options of masked diffusion
    then concern the masked models alone."""
    prompt: list[str] = field(default_factory=list)
    """Texts to continue; "" begins a text. One that starts with [ is written as a YAML list."""
    prompts_file: str | None = None
    """File with more prompts: one per line, or .jsonl with objects that have a `prompt`; - reads
    standard input. Without any prompt, standard input is read unless it is a terminal."""
    infill: bool = False
    """Fill gaps instead of continuing: <mask:8> in a prompt stands for eight masks."""
    num_tokens: int = 128
    """New tokens per text; fewer where a text ends, and as many as the gaps have with infill."""
    num_samples: int = 1
    """Texts per prompt."""
    temperature: float = 1.0
    """1 is the model's own law, lower is bolder, 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that together have this probability."""
    order: Literal[
        "auto",
        "first_hitting",
        "ancestral",
        "random",
        "low_confidence",
        "top_margin",
        "entropy",
    ] = "auto"
    """Masked: which masks a step reveals. first_hitting: the exact reverse process, one token per
    pass; ancestral: the same in num_steps steps; random: equal shares; low_confidence, top_margin,
    entropy: equal shares, surest first. auto: low_confidence with a threshold, ancestral with
    num_steps, else first_hitting."""
    num_steps: int | None = None
    """Masked: steps per text; a multiple of its number of blocks. Default: one per token."""
    block_size: int | None = None
    """Masked: fill blocks of this many tokens from left to right. Default: all at once."""
    threshold: float | None = None
    """Masked: a step reveals all tokens that are more probable than this, at least one."""
    guidance: float = 0.0
    """Masked: weight of classifier-free guidance by the prompt; two passes per step."""
    cache: Literal["exact", "none", "prompt", "prefix", "dual"] = "exact"
    """Reuse of keys and values. exact: all that changes nothing (autoregressive: every token is
    computed once; masked: none). Masked, approximate: prompt: the prompt's; prefix: all left of
    the block; dual: all but the block."""
    stop: bool = True
    """End a text at the end-of-document token."""
    seed: int = 0
    """Seed of all draws; a text does not depend on the others of its batch."""
    batch_size: int = 8
    """Texts generated at once."""
    step: int | None = None
    """Take the checkpoint of this step of the run; default: the newest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it is available."""
    precision: Literal["checkpoint", "fp32", "bf16"] = "checkpoint"
    """Arithmetic of the model; checkpoint: as its weights are stored."""
    output: str | None = None
    """Also write one JSON object per text to this .jsonl file; - writes them to standard output
    instead of the texts."""
    live: bool = False
    """Watch the tokens appear, one text after the other, in a terminal."""
    live_pause_seconds: float = 0.0
    """live: pause after every step, so that the eye can follow a small model."""

    def __post_init__(self) -> None:
        require(
            (self.model is None) != (not self.compare),
            "give exactly one of model (one path) and compare (two or more paths)",
        )
        require(
            len(self.compare) != 1,
            f"compare has one model, {self.compare[:1]}; give two or more, or use model",
        )
        sizes = {
            "num_tokens": self.num_tokens,
            "num_samples": self.num_samples,
            "batch_size": self.batch_size,
        }
        require_positive("generate", sizes)
        require(
            0 <= self.seed < 2**63, f"seed is {self.seed}; it must be at least 0 and below 2^63"
        )
        require(
            self.live_pause_seconds >= 0,
            f"live_pause_seconds is {self.live_pause_seconds}; it must be at least 0",
        )
        require(
            self.live or not self.live_pause_seconds,
            "live_pause_seconds has no meaning without live; set live to true",
        )
        require(
            not (self.live and self.output == "-"),
            "live draws on standard output, where output - writes; give output a file name",
        )

    @property
    def masked_options(self) -> dict[str, object]:
        """Those that only masked diffusion has, as far as they were set."""
        unset: dict[str, tuple[object, ...]] = {
            "order": ("auto",),
            "num_steps": (None,),
            "block_size": (None,),
            "threshold": (None,),
            "guidance": (0.0,),
            "cache": ("exact", "none"),
        }
        found = {name: getattr(self, name) for name in unset}
        return {name: value for name, value in found.items() if value not in unset[name]}
