"""The run configuration: one flat, frozen dataclass per section; `RunConfig` composes them.

Attribute docstrings are the `--help` text. Each section checks its own fields; rules that span
sections live in `config/validate.py`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.checks import require, require_positive
from megatron_dlm.config.fp8 import Fp8Config
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.optimizer import OptimizerConfig, ScheduleConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.recovery import RecoveryConfig


@dataclass(frozen=True)
class DataConfig:
    """Which tokens are read, and in which order."""

    train: dict[str, float] = field(default_factory=dict)
    """Training datasets: path prefix (PREFIX.dataset.json or PREFIX.bin/.idx) -> weight in the
    blend."""
    valid: dict[str, float] = field(default_factory=dict)
    """Validation datasets: path prefix -> weight; empty means no validation."""
    tokenizer: str | None = None
    """Tokenizer directory; gives the vocabulary size and special ids, checked against shards."""
    unique_tokens: int | None = None
    """Train on exactly this many tokens, repeated epoch after epoch; default: all of them."""
    packing: Literal["concat", "pack", "document"] = "concat"
    """Samples are cut across documents (concat), hold whole documents by best fit (pack), or one
    document (document). The last two cut only what is longer than model.seq_length, and pad."""
    reset_attention_mask: bool | None = None
    """Attention stays inside a document and positions restart in each; default: false for concat,
    always true for pack and document."""
    seed: int = 1234
    """Seed of the document order, the unique subset and the shuffle of each epoch."""

    def __post_init__(self) -> None:
        for name in ("train", "valid"):
            for prefix, weight in getattr(self, name).items():
                require(
                    weight > 0, f"data.{name}: the weight of {prefix} is {weight}; it must be > 0"
                )
        require(
            self.unique_tokens is None or self.unique_tokens > 0,
            f"data.unique_tokens is {self.unique_tokens}; it must be greater than 0",
        )
        require(
            self.packing == "concat" or self.reset_attention_mask is not False,
            f"data.reset_attention_mask is false, but data.packing {self.packing} pads its "
            "samples, and attention would see the padding; remove it or use concat",
        )

    @property
    def resets_attention(self) -> bool:
        """Attention and positions stay inside a document."""
        return self.packing != "concat" or bool(self.reset_attention_mask)


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision and place of the run. Give exactly one of steps, tokens, epochs."""

    steps: int | None = None
    """Optimizer updates in the whole run."""
    tokens: int | None = None
    """Tokens in the whole run, repeats included; rounded up to whole steps."""
    epochs: float | None = None
    """Passes over the unique tokens; rounded up to whole steps."""
    global_batch_size: int = 8
    """Samples in one step, over all ranks."""
    micro_batch_size: int = 1
    """Samples of one rank in one forward pass."""
    loss_chunk_slots: int | None = None
    """Run output layer and loss on this many scored slots at a time, so that the logits of a whole
    micro-batch never live together; default: on all at once."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Arithmetic of the forward and backward pass; optimizer state is always fp32. fp8: matrices of
    the layers in FP8 (section fp8), the rest in bf16."""
    seed: int = 1234
    """Seed of the initial weights, the noise and the dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it is available."""
    deterministic: bool = False
    """Only kernels and collectives whose results repeat bit for bit; slower on GPUs."""
    output_dir: str = "runs/default"
    """Run directory: config, metrics, logs and checkpoints."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest whole checkpoint of output_dir; never sets that run aside."""
    start_from: str | None = None
    """A new run goes on from a checkpoint of another run (its directory, or one iter_NNNNNNN in
    it): same weights, moments, step and place in the data, such as to decay the rate from there."""

    def __post_init__(self) -> None:
        given = {
            name: value
            for name in ("steps", "tokens", "epochs")
            if (value := getattr(self, name)) is not None
        }
        require(
            len(given) <= 1,
            f"give exactly one of train.steps, train.tokens, train.epochs; got {', '.join(given)}",
        )
        require_positive("train", given)
        batch = {
            "global_batch_size": self.global_batch_size,
            "micro_batch_size": self.micro_batch_size,
        }
        require_positive("train", batch)
        chunk = self.loss_chunk_slots
        require(
            chunk is None or chunk > 0,
            f"train.loss_chunk_slots is {chunk}; it must be greater than 0",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    interval_steps: int = 1000
    """Save every this many steps; the last step is always saved."""
    keep_last: int = 2
    """Keep the newest N checkpoints; 0 keeps all."""
    keep_every_steps: int | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    asynchronous: bool = False
    """Write in a background process while training goes on."""
    verify: Literal["checksums", "sizes"] = "checksums"
    """Before a run goes on from a checkpoint: read every file and compare its checksum (shared out
    over ranks, about 1.7 GB/s a core), or compare only sizes."""

    def __post_init__(self) -> None:
        require_positive("checkpoint", {"interval_steps": self.interval_steps})
        require(self.keep_last >= 0, f"checkpoint.keep_last is {self.keep_last}; it must be >= 0")
        every = self.keep_every_steps
        require(
            every is None or every > 0,
            f"checkpoint.keep_every_steps is {every}; it must be greater than 0",
        )


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out shards with fixed noise."""

    interval_steps: int = 1000
    """Validate every this many steps and after the last one."""
    num_samples: int = 64
    """Samples per validation; the same ones every time."""
    seed: int = 4321
    """Seed of the validation noise; the same at every validation."""

    def __post_init__(self) -> None:
        sizes = {"interval_steps": self.interval_steps, "num_samples": self.num_samples}
        require_positive("validation", sizes)


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported and how often."""

    interval_steps: int = 10
    """Reduce and report the metrics every this many steps."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (the wandb package must be installed)."""
    noise_level_buckets: int = 10
    """Validation of diffusion also reports the loss in this many equal ranges of the noise level;
    0 leaves it out."""
    norms_interval_steps: int | None = None
    """Report the gradient and parameter norms of every layer every this many steps, a multiple of
    logging.interval_steps; default: never."""
    histogram_interval_steps: int | None = None
    """Write histograms of all parameters and gradients to TensorBoard every this many steps, a
    multiple of logging.interval_steps; default: never."""

    def __post_init__(self) -> None:
        require_positive("logging", {"interval_steps": self.interval_steps})
        require(
            0 <= self.noise_level_buckets <= 100,
            f"logging.noise_level_buckets is {self.noise_level_buckets}; it must lie in [0, 100]",
        )
        for name in ("norms_interval_steps", "histogram_interval_steps"):
            steps = getattr(self, name)
            require(
                steps is None or (steps > 0 and steps % self.interval_steps == 0),
                f"logging.{name} is {steps}; it must be a multiple of logging.interval_steps "
                f"{self.interval_steps}",
            )
        require(
            self.tensorboard or self.histogram_interval_steps is None,
            "logging.histogram_interval_steps writes to TensorBoard, but logging.tensorboard is "
            "false; remove one",
        )


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
