"""Configuration of `checkpoint upcycle`."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dlm.config.checks import require
from megatron_dlm.config.moe import MoEConfig


@dataclass(frozen=True)
class UpcycledModel:
    """What the new model has and its dense parent has not."""

    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass(frozen=True)
class UpcycleConfig:
    """Make a dense checkpoint the first checkpoint of a run with experts; `train` goes on from it.

    Every expert starts as a copy of the dense MLP, or where model.moe.ffn_hidden_size is smaller as
    one slice of it. The new model computes what its parent does, or it is refused.
    """

    checkpoint: str
    """Run directory of a dense model (its newest whole checkpoint is taken) or one checkpoint,
    iter_NNNNNNN."""
    output_dir: str
    """Run directory to make: checkpoints/iter_0000000 (weights only) and upcycled.yaml."""
    model: UpcycledModel = field(default_factory=UpcycledModel)
    step: int | None = None
    """Take the checkpoint of this step of the run."""
    seed: int = 1234
    """Seed of the routers' weights."""
    router_init_std: float | None = None
    """Standard deviation of the routers' weights; default: model.init_method_std of the parent."""
    allow_inexact: bool = False
    """Go on, with a warning, where the settings do not let the new model compute what its parent
    does; it then starts near it."""

    def __post_init__(self) -> None:
        require(
            self.model.moe.is_moe,
            "model.moe.num_experts is 0 (a dense model); say how many experts the layers get",
        )
        std = self.router_init_std
        require(std is None or std > 0, f"router_init_std is {std}; it must be greater than 0")
