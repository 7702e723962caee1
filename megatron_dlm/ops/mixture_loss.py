"""The two divergences in the bound of hybrid diffusion, over a split vocabulary.

Noise of log-SNR λ turns a clean token x into z ~ q(z|x) = α [z=x] + β π_z with α = σ(λ), β = 1 - α;
π gives the share s to the N - 1 text ids, uniformly, and 1 - s to the mask. A model's prediction p,
a softmax over the text ids alone, stands for q(z|p) = α p_z + β π_z (papers: arXiv 2503.04482,
2512.10858). With the background c = β s / (N - 1) of every text id, the ratio r = α / c and
L(a) = log(1 + e^a), for text ids x and z

    KL(q(.|x) || q(.|p))    = α (L(log r) - L(log r + log p_x)) - c (Σ_v log(1 + r p_v) - L(log r))
    D_IS(q(z|x) || q(z|p))  = e^u - u - 1   with   u = [z=x] L(log r) - L(log r + log p_z)

and D_IS = 0 where z is the mask. So a row of V logits enters by its log-sum-exp, by its logits at
x and z, and by one sum. With h_v = r p_v / (1 + r p_v) the gradients with respect to logit v are

    KL:    p_v (c Σ_w h_w + α h_x) - c h_v - α h_x [v=x]
    D_IS:  (1 - e^u) h_z ([v=z] - p_v)

Without uniform noise, s = 0, the sum falls out and KL = -α log p_x.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm.ops import mixture_rows
from megatron_dlm.ops.mixture_rows import GradientFactors, Softmax, TextShard
from megatron_dlm.ops.vocab_parallel import check_rows, select

# In fp32 without overflow; beyond e^80 the sum counts for less than the rounding of the rest, and
# below e^-80 for nothing.
_MAX_ABS_LOG_RATIO = 80.0
_MAX_LOG_DENSITY_RATIO = 87.0


def mixture_divergences(
    logits: Tensor,
    tokens: Tensor,
    targets: Tensor,
    log_snr: Tensor,
    uniform_share: Tensor,
    *,
    vocab_size: int,
    mask_token_id: int,
    tp_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """KL(q(.|x) || q(.|p)) and D_IS(q(z|x) || q(z|p)) in nats, fp32 [n]; see the module.

    logits [n, V/tp], any float dtype: this rank's columns of the padded vocabulary. tokens z and
    targets x: int64 [n], global ids. log_snr λ and uniform_share s, in [0, 1]: [n], best in
    float64. All but the logits are the same on every rank. The columns of the mask and of padding
    take no part in the softmax and get gradient 0.
    D_IS is 0 where s is 0: there z is the mask or its weight in the bound is 0. Where it would
    exceed e^87 it stays there. An id outside [0, vocab_size) yields infinity.
    Collectives over tp_group, in the forward pass only and also when n is 0: all-reduce MAX [n] and
    SUM [3, n], and SUM [2, n] unless s is 0 in every row (on CUDA always).
    """
    check_rows(logits, tokens, targets, log_snr, uniform_share)
    law = _RowLaw.of(log_snr, uniform_share, vocab_size)
    text = TextShard.of(logits, vocab_size, mask_token_id, tp_group)
    ids = torch.stack((targets, tokens))
    result = _MixtureDivergences.apply(logits, ids, law, text)  # type: ignore[no-untyped-call]
    assert isinstance(result, tuple)
    return result


@dataclass(frozen=True)
class _RowLaw:
    """The noise of every row, float64 [n]."""

    alpha: Tensor
    background: Tensor
    """c = β s / (N - 1), what noise gives to each text id."""
    background_of_mask: Tensor
    """β (1 - s)."""
    has_uniform: Tensor
    """bool: s > 0."""
    log_ratio: Tensor
    """log(α / c), without the underflow of either; 0 where s is 0."""

    @classmethod
    def of(cls, log_snr: Tensor, uniform_share: Tensor, vocab_size: int) -> _RowLaw:
        """λ and s [n] of any float dtype."""
        snr, share = log_snr.double(), uniform_share.double()
        beta, each = torch.sigmoid(-snr), share / (vocab_size - 1)
        return cls(
            alpha=torch.sigmoid(snr),
            background=beta * each,
            background_of_mask=beta * (1 - share),
            has_uniform=share > 0,
            log_ratio=torch.where(share > 0, snr - each.log(), 0.0),
        )

    def ratio(self) -> Tensor:
        """r, fp32; 0 where s is 0."""
        ratio = self.log_ratio.clamp(-_MAX_ABS_LOG_RATIO, _MAX_ABS_LOG_RATIO).exp()
        return torch.where(self.has_uniform, ratio, 0.0).float()


class _Context(Protocol):
    """What `_MixtureDivergences` keeps from its forward to its backward pass."""

    text: TextShard

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _MixtureDivergences(torch.autograd.Function):
    """Saves the logits themselves and a few numbers per row."""

    @staticmethod
    def forward(
        ctx: _Context, logits: Tensor, ids: Tensor, law: _RowLaw, text: TextShard
    ) -> tuple[Tensor, Tensor]:
        columns, here = text.columns(ids)
        selected = torch.stack([select(logits, of_row) for of_row in columns])
        ratio = law.ratio()
        # On a GPU the answer is not worth waiting for.
        needs_sum = ratio.is_cuda or bool(law.has_uniform.any())
        in_one_pass = needs_sum and not text.shard.is_split
        passes = _passes(logits)
        maximum, exp_sum, sums = passes.normalize(logits, text, ratio if in_one_pass else None)
        log_probs, share = text.shard.log_probs(maximum, exp_sum, selected, here)
        if needs_sum and not in_one_pass:
            softmax = Softmax(maximum, exp_sum, share)
            sums = text.shard.sum_(passes.mixture_sums(logits, text, softmax, ratio))

        kl, kl_at_x = _kl(law, text, ids[0], log_probs[0].double(), sums[0].double())
        divergence, divergence_at_z = _itakura_saito(law, text, ids, log_probs[1].double())
        of_rows = (law.background.float(), ratio, kl_at_x.float(), divergence_at_z.float())
        ctx.save_for_backward(logits, columns, here, maximum, exp_sum, share, sums[1], *of_rows)
        ctx.text = text
        return kl.float(), divergence.float()

    @staticmethod
    def backward(
        ctx: _Context, grad_kl: Tensor, grad_divergence: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, columns, here, maximum, exp_sum, share, slope_sum, *of_rows = ctx.saved_tensors
        background, ratio, kl_at_x, divergence_at_z = of_rows
        factors = GradientFactors(
            columns=columns,
            is_here=here,
            at_columns=torch.stack((-grad_kl * kl_at_x, grad_divergence * divergence_at_z)),
            background=grad_kl * background,
            ratio=ratio,
            slope_sum=slope_sum,
        )
        softmax = Softmax(maximum, exp_sum, share)
        return _passes(logits).gradient(logits, ctx.text, softmax, factors), None, None, None


class _Passes(Protocol):
    """The passes over the vocabulary; see `mixture_rows`."""

    def normalize(
        self, logits: Tensor, text: TextShard, ratio: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def mixture_sums(
        self, logits: Tensor, text: TextShard, softmax: Softmax, ratio: Tensor
    ) -> Tensor: ...

    def gradient(
        self, logits: Tensor, text: TextShard, softmax: Softmax, factors: GradientFactors
    ) -> Tensor: ...


def _passes(logits: Tensor) -> _Passes:
    """Triton's on CUDA if PyTorch came with Triton, else torch's."""
    if not (logits.is_cuda and importlib.util.find_spec("triton")):
        return mixture_rows
    from megatron_dlm.ops import mixture_loss_triton

    return mixture_loss_triton


def _kl(
    law: _RowLaw, text: TextShard, targets: Tensor, log_p: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """KL and α h_x, float64 [n], from log p_x and Σ log(1 + r p_v)."""
    whole, at_target = _softplus(law.log_ratio), law.log_ratio + log_p
    gain = torch.where(law.has_uniform, whole - _softplus(at_target), -log_p)
    of_text = law.alpha * gain - law.background * (log_sum - whole)
    certain = law.alpha + law.background_of_mask
    of_mask = certain * _log_ratio_of_mask(law) - law.background * log_sum
    slope = law.alpha * torch.where(law.has_uniform, at_target.sigmoid(), 1.0)
    kl = text.choose(targets, of_text, of_mask)
    return kl, text.choose(targets, slope, torch.zeros_like(slope))


def _itakura_saito(
    law: _RowLaw, text: TextShard, ids: Tensor, log_p: Tensor
) -> tuple[Tensor, Tensor]:
    """D_IS and (1 - e^u) h_z, float64 [n], from log p_z; ids are targets and tokens."""
    tokens, at_token = ids[1], law.log_ratio + log_p
    is_same = tokens == ids[0]
    of_text = torch.where(is_same, _softplus(law.log_ratio), 0.0) - _softplus(at_token)
    of_mask = torch.where(is_same, _log_ratio_of_mask(law), 0.0)
    log_density_ratio = torch.where(tokens == text.mask_token_id, of_mask, of_text)
    log_density_ratio = log_density_ratio.clamp(max=_MAX_LOG_DENSITY_RATIO)
    log_density_ratio = torch.where(law.has_uniform, log_density_ratio, 0.0)
    excess = torch.expm1(log_density_ratio)
    slope = -excess * at_token.sigmoid()
    divergence = excess - log_density_ratio
    divergence = text.choose(tokens, divergence, divergence)
    return divergence, text.choose(tokens, slope, torch.zeros_like(slope))


def _log_ratio_of_mask(law: _RowLaw) -> Tensor:
    """log of q(mask|mask) / q(mask|p)."""
    return torch.log1p(law.alpha / law.background_of_mask)


def _softplus(values: Tensor) -> Tensor:
    """log(1 + e^values) to the last digit of small values too."""
    return torch.logaddexp(values, torch.zeros_like(values))
