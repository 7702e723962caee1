"""Documents of a micro-batch back to back in one sequence: Megatron Core's `thd` format.

One path on every device: our local core attention runs each document by itself, Transformer
Engine's kernels take the boundaries, and Megatron Core restarts rotary positions at each of them.

Under context parallelism `thd` would ask for documents of multiples of 2 * CP slots. There the
sequence is cut like any other, wherever documents end: to Megatron Core it is one sequence
(`sbhd`), and our rotary positions and core attention know the documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_dlm.ops.batch import document_starts


@dataclass
class PackedDocuments(PackedSeqParams):
    """Boundaries for Megatron Core and Transformer Engine, and their lengths on the host."""

    lengths: tuple[int, ...] = ()
    """Slots of every document, in order; on the host, so that splitting waits for no device."""

    @cached_property
    def document_numbers(self) -> Tensor:
        """int64 [t], on the device of the boundaries: 0 in the first document, 1 in the second."""
        sizes = self.cu_seqlens_q.diff()
        numbers = torch.arange(len(sizes), device=sizes.device)
        return numbers.repeat_interleave(sizes, output_size=sum(self.lengths))

    @cached_property
    def positions(self) -> Tensor:
        """int64 [t], on the device of the boundaries: 0 at the start of every document."""
        numbers = self.document_numbers
        slots = torch.arange(len(numbers), device=numbers.device)
        return slots - self.cu_seqlens_q.to(slots.dtype)[numbers]


def packed_sequences(
    document: Tensor, device: torch.device | str, *, context_size: int = 1
) -> PackedDocuments:
    """The documents of a micro-batch in row-major order; every row begins a new one.

    document: int64 [b, s] on the host, equal numbers where neighbours belong together. The
    boundaries (int32, one more than documents) come to lie on `device`; they are those of the whole
    sequence, also where context_size ranks share it.
    """
    assert document.device.type == "cpu", "lengths read from a device would wait for it"
    starts = document_starts(document).flatten().nonzero().flatten()
    boundaries = torch.cat([starts, starts.new_tensor([document.numel()])])
    lengths = tuple(boundaries.diff().tolist())
    boundaries = boundaries.to(torch.int32).to(device, non_blocking=True)
    return PackedDocuments(
        qkv_format="thd" if context_size == 1 else "sbhd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
    )
