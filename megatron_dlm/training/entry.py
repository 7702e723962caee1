"""Process lifetime of `megatron-dlm train`: open the device, run, close. Nothing else."""

from __future__ import annotations

from megatron_dlm.config.schema import RunConfig
from megatron_dlm.runtime.device import open_device


def train(config: RunConfig) -> None:
    """Train or resume one run; raises ValueError for what the user can mend."""
    device = open_device(config.train.device)  # before megatron.core is imported
    from megatron_dlm.runtime.parallel import parallel_context
    from megatron_dlm.training.train import train as run_training

    with parallel_context(config.parallel, device) as parallel:
        run_training(config, device, parallel)
