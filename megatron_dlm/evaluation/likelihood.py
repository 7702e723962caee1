"""log p(answer | prompt) in nats: exact for autoregressive models, a bound for diffusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from megatron_dlm.evaluation.estimates import (
    DEFAULT_DRAWS,
    Likelihood,
    MaskDraws,
    Request,
    by_length,
    score_by_draws,
)
from megatron_dlm.evaluation.hybrid_bound import HybridBound
from megatron_dlm.evaluation.mask_bound import MaskBound
from megatron_dlm.evaluation.reading import Row, SlotReader, open_reader, read_rows
from megatron_dlm.hf.load import LoadedModel

__all__ = [
    "Likelihood",
    "MaskDraws",
    "Request",
    "bound_of",
    "check_objective",
    "longest_text",
    "score",
    "score_autoregressive",
    "score_diffusion",
]


def score(
    model: LoadedModel,
    requests: Sequence[Request],
    *,
    draws: MaskDraws = DEFAULT_DRAWS,
    batch_size: int = 32,
    with_greedy: bool = False,
) -> list[Likelihood]:
    """The likelihood of every request, in order; it depends on no other request.

    Raises ValueError for an empty answer, one that leaves the model's length, an autoregressive
    answer without a prompt, and a diffusion model without a mask.
    """
    check_objective(model)
    limit = longest_text(model)
    for request in requests:
        _check(request, limit, model)
    if model.objective_kind == "autoregressive":
        return score_autoregressive(open_reader(model), requests, batch_size=batch_size)
    bound = bound_of(model)
    reader = open_reader(model, bound if isinstance(bound, HybridBound) else None)
    return score_diffusion(
        reader, requests, bound, draws=draws, batch_size=batch_size, with_greedy=with_greedy
    )


def bound_of(model: LoadedModel) -> MaskBound | HybridBound:
    """The bound that a diffusion model was trained on."""
    if model.objective_kind == "hybrid":
        return HybridBound.of(model)
    assert model.mask_token_id is not None
    is_block = model.objective_kind == "block"
    return MaskBound(model.mask_token_id, model.objective.block_size if is_block else None)


def check_objective(model: LoadedModel) -> None:
    """Refuse a model whose likelihood cannot be known."""
    if model.objective_kind != "autoregressive" and model.mask_token_id is None:
        raise ValueError(f"{model.source} is a {model.objective_kind} model but names no mask id")


def longest_text(model: LoadedModel) -> int:
    """Tokens of prompt and answer together; the last of an autoregressive text is not read."""
    return model.max_length + (model.objective_kind == "autoregressive")


def _check(request: Request, limit: int, model: LoadedModel) -> None:
    if not request.answer:
        raise ValueError("an answer is empty; there is nothing to score")
    if not request.prompt and model.objective_kind == "autoregressive":
        raise ValueError("an autoregressive answer needs a prompt of at least one token")
    length = len(request.prompt) + len(request.answer)
    if length > limit:
        raise ValueError(
            f"prompt and answer have {length} tokens; {model.source} takes {limit}: shorten them"
        )


def score_autoregressive(
    reader: SlotReader, requests: Sequence[Request], *, batch_size: int
) -> list[Likelihood]:
    """Exact: the sum over the answer's tokens, by one pass. Prompts hold at least one token."""
    order = by_length(requests)

    def rows() -> Iterator[Row]:
        for number in order:
            prompt, answer = requests[number]
            tokens = torch.tensor([*prompt, *answer])
            slots = torch.arange(len(prompt) - 1, len(tokens) - 1)
            yield Row(tokens[:-1], slots, tokens[len(prompt) :])

    found: dict[int, Likelihood] = {}
    answers = read_rows(reader, rows(), batch_size)
    for number, (row, said) in zip(order, answers, strict=True):
        is_greedy = bool((said.likeliest == row.targets).all())
        found[number] = Likelihood(float(said.log_probs.sum()), 0.0, 1, is_greedy)
    return [found[number] for number in range(len(requests))]


def score_diffusion(
    reader: SlotReader,
    requests: Sequence[Request],
    bound: MaskBound | HybridBound,
    *,
    draws: MaskDraws = DEFAULT_DRAWS,
    batch_size: int,
    with_greedy: bool = False,
) -> list[Likelihood]:
    """Lower bounds of the log-likelihoods, with the standard errors of the estimates.

    The reader of a hybrid model has its bound as measure.
    """
    found = score_by_draws(
        reader, requests, lambda request: bound.draw(request, draws), batch_size=batch_size
    )
    if not with_greedy:
        return found
    greedy = bound.greedy(reader, requests, batch_size=batch_size)
    return [replace(one, is_greedy=number in greedy) for number, one in enumerate(found)]
