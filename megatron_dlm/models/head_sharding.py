"""How parameters that belong to attention heads lie in a checkpoint."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn
from torch.distributed import ProcessGroup


def sharded_by_heads(
    module: nn.Module,
    prefix: str,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    metadata: dict[str, Any] | None,
    tp_group: ProcessGroup,
) -> ShardedStateDict:
    """All parameters of the module, split along their first axis over the TP ranks as heads are."""
    assert metadata is not None, "whoever saves a model says by which groups it is split"
    state = module.state_dict(keep_vars=True)
    return make_sharded_tensors_for_checkpoint(
        state,
        prefix,
        dict.fromkeys(state, 0),
        sharded_offsets,
        tp_group=tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
