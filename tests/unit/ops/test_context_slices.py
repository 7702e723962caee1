"""Which slots a context-parallel rank holds, and the way back to the whole sequence."""

from __future__ import annotations

import pytest
import torch

from megatron_dlm.ops.batch import ModelInputs
from megatron_dlm.ops.context_parallel import (
    by_rank,
    context_slice,
    in_order,
    local_part,
    local_slots,
)

CPU = torch.device("cpu")


def test_slots_of_two_ranks() -> None:
    assert local_slots(8, CPU, rank=0, size=2).tolist() == [0, 1, 6, 7]
    assert local_slots(8, CPU, rank=1, size=2).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_slot_lies_on_one_rank(size: int) -> None:
    found = [local_slots(48, CPU, rank=rank, size=size) for rank in range(size)]
    assert len({len(slots) for slots in found}) == 1
    assert torch.cat(found).sort().values.tolist() == list(range(48))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_causal_attention_is_as_much_work_on_every_rank(size: int) -> None:
    work = {int((local_slots(48, CPU, rank=r, size=size) + 1).sum()) for r in range(size)}
    assert len(work) == 1


@pytest.mark.parametrize("size", [2, 3, 4])
def test_block_diffusion_is_as_much_work_on_every_rank(size: int) -> None:
    """Blocks of 2 tokens in two halves of 48 slots; every rank scores equally many noisy slots."""
    keys = []
    for rank in range(size):
        slots = local_slots(96, CPU, rank=rank, size=size)
        before = slots % 48 // 2 * 2
        keys.append(int((before + 2).sum()))
        assert int((slots < 48).sum()) == 48 // size
    assert len(set(keys)) == 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_there_and_back(size: int) -> None:
    whole = torch.arange(12 * 5).view(12, 5)
    parts = by_rank(whole, size)
    for rank, part in enumerate(parts):
        assert torch.equal(part, local_part(whole, 0, rank=rank, size=size))
        assert torch.equal(part, whole[local_slots(12, CPU, rank=rank, size=size)])
    assert torch.equal(in_order(parts), whole)


def test_a_slice_holds_the_same_slots_of_every_field() -> None:
    number = torch.arange(16).view(2, 8)
    inputs = ModelInputs(
        tokens=number,
        position_ids=number + 100,
        targets=number + 200,
        weights=number / 2,
        elbo_weights=number / 4,
        counted=number % 2 == 0,
        valid=number % 3 == 0,
        noise_level=number / 8,
    )
    part = context_slice(inputs, rank=1, size=2)
    wanted = torch.tensor([[2, 3, 4, 5], [10, 11, 12, 13]])
    assert torch.equal(part.tokens, wanted)
    assert torch.equal(part.position_ids, wanted + 100)
    assert torch.equal(part.targets, wanted + 200)
    assert torch.equal(part.weights, wanted / 2)
    assert torch.equal(part.elbo_weights, wanted / 4)
    assert torch.equal(part.counted, wanted % 2 == 0)
    assert torch.equal(part.valid, wanted % 3 == 0)
    assert torch.equal(part.noise_level, wanted / 8)


def test_chunks_must_be_equal() -> None:
    with pytest.raises(AssertionError, match=r"10 slots are not 2 \* 2 equal chunks"):
        local_part(torch.arange(10), 0, rank=0, size=2)
