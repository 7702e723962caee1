"""RMSNorms: right under sequence parallelism, and over the heads of all tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_dlm.models.head_sharding import sharded_by_heads


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension; the gain is weight, or 1 + weight if zero-centred.

    Megatron Core's torch norm refuses sequence parallelism; marking the weight is all that is
    needed, its gradient is then reduced over the TP ranks with the others.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        width = (x.shape[-1],)
        if self.offset == 0.0:
            return nn.functional.rms_norm(x, width, self.weight, self.eps)
        # 1 + weight in bf16 would round small weights away.
        gain = self.offset + self.weight.float()
        return nn.functional.rms_norm(x.float(), width, gain, self.eps).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor, used by every rank: so is the sum of their gradients."""

    @staticmethod
    def forward(context: Any, value: Tensor, group: ProcessGroup) -> Tensor:
        context.group = group
        return _summed(value, group)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return _summed(gradient, context.group), None


def _summed(value: Tensor, group: ProcessGroup) -> Tensor:
    value = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(value, group=group)
    return value


class FullWidthRMSNorm(nn.Module):
    """RMSNorm of the queries (or keys) of one token over all heads together, before rotary.

    The heads lie on several TP ranks, and every rank holds the gains of its own heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        num_heads: int,
        tp_group: ProcessGroup,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.full_width = num_heads * hidden_size
        self.tp_group = tp_group
        own_width = self.full_width // tp_group.size()
        self.weight = nn.Parameter(torch.ones(own_width, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., heads of this rank, head size] -> the same."""
        flat = x.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.tp_group.size() > 1:
            squares = _SumOverRanks.apply(squares, self.tp_group)
        gain = self.offset + self.weight.float()
        normalised = flat * torch.rsqrt(squares / self.full_width + self.eps) * gain
        return normalised.to(x.dtype).view(x.shape)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The gains of all heads, split over the TP ranks as the heads are."""
        return sharded_by_heads(self, prefix, sharded_offsets, metadata, self.tp_group)
