"""mixture_divergences on one rank against the term-by-term float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_reference import Divergences, Rows, divergences, values
from torch import Tensor

from megatron_dlm.ops import vocab_parallel
from megatron_dlm.ops.mixture_loss import mixture_divergences
from megatron_dlm.ops.vocab_parallel import log_prob


def example(
    num_rows: int, width: int, vocab_size: int, *, mask_token_id: int, scale: float = 3.0
) -> Rows:
    """Random rows: a third of them clean, a third masked, a third of any token."""
    generator = torch.Generator().manual_seed(num_rows + width)
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    tokens = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    kind = torch.arange(num_rows) % 3
    tokens = torch.where(kind == 0, targets, torch.where(kind == 1, mask_token_id, tokens))
    log_snr = torch.rand(num_rows, generator=generator, dtype=torch.float64) * 18 - 9
    bias = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)[torch.arange(num_rows) % 7 % 3]
    return Rows(
        torch.randn(num_rows, width, generator=generator) * scale,
        tokens,
        targets,
        log_snr,
        torch.sigmoid(log_snr + bias),
        vocab_size,
        mask_token_id,
    )


def weights(num_rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(num_rows, generator=generator), torch.randn(num_rows, generator=generator)


def ours(rows: Rows, kl_weights: Tensor, is_weights: Tensor) -> Divergences:
    leaf = rows.logits.detach().clone().requires_grad_()
    kl, itakura_saito = mixture_divergences(
        leaf,
        rows.tokens,
        rows.targets,
        rows.log_snr,
        rows.uniform_share,
        vocab_size=rows.vocab_size,
        mask_token_id=rows.mask_token_id,
        tp_group=None,
    )
    (kl * kl_weights + itakura_saito * is_weights).sum().backward()
    assert leaf.grad is not None
    assert kl.dtype == itakura_saito.dtype == torch.float32
    return Divergences(kl.detach(), itakura_saito.detach(), leaf.grad)


def compare(rows: Rows) -> None:
    """Both divergences to fp32 rounding of their terms, which are of the size of alpha."""
    of_kl, of_is = weights(len(rows.tokens))
    # D_IS reaches 1 / noise; what is trained is D_IS times a weight of about its inverse.
    exact = divergences(rows, of_kl, torch.zeros_like(of_is))
    result = ours(rows, of_kl, torch.zeros_like(of_is))
    alpha = torch.sigmoid(rows.log_snr.double())
    size = alpha * (1 + rows.logits[:, : rows.vocab_size].double().abs().amax(1))
    assert_close(result.kl, exact.kl, size)
    assert_close(result.gradient, exact.gradient, (alpha * of_kl.abs())[:, None])
    # The rounding of log p_z, times what one more of it makes of D_IS.
    rate = 1 + exact.itakura_saito.abs()
    spread = 1 + rows.logits[:, : rows.vocab_size].double().abs().amax(1)
    assert_close(result.itakura_saito, exact.itakura_saito, rate * spread)
    exact = divergences(rows, torch.zeros_like(of_kl), of_is)
    result = ours(rows, torch.zeros_like(of_kl), of_is)
    assert_close(result.gradient, exact.gradient, (rate * spread * of_is.abs())[:, None])


def assert_close(result: Tensor, exact: Tensor, size: Tensor, tolerance: float = 1e-6) -> None:
    """Within tolerance of size and of the value itself; infinities must agree."""
    same = result.double() == exact
    error = torch.where(same, 0.0, (result.double() - exact).abs())
    bound = tolerance * (size + exact.abs()) + 1e-37
    assert torch.all(same | (error <= bound)), (error / bound).max()


@pytest.mark.parametrize(
    ("num_rows", "width", "vocab_size", "mask_token_id"),
    [
        (12, 3, 3, 2),
        (33, 64, 50, 49),
        (33, 64, 50, 0),
        (33, 64, 64, 3),
        (7, 128, 2, 1),
        (3, 70_000, 69_999, 69_998),
        (300, 500, 300, 100),
    ],
)
def test_value_and_gradient(num_rows: int, width: int, vocab_size: int, mask_token_id: int) -> None:
    rows = example(num_rows, width, vocab_size, mask_token_id=mask_token_id)
    compare(rows)
    gradient = ours(rows, *weights(num_rows)).gradient
    assert torch.all(gradient[:, vocab_size:] == 0)
    assert torch.all(gradient[:, mask_token_id] == 0)


def test_the_reference_by_finite_differences() -> None:
    rows = example(9, 6, 5, mask_token_id=4, scale=1.0)
    leaf = rows.logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: values(logits, rows), leaf, atol=1e-6)


@pytest.mark.parametrize("log_snr", [-40.0, -9.0, -3.0, 0.0, 3.0, 9.0, 15.0, 40.0])
@pytest.mark.parametrize("uniform_share", [1.0, 0.3, 1e-3, 1e-9])
def test_every_noise_level(log_snr: float, uniform_share: float) -> None:
    for scale in (0.0, 1.0, 10.0):
        rows = example(24, 203, 201, mask_token_id=17, scale=scale)
        is_impossible = (uniform_share == 1.0) & (rows.tokens == 17)
        compare(
            rows._replace(
                log_snr=torch.full_like(rows.log_snr, log_snr),
                uniform_share=torch.full_like(rows.uniform_share, uniform_share),
                tokens=torch.where(is_impossible, rows.targets, rows.tokens),
                targets=torch.where(rows.targets == 17, 5, rows.targets),
            )
        )


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(size: float) -> None:
    """One huge logit at, behind and away from x and z, and a huge one in every other column."""
    rows = example(48, 40, 37, mask_token_id=36)
    for column in (int(rows.targets[0]), int(rows.tokens[2]), 11, 36):
        logits = rows.logits.clone()
        logits[:, column] = size
        compare(rows._replace(logits=logits))
    logits = rows.logits.clone()
    logits[:, ::2] += size
    compare(rows._replace(logits=logits))


def test_tokens_of_great_mass_in_one_product() -> None:
    """16 columns that share a logarithm hold the whole mass: their product overflows fp32."""
    rows = example(6, 1024, 1024, mask_token_id=1000)
    logits = torch.full_like(rows.logits, -5.0)
    logits[:, 3::64] = 15.0
    high = torch.full_like(rows.log_snr, 3.5)
    compare(rows._replace(logits=logits, log_snr=high, uniform_share=torch.sigmoid(high)))
    highest = torch.full_like(rows.log_snr, 60.0)
    compare(rows._replace(logits=logits, log_snr=highest))


def test_no_uniform_noise_is_alpha_times_cross_entropy() -> None:
    rows = example(50, 90, 85, mask_token_id=84)
    kept = rows.targets != 84
    leaf, peer = (rows.logits[kept].clone().requires_grad_() for _ in range(2))
    log_snr = rows.log_snr[kept]
    kl, itakura_saito = mixture_divergences(
        leaf,
        rows.tokens[kept],
        rows.targets[kept],
        log_snr,
        torch.sigmoid(log_snr - 1000),
        vocab_size=85,
        mask_token_id=84,
        tp_group=None,
    )
    removed = peer.masked_fill(torch.arange(90) == 84, -torch.inf)
    expected = -log_prob(removed, rows.targets[kept], vocab_size=85, tp_group=None)
    expected = expected * torch.sigmoid(log_snr).float()
    torch.testing.assert_close(kl, expected, rtol=1e-6, atol=0.0)
    assert torch.all(itakura_saito == 0)
    (kl.sum() + itakura_saito.sum()).backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad, peer.grad, rtol=1e-5, atol=1e-7)


def test_rows_with_and_without_uniform_noise_together() -> None:
    rows = example(30, 64, 60, mask_token_id=59)
    share = torch.where(torch.arange(30) % 2 == 0, rows.uniform_share, 0.0)
    tokens = torch.where((share == 0) & (rows.tokens != rows.targets), 59, rows.tokens)
    compare(rows._replace(uniform_share=share, tokens=tokens))


def test_padding_columns_and_the_mask_may_hold_anything() -> None:
    rows = example(21, 40, 33, mask_token_id=12)
    expected = ours(rows, *weights(21))
    for filler in (1e6, torch.inf, torch.nan):
        logits = rows.logits.clone()
        logits[:, 33:] = filler
        logits[:, 12] = filler
        result = ours(rows._replace(logits=logits), *weights(21))
        for mine, theirs in zip(result, expected, strict=True):
            assert torch.equal(mine, theirs)


def test_what_is_no_id_and_nan_are_loud() -> None:
    rows = example(4, 16, 11, mask_token_id=10)
    rows = rows._replace(tokens=torch.tensor([3, -1, 11, 3]), targets=torch.tensor([-1, 3, 3, 11]))
    result = ours(rows, *weights(4))
    assert result.kl.isinf().tolist() == [True, False, False, True]
    assert result.itakura_saito.isinf().tolist() == [False, True, True, False]
    rows.logits[2, 0] = torch.nan
    assert ours(rows, *weights(4)).kl.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """The result is that of the given numbers taken exactly; the gradient is rounded once."""
    rows = example(40, 300, 290, mask_token_id=3)
    rows.logits[:10, 7], rows.targets[:10] = 20.0, 7  # nearly certain: 1 - p must not be lost
    rows = rows._replace(logits=rows.logits.to(dtype))
    of_kl, of_is = weights(40)
    exact, result = divergences(rows, of_kl, of_is), ours(rows, of_kl, of_is)
    assert result.gradient.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result.kl.double(), exact.kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        result.gradient.double(),
        exact.gradient,
        rtol=rounding,
        atol=float(1e-6 * exact.itakura_saito.max()),
    )


def test_no_rows() -> None:
    rows = example(0, 16, 11, mask_token_id=10)
    result = ours(rows, *weights(0))
    assert result.kl.shape == (0,)
    assert result.gradient.shape == (0, 16)


def test_logits_are_untouched_and_backward_may_run_twice() -> None:
    rows = example(12, 40, 33, mask_token_id=5)
    leaf = rows.logits.clone().requires_grad_()
    downstream = leaf * 1.0
    kept = downstream.exp()  # saves its result, not the logits
    version = downstream._version
    total = sum(
        value.sum()
        for value in mixture_divergences(
            downstream,
            *rows[1:5],
            vocab_size=33,
            mask_token_id=5,
            tp_group=None,
        )
    )
    (first,) = torch.autograd.grad(total, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(total, leaf)
    assert torch.equal(first, second)
    assert torch.equal(leaf.detach(), rows.logits)
    assert torch.equal(downstream.detach(), rows.logits)
    assert downstream._version == version
    assert torch.equal(kept.detach(), rows.logits.exp())


def test_chunks_and_strides_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = example(37, 50, 45, mask_token_id=44)
    expected = ours(rows, *weights(37))
    for budget in (1, 100, 45 * 7):
        monkeypatch.setattr(vocab_parallel, "_CPU_CHUNK_ELEMENTS", budget)
        for layout in (rows.logits, rows.logits.t().contiguous().t()):
            result = ours(rows._replace(logits=layout), *weights(37))
            for mine, theirs in zip(result, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_nothing_of_the_size_of_the_logits_is_saved() -> None:
    rows = example(64, 512, 500, mask_token_id=499)
    leaf = rows.logits.requires_grad_()
    saved: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        mixture_divergences(leaf, *rows[1:5], vocab_size=500, mask_token_id=499, tp_group=None)
    large = [tensor for tensor in saved if tensor.numel() >= 64 * 100]
    assert [tensor.data_ptr() for tensor in large] == [leaf.data_ptr()]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_random_rows(data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(3, 90))
    rows = example(
        data.draw(st.integers(1, 20)),
        vocab_size + data.draw(st.integers(0, 9)),
        vocab_size,
        mask_token_id=data.draw(st.integers(0, vocab_size - 1)),
        scale=data.draw(st.sampled_from([0.0, 0.3, 3.0, 30.0, 1000.0])),
    )
    slope, bias = data.draw(st.floats(0.0, 2.0)), data.draw(st.floats(-8.0, 8.0))
    share = torch.sigmoid(slope * rows.log_snr + bias)
    targets = torch.where(
        rows.targets == rows.mask_token_id, (rows.mask_token_id + 1) % vocab_size, rows.targets
    )
    compare(rows._replace(targets=targets, uniform_share=share))
