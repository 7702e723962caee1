"""What is in a checkpoint: model, optimizer moments, and the counters of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_dlm.models.build import LanguageModel, sharding_metadata
from megatron_dlm.ops.laprop import LaProp
from megatron_dlm.runtime.parallel import ParallelContext


@dataclass(frozen=True)
class TrainState:
    """Everything but tensors that a resumed run needs; the same on every rank."""

    step: int
    """Finished optimizer updates."""
    pending_metrics: dict[str, list[float]] = field(default_factory=dict)
    """name -> [sum, count] of metrics not yet logged when the checkpoint was taken."""
    skipped: list[list[int]] = field(default_factory=list)
    """[first, last] batches that no update takes, after rollbacks; see skipped_batches.py."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps, where loss spikes are looked for."""
    validation_is_due: bool = False
    """A stop signal cut the validation after this step short: it comes before the next step."""


def model_state(models: Sequence[LanguageModel], parallel: ParallelContext) -> dict[str, Any]:
    """Sharded state of all model chunks; the keys inside name layers globally."""
    metadata = sharding_metadata(parallel)
    return {
        f"model{number}": model.sharded_state_dict(metadata=metadata)
        for number, model in enumerate(models)
    }


def optimizer_state(
    optimizer: MegatronOptimizer,
    model: Mapping[str, Any],
    parallel: ParallelContext,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    """Sharded fp32 weights and moments.

    Learning rates and other settings are left out: they follow from the config and the step.
    """
    metadata = sharding_metadata(parallel)
    state = {}
    for number, part in enumerate(optimizer_parts(optimizer)):
        if is_loading:
            _prime(part)
        sharded = part.sharded_param_state_fully_reshardable(dict(model), is_loading, metadata)
        if sharded is not None:  # None: another data-parallel rank saves it
            state[f"optimizer{number}"] = sharded
    return state


@torch.no_grad()
def restore_optimizer(optimizer: MegatronOptimizer, loaded: Mapping[str, Any], step: int) -> None:
    """Copy loaded tensors into this rank's shards and set the optimizer's step.

    torch.optim.AdamW and LaProp keep `step` per parameter, which Megatron Core would fill with one
    shared tensor (it then counts once per parameter); so it is set here, one tensor each.
    """
    for number, part in enumerate(optimizer_parts(optimizer)):
        states = [state for state in part.optimizer.state.values() if state]
        counters = [state.pop("step", None) for state in states]
        part.load_parameter_state_from_fully_reshardable(loaded[f"optimizer{number}"])
        _check_moments(part)
        for state, counter in zip(states, counters, strict=True):
            if counter is not None:
                state["step"] = torch.full_like(counter, float(step))
        if not isinstance(part.optimizer, (torch.optim.AdamW, LaProp)):  # these count per group
            for group in part.optimizer.param_groups:
                group["step"] = step


def optimizer_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The distributed optimizers inside Megatron's, in a fixed order: of the dense parameters, and
    of the experts where this stage has some."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer and part.buffers]


def _check_moments(part: DistributedOptimizer) -> None:
    """What has no place is not loaded, and the run would go on with other moments unawares."""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            state = part.optimizer.state.get(parameter, {})
            assert {"exp_avg", "exp_avg_sq"} <= state.keys(), (
                f"moments have no place: {state.keys()}"
            )


def _prime(part: DistributedOptimizer) -> None:
    """Give a fresh optimizer its state: loading fills only what is there."""
    inner = part.optimizer
    if inner.state:
        return
    if isinstance(inner, HybridDeviceOptimizer):
        inner.dummy_step()  # a random one; what it changes is loaded
        return
    if not isinstance(inner, (torch.optim.AdamW, LaProp)):  # Transformer Engine's or Apex's
        part.init_state_fn(inner, part.config)
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = LaProp.fresh_state(parameter)
            if isinstance(inner, torch.optim.AdamW):  # fused, it counts on the device
                state["step"] = state["step"].to(parameter.device)
            inner.state[parameter] = state
