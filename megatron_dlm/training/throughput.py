"""How fast training goes: tokens per second, waiting for data, model FLOPs utilisation."""

from __future__ import annotations

import time
from collections.abc import Iterator

from megatron_dlm.config.schema import RunConfig
from megatron_dlm.models.accounting import training_flops_per_token
from megatron_dlm.ops.batch import TokenBatch
from megatron_dlm.runtime.device import Device
from megatron_dlm.runtime.parallel import ParallelContext


class Throughput:
    """Counts time between asking for a batch and the end of its update; nothing else counts."""

    def __init__(self, config: RunConfig, device: Device, parallel: ParallelContext) -> None:
        self._data_size = parallel.data.size
        self._flops_per_token = training_flops_per_token(config.model, config.objective).total
        self._peak_flops = device.peak_flops and device.peak_flops * parallel.world_size
        self._clear()

    def wait_for(self, steps: Iterator[list[TokenBatch]]) -> list[TokenBatch]:
        """The next step's micro-batches; starts the clock."""
        self._started = time.perf_counter()
        micro_batches = next(steps)
        self._waited_seconds += time.perf_counter() - self._started
        num_samples, length_and_next = micro_batches[0].tokens.shape
        num_tokens = len(micro_batches) * num_samples * (length_and_next - 1)
        self._num_tokens += num_tokens * self._data_size
        return micro_batches

    def step_done(self) -> None:
        """Stop the clock."""
        self._seconds += time.perf_counter() - self._started
        self._num_steps += 1

    @property
    def num_steps(self) -> int:
        """Steps since the last report."""
        return self._num_steps

    @property
    def waited_seconds(self) -> float:
        """What this rank waited for its data since the last report."""
        return self._waited_seconds

    def report(self) -> dict[str, float]:
        """tokens_per_second of the whole job, data_wait_share of the time, and mfu where the
        device's peak is known (bf16 peak; bidirectional attention counted twice the causal); then
        starts anew."""
        speed = self._num_tokens / self._seconds
        values = {
            "tokens_per_second": speed,
            "data_wait_share": self._waited_seconds / self._seconds,
        }
        if self._peak_flops:
            values["mfu"] = speed * self._flops_per_token / self._peak_flops
        self._clear()
        return values

    def _clear(self) -> None:
        self._seconds = self._waited_seconds = 0.0
        self._num_tokens = self._num_steps = 0
