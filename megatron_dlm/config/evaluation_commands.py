"""Configuration of `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_dlm.config.checks import require, require_positive


@dataclass(frozen=True)
class EvaluateConfig:
    """Loss on shards, or scores on the tasks of lm-eval."""

    model: str
    """Run directory (its newest checkpoint), one checkpoint, or Hugging Face directory."""
    data: list[str] = field(default_factory=list)
    """Datasets to score, each by itself: path prefixes as under data.valid of a run."""
    tasks: list[str] = field(default_factory=list)
    """Tasks or groups of lm-eval to run, such as hellaswag; names may be joined by commas."""
    include_path: list[str] = field(default_factory=list)
    """tasks: folders with YAML files of tasks of your own."""
    num_fewshot: int | None = None
    """tasks: examples in the prompt; default: what the task says."""
    limit: int | None = None
    """Score only this many windows of every dataset, or examples of every task."""
    num_samples: int | None = None
    """Diffusion: draws of noise per window (default 4) or answer (default 128; masked answers of
    one token always take one)."""
    enumerate_masks: Literal["auto", "never", "always"] = "auto"
    """tasks, masked and block diffusion: score an answer (a block of it) on every set of masks
    instead of drawn ones; auto does where that takes no more than num_samples passes."""
    max_new_tokens: int = 256
    """tasks: longest text to generate where the task does not say."""
    seed: int = 0
    """Seed of the noise; the same seed draws the same masks for the same text."""
    batch_size: int = 16
    """Texts in one forward pass."""
    step: int | None = None
    """Take the checkpoint of this step of the run; default: the newest."""
    every_checkpoint: bool = False
    """Evaluate all checkpoints of the run, each into a folder of its own under output_dir
    (iter_0000100), except those that are there already."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it is available."""
    precision: Literal["checkpoint", "fp32", "bf16"] = "checkpoint"
    """Arithmetic of the model; checkpoint: as its weights are stored."""
    output_dir: str | None = None
    """Write results here: data.json and the figure noise_levels.png; tasks.json and
    samples_TASK.jsonl. Default: nowhere, with every_checkpoint evaluations/ in the run; what lies
    there is in the table of `study gather` too."""

    def __post_init__(self) -> None:
        require(
            bool(self.data) or bool(self.tasks),
            "nothing to evaluate; give data (prefixes of shards) or tasks (names of lm-eval)",
        )
        sizes = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
        optional = {"limit": self.limit, "num_samples": self.num_samples}
        sizes |= {name: value for name, value in optional.items() if value is not None}
        require_positive("evaluate", sizes)
        require(
            self.num_fewshot is None or self.num_fewshot >= 0,
            f"num_fewshot is {self.num_fewshot}; it must be at least 0",
        )
        require(
            self.step is None or not self.every_checkpoint,
            f"step {self.step} and every_checkpoint exclude each other; remove one",
        )
        for name in ("include_path", "num_fewshot"):
            require(
                bool(self.tasks) or getattr(self, name) in (None, []),
                f"{name} has no meaning without tasks; give tasks or remove it",
            )

    @property
    def task_names(self) -> list[str]:
        """The names in tasks, one by one."""
        return [name for entry in self.tasks for name in entry.split(",") if name]

    @property
    def data_settings(self) -> dict[str, Any]:
        """What the numbers of data.json depend on, beside the model."""
        return self._settings("data", "limit", "num_samples", "seed", "precision")

    @property
    def task_settings(self) -> dict[str, Any]:
        """What the numbers of tasks.json depend on, beside the model."""
        names = ("num_fewshot", "limit", "num_samples", "enumerate_masks", "max_new_tokens")
        return {"tasks": self.task_names, **self._settings(*names, "seed", "precision")}

    def _settings(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}
