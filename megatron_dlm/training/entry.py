"""Process lifetime of `megatron-dlm train`: signals, device, ranks, run. Nothing else."""

from __future__ import annotations

from megatron_dlm.config.schema import RunConfig
from megatron_dlm.training.signals import StopSignals


def train(config: RunConfig) -> None:
    """Train or resume one run; raises ValueError for what the user can mend."""
    with StopSignals() as signals:  # before torch is imported, which takes seconds
        from megatron_dlm.runtime.determinism import use_deterministic_kernels
        from megatron_dlm.runtime.device import open_device

        if config.train.deterministic:
            use_deterministic_kernels()
        device = open_device(config.train.device)  # before megatron.core is imported
        from megatron_dlm.runtime.meeting import meet
        from megatron_dlm.runtime.parallel import parallel_context
        from megatron_dlm.training.train import train as run_training
        from megatron_dlm.training.watch import watched

        signals.guard_start()
        meeting = meet(config.parallel.distributed_timeout_minutes)
        with watched(meeting, config.recovery.hang_timeout_minutes) as watch:
            signals.started()
            with parallel_context(config.parallel, device, meeting) as parallel, watch.telling():
                run_training(config, device, parallel, signals=signals, journal=watch.journal)
