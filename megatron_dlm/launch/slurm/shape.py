"""How many nodes and ranks the job of a run has."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.slurm_commands import SlurmConfig


@dataclass(frozen=True)
class JobShape:
    """Nodes, and ranks on each of them."""

    nodes: int
    ranks_per_node: int

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.ranks_per_node


def job_shape(config: RunConfig, slurm: SlurmConfig) -> JobShape:
    """From the parallel layout and what `slurm` fixes.

    Raises ValueError where they contradict each other or leave nodes half full.
    """
    model_ranks = config.parallel.model_parallel_size
    layout = (
        f"tensor {config.parallel.tensor_model_parallel_size} * "
        f"pipeline {config.parallel.pipeline_model_parallel_size} * "
        f"context {config.parallel.context_parallel_size}"
    )
    if slurm.nodes is None:
        return _smallest(model_ranks * (slurm.data_parallel_size or 1), slurm, layout)
    shape = JobShape(slurm.nodes, slurm.ranks_per_node)
    given = (
        f"slurm.nodes {slurm.nodes} * slurm.ranks_per_node {slurm.ranks_per_node} are "
        f"{shape.num_ranks} ranks"
    )
    if shape.num_ranks % model_ranks:
        raise ValueError(
            f"{given}, but one copy of the model takes {layout} = {model_ranks}; make the ranks a "
            "multiple of it"
        )
    copies = shape.num_ranks // model_ranks
    if slurm.data_parallel_size not in (None, copies):
        raise ValueError(
            f"{given}, which hold {copies} copies of the model ({layout} ranks each), but "
            f"slurm.data_parallel_size is {slurm.data_parallel_size}; remove one of them"
        )
    return shape


def _smallest(num_ranks: int, slurm: SlurmConfig, layout: str) -> JobShape:
    per_node = slurm.ranks_per_node
    if num_ranks <= per_node:
        return JobShape(1, num_ranks)
    if num_ranks % per_node:
        raise ValueError(
            f"{num_ranks} ranks ({layout} * data {slurm.data_parallel_size or 1}) do not fill "
            f"nodes of slurm.ranks_per_node {per_node}; change slurm.data_parallel_size or the "
            "parallel sizes"
        )
    return JobShape(num_ranks // per_node, per_node)


def warnings(config: RunConfig, slurm: SlurmConfig, shape: JobShape) -> list[str]:
    """What works but will be slow or wasteful."""
    found = []
    tensor_size = config.parallel.tensor_model_parallel_size
    if shape.ranks_per_node % tensor_size:
        found.append(
            f"parallel.tensor_model_parallel_size {tensor_size} does not divide the "
            f"{shape.ranks_per_node} ranks of a node: each layer will wait for the network"
        )
    if slurm.exclusive and shape.ranks_per_node < slurm.ranks_per_node:
        found.append(
            f"{shape.ranks_per_node} ranks take a whole node of {slurm.ranks_per_node}; raise "
            "slurm.data_parallel_size, or set slurm.exclusive false and slurm.memory"
        )
    return found
