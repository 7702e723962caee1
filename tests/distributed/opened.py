"""A model on a layout, and the pass that trains it; opened inside the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig

if TYPE_CHECKING:
    from megatron_dlm.objectives.base import Objective
    from megatron_dlm.runtime.device import Device
    from megatron_dlm.runtime.parallel import ParallelContext
    from megatron_dlm.training.step import Pass

VOCAB_SIZE, MASK_ID, GLOBAL_BATCH, SEED = 77, 76, 8, 11


@dataclass(frozen=True)
class Opened:
    """What a rank holds of a model."""

    model: ModelConfig
    objective: ObjectiveConfig
    chunks: list[Any]
    device: Device
    parallel: ParallelContext

    @property
    def chunk(self) -> Any:
        """The only one."""
        [chunk] = self.chunks
        return chunk

    def built_objective(self) -> Objective:
        """For global batches of 8 samples."""
        from megatron_dlm.objectives.build import build_objective

        return build_objective(
            self.objective,
            vocab_size=VOCAB_SIZE,
            mask_token_id=MASK_ID,
            batch_size=GLOBAL_BATCH,
            training=True,
        )

    def pass_of(
        self,
        wrapped: list[Any],
        objective: Objective | None = None,
        *,
        loss_chunk_slots: int | None = None,
    ) -> Pass:
        """The training pass of the wrapped chunks, with the metrics of objective and experts."""
        from megatron_dlm.models.moe_statistics import metric_names
        from megatron_dlm.ops.counter_rng import Stream
        from megatron_dlm.training.metrics import Metrics
        from megatron_dlm.training.step import Pass

        objective = objective or self.built_objective()
        names = (*objective.metric_names, *metric_names(self.model))
        return Pass(
            chunks=wrapped,
            objective=objective,
            seed=SEED,
            stream=Stream.TRAINING,
            device=self.device,
            parallel=self.parallel,
            metrics=Metrics(names, self.device.torch_device),
            loss_chunk_slots=loss_chunk_slots,
        )


@contextmanager
def opened_model(
    layout: ParallelConfig,
    model: ModelConfig,
    objective: ObjectiveConfig | None = None,
    *,
    precision: str = "fp32",
    seed: int = SEED,
    device: str = "cpu",
    optimizer: OptimizerConfig | None = None,
) -> Iterator[Opened]:
    """The layout lasts as long as the context."""
    from megatron_dlm.models.build import build_model
    from megatron_dlm.runtime.device import open_device
    from megatron_dlm.runtime.parallel import laid_out
    from megatron_dlm.runtime.seeding import seed_dropout

    objective = objective or ObjectiveConfig()
    opened = open_device(device)
    with laid_out(layout) as parallel:
        seed_dropout(seed, 0, parallel)
        chunks = build_model(
            model,
            layout,
            objective,
            precision=precision,
            seed=seed,
            device=opened,
            parallel=parallel,
            optimizer=optimizer or OptimizerConfig(),
        )
        yield Opened(model, objective, chunks, opened, parallel)
