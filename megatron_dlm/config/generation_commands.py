"""Configuration of `generate`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_dlm.config.checks import require, require_positive
from megatron_dlm.config.objective import ObjectiveKind


@dataclass(frozen=True)
class GenerateConfig:
    """Text from a trained model, or from several side by side."""

    model: str | None = None
    """Run directory (its newest checkpoint), one checkpoint, or Hugging Face directory."""
    compare: list[str] = field(default_factory=list)
    """Two or more models instead of one: their texts side by side. Options of one kind of model
    then concern the models of that kind alone."""
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
    """Masked, block: which masks a step reveals. first_hitting: the exact reverse process, one
    token per pass; ancestral: the same in num_steps steps; random: equal shares; low_confidence,
    top_margin, entropy: equal shares, surest first. auto: low_confidence with a threshold,
    ancestral with num_steps, else first_hitting."""
    num_steps: int | None = None
    """Diffusion: steps per text. Masked: a multiple of the number of blocks; masked and block: by
    default one per token. Hybrid: by default 128, or one per tokens_per_step tokens if adaptive."""
    block_size: int | None = None
    """Masked: fill blocks of this many tokens from left to right. Default: all at once. (Block
    diffusion takes the size it was trained with.)"""
    threshold: float | None = None
    """Masked, block: a step reveals all tokens that are more probable than this, at least one."""
    guidance: float = 0.0
    """Masked: weight of classifier-free guidance by the prompt; two passes per step."""
    cache: Literal["exact", "none", "prompt", "prefix", "dual"] = "exact"
    """Reuse of keys and values. exact: all that changes nothing (autoregressive and block: what is
    finished is computed once; hybrid: a prompt that sees no noise; masked: none). Masked,
    approximate: prompt: the prompt's; prefix: all left of the block; dual: all but the block."""
    method: Literal["ancestral", "adaptive"] = "ancestral"
    """Hybrid. ancestral: the reverse process in num_steps steps; adaptive: every step replaces the
    tokens that are the least probable beside the likeliest."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Hybrid, ancestral: how the share of noise falls over the steps."""
    prior: Literal["noise", "mask", "uniform"] = "noise"
    """Hybrid: the text before the first step: as in training, masks, or uniform tokens."""
    tokens_per_step: int = 1
    """Hybrid, adaptive: tokens that one step may replace."""
    patience: int | None = None
    """Hybrid, adaptive: stop after so many steps in a row that change nothing."""
    correction_steps: int = 0
    """Hybrid: then, up to so many times, replace the token that the model finds least likely beside
    its own choice; needs uniform noise in training."""
    correction_temperature: float = 0.1
    """Hybrid: temperature of the tokens that corrections draw."""
    correction_patience: int = 32
    """Hybrid: stop corrections after so many in a row without a better text."""
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

    def foreign_options(self, kind: ObjectiveKind) -> dict[str, object]:
        """Those that models of this kind do not have, as far as they were set."""
        found = {}
        for name, kinds in _KINDS_OF_OPTION.items():
            value = getattr(self, name)
            is_set = value != self.__dataclass_fields__[name].default
            is_common = name == "cache" and value == "none"
            if is_set and not is_common and kind not in kinds:
                found[name] = value
        return found

    def of_kind(self, kind: ObjectiveKind) -> GenerateConfig:
        """The same without the options that models of this kind do not have."""
        defaults: dict[str, Any] = {
            name: self.__dataclass_fields__[name].default for name in self.foreign_options(kind)
        }
        return replace(self, **defaults)


def kinds_of_option(name: str) -> tuple[ObjectiveKind, ...]:
    """The kinds of models that have an option of `foreign_options`."""
    return _KINDS_OF_OPTION[name]


_KINDS_OF_OPTION: dict[str, tuple[ObjectiveKind, ...]] = {
    "order": ("masked", "block"),
    "num_steps": ("masked", "block", "hybrid"),
    "block_size": ("masked",),
    "threshold": ("masked", "block"),
    "guidance": ("masked",),
    "cache": ("masked",),
    "method": ("hybrid",),
    "schedule": ("hybrid",),
    "prior": ("hybrid",),
    "tokens_per_step": ("hybrid",),
    "patience": ("hybrid",),
    "correction_steps": ("hybrid",),
    "correction_temperature": ("hybrid",),
    "correction_patience": ("hybrid",),
}
