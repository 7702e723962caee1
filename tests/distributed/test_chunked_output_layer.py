"""The chunked output layer against the whole one, on real ranks, through Megatron's hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opened import MASK_ID, VOCAB_SIZE, opened_model
from rank_pool import RankPool
from tiny_run import layout, model_config
from torch import Tensor

from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.output_layer import chunked_loss
from megatron_dlm.ops.mixture_loss import mixture_divergences

WIDTH = 32
NUM_MICRO_BATCHES = 2


def losses(parallel_config: ParallelConfig, tied: bool, precision: str, num_slots: int) -> Any:
    """Per way: loss and other sums of all micro-batches, and the gradients of this rank."""
    from megatron_dlm.training.optimizer import wrap_data_parallel

    model = model_config(hidden_size=WIDTH, untie_embeddings_and_output_weights=not tied)
    with opened_model(parallel_config, model, precision=precision) as opened:
        parallel = opened.parallel
        [wrapped] = wrap_data_parallel(opened.chunks, parallel_config, parallel)
        return {
            chunk_rows: _run(wrapped, parallel, chunk_rows, num_slots)
            for chunk_rows in (None, 1, 5, 1000)
        }


def _run(wrapped: Any, parallel: Any, chunk_rows: int | None, num_slots: int) -> dict[str, Any]:
    model = wrapped.module
    layer = model.output_layer
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else layer.weight
    given = weight if tied else None
    calls: list[int] = []
    hook = layer.register_forward_pre_hook(lambda _, rows: calls.append(rows[0].shape[0]))
    wrapped.zero_grad_buffer()
    results = []
    for number in range(NUM_MICRO_BATCHES):
        rows, leaf = _rows(number, num_slots, weight.dtype, parallel)
        targets, tokens, log_snr = _labels(number, len(rows))

        def loss_of(
            logits: Tensor,
            place: slice,
            targets: Tensor = targets,
            tokens: Tensor = tokens,
            log_snr: Tensor = log_snr,
        ) -> tuple[Tensor, Tensor]:
            kl, itakura_saito = mixture_divergences(
                logits,
                tokens[place],
                targets[place],
                log_snr[place],
                torch.sigmoid(log_snr[place]),
                vocab_size=VOCAB_SIZE,
                mask_token_id=MASK_ID,
                tp_group=parallel.tensor.group,
            )
            sums = torch.stack((kl.sum(), itakura_saito.sum())).detach()
            return (kl * 1.5 + itakura_saito * 0.01).sum(), sums

        if chunk_rows is None:
            total, sums = loss_of(layer(rows, weight=given)[0], slice(None))
        else:
            total, sums = chunked_loss(layer, rows, given, loss_of, chunk_rows=chunk_rows)
        (total * 0.25).backward()
        assert not sums.requires_grad
        results.append((total.item(), sums.tolist(), leaf.grad.float().numpy().copy()))
    hook.remove()
    assert max(calls) <= (chunk_rows or num_slots)
    gradient = weight.main_grad
    assert gradient.dtype == torch.float32
    return {"results": results, "weight": gradient.clone().numpy()}


def _rows(number: int, num_slots: int, dtype: torch.dtype, parallel: Any) -> tuple[Tensor, Tensor]:
    """The rows that are scored, and the leaf [s, 1, h] on this rank that they come from."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    generator = torch.Generator().manual_seed(number)
    hidden = torch.randn(24, 1, WIDTH, generator=generator).to(dtype)
    if parallel.sequence_parallel:
        hidden = hidden.chunk(parallel.tensor.size)[parallel.tensor.rank]
    leaf = hidden.clone().requires_grad_()
    whole = (
        gather_from_sequence_parallel_region(leaf, group=parallel.groups.tp)
        if parallel.sequence_parallel
        else leaf
    )
    return whole.transpose(0, 1)[:, :num_slots].flatten(0, 1), leaf


def _labels(number: int, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    targets = torch.randint(0, MASK_ID, (num_slots,), generator=generator)
    tokens = torch.where(torch.arange(num_slots) % 2 == 0, targets, MASK_ID)
    log_snr = torch.rand(num_slots, generator=generator, dtype=torch.float64) * 10 - 5
    return targets, tokens, log_snr


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "where",
    [
        layout("one", 1),
        layout("TP2", 2, tp=2),
        layout("TP2 + SP", 2, tp=2, sp=True),
        layout("TP4", 4, tp=4),
    ],
    ids=lambda where: where.name,
)
def test_chunked_equals_whole(ranks: RankPool, where: Any, tied: bool) -> None:
    results = ranks.run(losses, where.parallel, tied, "fp32", 23, num_ranks=where.num_ranks)
    assert results[0][None]["weight"].any()
    for of_rank in results:
        whole = of_rank.pop(None)
        for of_chunks in of_rank.values():
            _compare(of_chunks, whole, rtol=1e-5, atol=1e-6)


def test_bf16_weights_gather_their_gradient_in_fp32(ranks: RankPool) -> None:
    [of_rank] = ranks.run(losses, ParallelConfig(), False, "bf16", 23, num_ranks=1)
    whole = of_rank.pop(None)
    for of_chunks in of_rank.values():
        _compare(of_chunks, whole, rtol=2**-7, atol=0.01)


def test_no_rows(ranks: RankPool) -> None:
    where = layout("TP2", 2, tp=2)
    for of_rank in ranks.run(losses, where.parallel, True, "fp32", 0, num_ranks=2):
        for of_way in of_rank.values():
            assert all(total == 0.0 and sums == [0.0, 0.0] for total, sums, _ in of_way["results"])
            assert not of_way["weight"].any()


def _compare(ours: dict[str, Any], whole: dict[str, Any], *, rtol: float, atol: float) -> None:
    for mine, theirs in zip(ours["results"], whole["results"], strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(
                torch.as_tensor(one), torch.as_tensor(other), rtol=rtol, atol=atol
            )
    torch.testing.assert_close(
        torch.as_tensor(ours["weight"]), torch.as_tensor(whole["weight"]), rtol=rtol, atol=atol
    )
