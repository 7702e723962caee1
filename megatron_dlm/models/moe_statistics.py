"""What the routers did since the last step: load of the experts, dropped tokens, balancing losses.

Every router adds up its own micro-batches on its device, in training passes with gradients only: a
recomputed layer counts once and validation not at all. `collect` joins the ranks once per step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.runtime.parallel import ParallelContext

LOSSES = {
    "aux_loss_coeff": "moe_aux_loss",
    "seq_aux_loss_coeff": "moe_seq_aux_loss",
    "global_aux_loss_coeff": "moe_global_aux_loss",
    "z_loss_coeff": "moe_z_loss",
    "token_balance_loss_coeff": "moe_token_balance_loss",
}
"""Field of MoEConfig -> metric of the loss it weighs; the metric is without the weight."""
_LOAD_METRICS = ("moe_load_max_over_mean", "moe_load_min_over_mean", "moe_entropy")
_COUNT_METRICS = ("moe_experts_per_token", "moe_experts_per_token_std", "moe_dropped_share")
# Tokens, entropies, pairs asked for, pairs served and their squares per token, unserved tokens;
# then the value and the count of every loss; then the load of every expert.
_NUM_TOTALS = 6


def metric_names(model: ModelConfig) -> tuple[str, ...]:
    """Names of what `collect` returns for this model, the same on every rank; () if it is dense.

    All are means over the MoE layers of what is true of the whole global batch (docs/moe.md).
    """
    if not model.moe.is_moe:
        return ()
    return (*_LOAD_METRICS, *_COUNT_METRICS, *_losses(model.moe))


def _losses(moe: MoEConfig) -> tuple[str, ...]:
    return tuple(name for field, name in LOSSES.items() if getattr(moe, field) > 0)


class RouterStatistics:
    """Running totals of one router on one rank."""

    def __init__(self, moe: MoEConfig) -> None:
        self.num_experts = moe.num_experts
        self.loss_names = _losses(moe)
        self.loses_tokens = moe.routing == "expert_choice"
        """What is dropped are whole tokens, not single pairs of a token and an expert."""
        self._totals: Tensor | None = None

    @torch.no_grad()
    def add(self, logits: Tensor, wanted: Tensor, served: Tensor) -> None:
        """One micro-batch: logits [n, E]; wanted, served: bool [n, E], before and after drops."""
        log_share = logits.float().log_softmax(-1)
        per_token = served.sum(-1, dtype=torch.float64)
        values = [
            per_token.new_full((), logits.shape[0]),
            -(log_share.exp() * log_share).sum(dtype=torch.float64),
            wanted.sum(dtype=torch.float64),
            per_token.sum(),
            per_token.square().sum(),
            (per_token == 0).sum(dtype=torch.float64),
        ]
        totals = self._own(logits.device)
        totals[:_NUM_TOTALS] += torch.stack(values)
        totals[-self.num_experts :] += wanted.sum(0)

    @torch.no_grad()
    def add_loss(self, name: str, part: Tensor, share: float) -> None:
        """This rank's part of a balancing loss of one micro-batch; `share` of it is this rank's."""
        place = _NUM_TOTALS + 2 * self.loss_names.index(name)
        totals = self._own(part.device)
        totals[place] += part.detach()
        totals[place + 1] += share

    def take(self, device: torch.device) -> Tensor:
        """float64 [totals, losses, loads] since the last call."""
        totals = self._own(device)
        self._totals = None
        return totals

    def _own(self, device: torch.device) -> Tensor:
        if self._totals is None:
            size = _NUM_TOTALS + 2 * len(self.loss_names) + self.num_experts
            self._totals = torch.zeros(size, dtype=torch.float64, device=device)
        return self._totals


@torch.no_grad()
def collect(
    chunks: Sequence[nn.Module], parallel: ParallelContext
) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (sum over this rank's MoE layers, number of layers) since the last call.

    The names are those of `metric_names`; a rank without MoE layers returns none.

    Call once per step on every rank: one small all-reduce joins the ranks that hold the same
    layers, and only the first of them has counts, so that sums over all ranks are right.
    """
    modules = (module for chunk in chunks for module in chunk.modules())
    found = [getattr(module, "statistics", None) for module in modules]
    layers = [one for one in found if isinstance(one, RouterStatistics)]
    if not layers:
        return {}
    device = next(chunks[0].parameters()).device
    totals = torch.stack([layer.take(device) for layer in layers])
    group = parallel.groups.tp_dp_cp
    dist.all_reduce(totals, group=group)
    values = _layer_values(totals, layers[0])
    is_counted = float(dist.get_rank(group) == 0)
    terms = {}
    for name, (value, is_known) in values.items():
        known = is_known * is_counted
        terms[name] = (torch.where(known > 0, value, 0.0).sum(), known.sum())
    return terms


def _layer_values(totals: Tensor, kind: RouterStatistics) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (value, 1 where there is one), [layers] each, from totals [layers, all]."""
    num_losses = 2 * len(kind.loss_names)
    sizes = [_NUM_TOTALS, num_losses, kind.num_experts]
    general, losses, load = totals.split(sizes, dim=1)
    tokens, entropy, wanted, served, squares, unserved = general.unbind(1)
    mean = served / tokens
    found = {
        "moe_load_max_over_mean": load.amax(1) / load.mean(1),
        "moe_load_min_over_mean": load.amin(1) / load.mean(1),
        "moe_entropy": entropy / tokens / math.log(max(kind.num_experts, 2)),
        "moe_experts_per_token": mean,
        "moe_experts_per_token_std": (squares / tokens - mean.square()).clamp(min=0).sqrt(),
        "moe_dropped_share": unserved / tokens if kind.loses_tokens else 1 - served / wanted,
    }
    values = {name: (value, (tokens > 0).double()) for name, value in found.items()}
    for name, pair in zip(kind.loss_names, losses.unflatten(1, (-1, 2)).unbind(1), strict=True):
        total, count = pair.unbind(1)
        values[name] = (total / count, (count > 0).double())
    return values
