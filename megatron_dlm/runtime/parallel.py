"""Process groups of every parallel axis; the only reader of Megatron's global parallel state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.runtime.device import Device
from megatron_dlm.runtime.errors import AgreedError
from megatron_dlm.runtime.meeting import Meeting, meet

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """One parallel axis as this rank sees it."""

    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place in the layout."""

    tensor: Axis
    pipeline: Axis
    context: Axis
    data: Axis
    expert: Axis
    virtual_pipeline_size: int | None
    sequence_parallel: bool
    groups: ProcessGroupCollection
    control_group: dist.ProcessGroup
    """gloo over all ranks: for decisions taken on the host."""
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Rank 0 of the job: writes logs and run files."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """This rank holds the output layer."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def num_chunks(self) -> int:
        """Model chunks on this rank."""
        return self.virtual_pipeline_size or 1

    def holds_first_stage(self, chunk: int) -> bool:
        """Model chunk number `chunk` of this rank starts with the embedding."""
        return self.pipeline.rank == 0 and chunk == 0

    def holds_last_stage(self, chunk: int) -> bool:
        """Model chunk number `chunk` of this rank ends with the output layer."""
        return self.is_last_stage and chunk == self.num_chunks - 1

    def first_error(self, error: str | None) -> str | None:
        """The error of the lowest failing rank, the same on all ranks (None if no rank failed)."""
        errors: list[str | None] = [None] * self.world_size
        dist.all_gather_object(errors, error, group=self.control_group)
        return next((message for message in errors if message is not None), None)

    def from_main(self, value: T) -> T:
        """The value that rank 0 has, on every rank."""
        values: list[T] = [value]
        dist.broadcast_object_list(values, src=0, group=self.control_group)
        return values[0]

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """A user error in the body on any rank is raised on all of them: nobody waits for ever."""
        error: str | None = None
        try:
            yield
        except (ValueError, OSError) as exception:
            error = str(exception)
        message = self.first_error(error)
        if message is not None:
            raise AgreedError(message)


@contextlib.contextmanager
def parallel_context(
    config: ParallelConfig, device: Device, meeting: Meeting | None = None
) -> Iterator[ParallelContext]:
    """Start torch.distributed, lay out the groups, and close both at the end.

    Without a `meeting` the ranks meet first; ValueError where they do not find each other.
    """
    meeting = meeting or meet(config.distributed_timeout_minutes)
    dist.init_process_group(
        device.backend,
        timeout=meeting.timeout,
        store=dist.PrefixStore("default_pg", meeting.store),
        rank=meeting.rank,
        world_size=meeting.world_size,
    )
    try:
        with laid_out(config) as parallel:
            yield parallel
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def laid_out(config: ParallelConfig) -> Iterator[ParallelContext]:
    """The axes of `config` over an initialised torch.distributed; undone at the end."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, round(config.distributed_timeout_minutes)),
    )
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    control_group = dist.new_group(backend="gloo", timeout=timeout)
    try:
        yield ParallelContext(
            tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
            pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
            context=_axis(parallel_state.get_context_parallel_group()),
            data=_axis(parallel_state.get_data_parallel_group()),
            expert=_axis(parallel_state.get_expert_model_parallel_group()),
            virtual_pipeline_size=config.virtual_pipeline_model_parallel_size,
            sequence_parallel=config.sequence_parallel,
            groups=ProcessGroupCollection.use_mpu_process_groups(),
            control_group=control_group,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )
    finally:
        parallel_state.destroy_model_parallel()


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)
