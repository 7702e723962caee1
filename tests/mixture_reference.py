"""The divergences of hybrid diffusion term by term over the whole vocabulary, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """One problem; everything but the logits per row."""

    logits: Tensor
    tokens: Tensor
    targets: Tensor
    log_snr: Tensor
    uniform_share: Tensor
    vocab_size: int
    mask_token_id: int


class Divergences(NamedTuple):
    """Value and gradient with respect to the logits."""

    kl: Tensor
    itakura_saito: Tensor
    gradient: Tensor


def divergences(rows: Rows, kl_weights: Tensor, is_weights: Tensor) -> Divergences:
    """Of Σ kl_weights KL + is_weights D_IS, by autograd."""
    logits = rows.logits.detach().double().requires_grad_()
    kl, itakura_saito = values(logits, rows)
    (kl * kl_weights.double() + itakura_saito * is_weights.double()).sum().backward()
    assert logits.grad is not None
    return Divergences(kl.detach(), itakura_saito.detach(), logits.grad)


def values(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """KL and D_IS [n] of float64 logits, with gradient."""
    num_ids, mask = rows.vocab_size, rows.mask_token_id
    snr, share = rows.log_snr.double()[:, None], rows.uniform_share.double()[:, None]
    alpha, beta = torch.sigmoid(snr), torch.sigmoid(-snr)
    is_mask = (torch.arange(num_ids) == mask)[None]
    is_target = torch.arange(num_ids)[None] == rows.targets[:, None]
    noise = beta * torch.where(is_mask, 1 - share, share / (num_ids - 1))
    truth = alpha * is_target + noise
    log_p = logits[:, :num_ids].masked_fill(is_mask, -torch.inf).log_softmax(1)

    # log(truth / model) as log(1 + signal / noise) of both, or as that of the signals alone.
    log_alpha, zero = torch.nn.functional.logsigmoid(snr), torch.zeros(())
    has_noise = noise > 0
    log_noise = torch.where(has_noise, noise, 1.0).log()
    at_target = torch.where(is_target, log_alpha - log_noise, -torch.inf)
    signal = torch.where(is_mask, 0.0, log_p) + log_alpha
    model = torch.where(is_mask, zero, torch.logaddexp(signal - log_noise, zero))
    with_noise = torch.logaddexp(at_target, zero) - model
    without = torch.where(is_mask, torch.inf, log_alpha - signal)
    log_ratio = torch.where(truth > 0, torch.where(has_noise, with_noise, without), 0.0)
    # The differences of the probabilities add up to 0; with them no digits cancel between terms.
    difference = alpha * (torch.where(is_mask, 0.0, log_p.exp()) - is_target.double())
    kl = (torch.where(truth > 0, truth * log_ratio, 0.0) + difference).sum(1)

    at_token = log_ratio.gather(1, rows.tokens[:, None]).squeeze(1)
    at_token = torch.where(share[:, 0] > 0, at_token, 0.0)
    return kl, torch.expm1(at_token) - at_token
