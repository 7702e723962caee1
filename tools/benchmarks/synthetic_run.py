"""A training run on made-up text: everything of `megatron-dlm train` but data, log and checkpoints.

Import only after `open_device`: it has to adapt Megatron Core first.
"""

from __future__ import annotations

import torch

from megatron_dlm.config.derive import num_micro_batches, resolve
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import check_layout, check_tokens
from megatron_dlm.config.validate_kernels import check_kernels
from megatron_dlm.models.build import build_model
from megatron_dlm.models.moe_statistics import metric_names
from megatron_dlm.objectives.base import Objective
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream
from megatron_dlm.runtime.device import Device
from megatron_dlm.runtime.parallel import ParallelContext
from megatron_dlm.runtime.seeding import seed_dropout
from megatron_dlm.training.metrics import Metrics
from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_dlm.training.step import Pass, train_step
from megatron_dlm.training.tensor_overlap import open_tensor_overlap


class SyntheticRun:
    """Model, optimizer and batches of one configuration; `step` is one update."""

    def __init__(self, config: RunConfig, device: Device, parallel: ParallelContext) -> None:
        """Raises ValueError for a configuration that cannot run here."""
        config = resolve(config)
        check_layout(config, parallel.world_size)
        check_tokens(config)
        check_kernels(config)
        self.config, self.device, self.parallel = config, device, parallel
        self._num_micro_batches = num_micro_batches(config, parallel.world_size)
        seed_dropout(config.train.seed, 0, parallel)
        chunks = build_model(
            config.model,
            config.parallel,
            config.objective,
            precision=config.train.precision,
            seed=config.train.seed,
            device=device,
            parallel=parallel,
            optimizer=config.optimizer,
            fp8=config.fp8,
        )
        open_tensor_overlap(config)
        self.chunks = wrap_data_parallel(chunks, config.parallel, parallel)
        self.optimizer = build_optimizer(
            self.chunks,
            config.optimizer.for_batch(config.train.global_batch_size),
            overlap_param_gather=config.parallel.overlap_param_gather,
            parallel_config=config.parallel,
        )
        self.objective = self._build_objective()
        self.pass_setup = self._pass(self.objective)
        self._step = 0

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.config.train.global_batch_size * self.config.model.seq_length

    def scored_with(self, objective: Objective) -> None:
        """Train on with another objective of the same attention."""
        self.pass_setup = self._pass(objective)

    def batches(self) -> list[TokenBatch]:
        """This rank's micro-batches of the next step: uniform tokens, other ones every step."""
        train, model = self.config.train, self.config.model
        assert model.vocab_size is not None
        generator = torch.Generator().manual_seed(train.seed + self._step)
        samples = (train.global_batch_size, model.seq_length + 1)
        # The last id may be the mask token.
        tokens = torch.randint(model.vocab_size - 1, samples, generator=generator)
        valid = torch.ones(samples, dtype=torch.bool)
        index = torch.arange(train.global_batch_size) + self._step * train.global_batch_size
        own = range(
            self.parallel.data.rank * train.micro_batch_size,
            train.global_batch_size,
            train.micro_batch_size * self.parallel.data.size,
        )
        parts = [slice(start, start + train.micro_batch_size) for start in own]
        assert len(parts) == self._num_micro_batches
        return [TokenBatch(tokens[part], valid[part], index[part]) for part in parts]

    def step(self, batches: list[TokenBatch] | None = None) -> float:
        """One update; the loss (nats per token) before it, the same on all ranks."""
        train_step(self.pass_setup, self.optimizer, batches or self.batches())
        self._step += 1
        return float(self.pass_setup.metrics.reduce()["loss"])

    def _build_objective(self) -> Objective:
        config = self.config
        assert config.model.vocab_size is not None
        return build_objective(
            config.objective,
            vocab_size=config.model.vocab_size,
            mask_token_id=config.objective.mask_token_id,
            batch_size=config.train.global_batch_size,
            training=True,
        )

    def _pass(self, objective: Objective) -> Pass:
        return Pass(
            chunks=self.chunks,
            objective=objective,
            seed=self.config.train.seed,
            stream=Stream.TRAINING,
            device=self.device,
            parallel=self.parallel,
            metrics=Metrics(
                (*objective.metric_names, *metric_names(self.config.model)),
                self.device.torch_device,
            ),
            loss_chunk_slots=self.config.train.loss_chunk_slots,
        )
