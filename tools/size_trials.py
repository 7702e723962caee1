"""The real model, objective and optimizer at several sizes on the same text.

Import only after `open_device`: on CPU it has to adapt Megatron Core first.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.checks import require
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.optimizer import OptimizerConfig, check_completep, completep_multipliers
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.build import LanguageModel, build_model
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.ops.counter_rng import Stream
from megatron_dlm.runtime.device import Device
from megatron_dlm.runtime.parallel import ParallelContext
from megatron_dlm.runtime.seeding import seed_dropout
from megatron_dlm.training.metrics import Metrics
from megatron_dlm.training.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from megatron_dlm.training.step import Pass, train_step

MASK_ID = 256  # behind the 256 bytes that text is made of
NUM_IDS = MASK_ID + 1


@dataclass(frozen=True)
class Setting:
    """What is the same for models of all sizes."""

    model: ModelConfig
    objective: ObjectiveConfig
    batch_size: int
    seed: int
    text: np.ndarray
    """uint8 [bytes]."""

    def __post_init__(self) -> None:
        length = self.model.seq_length
        require(
            len(self.text) > length + 1,
            f"the text has {len(self.text)} bytes; model.seq_length {length} needs {length + 2}",
        )

    def batch(self, step: int) -> TokenBatch:
        """Windows at random places of the text; the same ones for every model."""
        columns = self.model.seq_length + 1
        random = np.random.default_rng((self.seed, step))
        starts = random.integers(0, len(self.text) - columns, self.batch_size)
        rows = np.stack([self.text[start : start + columns] for start in starts])
        tokens = torch.from_numpy(rows.astype(np.int64))
        index = torch.arange(self.batch_size) + step * self.batch_size
        return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), index)


def read_bytes(paths: Sequence[str]) -> np.ndarray:
    """All files, one after another; without paths the modules of Python's standard library."""
    files = [Path(path) for path in paths]
    files = files or sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    require(bool(files), "the standard library has no sources here; give files with --text")
    return np.frombuffer(b"".join(path.read_bytes() for path in files), dtype=np.uint8)


def sized(model: ModelConfig, optimizer: OptimizerConfig, width: int, depth: int) -> ModelConfig:
    """The model at this width and depth; heads keep their size, CompleteP gets its multipliers."""
    head_size = model.head_size
    require(
        width % head_size == 0,
        f"the width {width} is not a multiple of the heads' size {head_size} (model.kv_channels)",
    )
    changes: dict[str, float] = {"residual_multiplier": 1.0, "output_multiplier": 1.0}
    if optimizer.parametrization == "completep":
        suggested = completep_multipliers(depth, width)
        changes["residual_multiplier"] = suggested.residual_multiplier
        changes["output_multiplier"] = suggested.output_multiplier
    resized = replace(
        model,
        hidden_size=width,
        num_layers=depth,
        num_attention_heads=width // head_size,
        kv_channels=head_size,
        vocab_size=NUM_IDS,
        **changes,
    )
    check_completep(optimizer, resized)
    return resized


class Trial:
    """One model in training."""

    def __init__(
        self,
        setting: Setting,
        optimizer: OptimizerConfig,
        model: ModelConfig,
        *,
        device: Device,
        parallel: ParallelContext,
    ) -> None:
        seed_dropout(setting.seed, 0, parallel)
        config = ParallelConfig()
        chunks = build_model(
            model,
            config,
            setting.objective,
            precision="fp32",
            seed=setting.seed,
            device=device,
            parallel=parallel,
            optimizer=optimizer,
        )
        objective = build_objective(
            setting.objective,
            vocab_size=NUM_IDS,
            mask_token_id=MASK_ID,
            batch_size=setting.batch_size,
            training=True,
        )
        self.model: LanguageModel = chunks[0]
        self._setting = setting
        wrapped = wrap_data_parallel(chunks, config, parallel)
        self._optimizer = build_optimizer(
            wrapped, optimizer.for_batch(setting.batch_size), overlap_param_gather=False
        )
        metrics = Metrics(objective.metric_names, device.torch_device)
        self._pass = Pass(
            wrapped, objective, setting.seed, Stream.TRAINING, device, parallel, metrics
        )

    def step(self, number: int, rate: float) -> float:
        """Update number `number` at this learning rate; returns the bound in nats per token."""
        set_learning_rate(self._optimizer, rate)
        train_step(self._pass, self._optimizer, [self._setting.batch(number)])
        return self._pass.metrics.reduce()["nelbo"]

    @torch.no_grad()
    def logits(self, number: int) -> Tensor:
        """fp32 [b * s, ids] of all slots of batch `number`, without an update."""
        setup = self._pass
        batch = self._setting.batch(number).to(setup.device.torch_device)
        inputs = setup.objective.prepare(batch, setup.seed, setup.stream)
        mask = setup.objective.attention_mask(batch, setup.seed, setup.stream)
        logits = self.model(inputs.tokens, inputs.position_ids, attention_mask=mask)
        return logits[:, :NUM_IDS].float()
