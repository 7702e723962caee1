"""Log-probabilities at chosen slots of many inputs, in batches; no other slot gets logits.

Shapes: b inputs, s slots of the longest, n slots read, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from megatron_dlm.generation.prompts import pad_left
from megatron_dlm.hf.load import LoadedModel

# Logits of one piece; on a GPU the bandwidth wants more than a CPU's cache holds.
_CPU_CHUNK_ELEMENTS = 1 << 20
_GPU_CHUNK_ELEMENTS = 1 << 27


class Row(NamedTuple):
    """One input, and what is asked at some of its slots."""

    tokens: Tensor
    """int64 [s]"""
    slots: Tensor
    """int64 [n]"""
    targets: Tensor
    """int64 [n]"""


class Answer(NamedTuple):
    """What a model says of the n targets of one row."""

    log_probs: Tensor
    """float64 [n], nats: of the targets, under the softmax that training uses."""
    likeliest: Tensor
    """int64 [n]: the most probable of the ids that may be generated."""
    likeliest_log_probs: Tensor
    """float64 [n], nats: of the likeliest, among those ids."""


class SlotReader:
    """A model as likelihoods see it."""

    def __init__(
        self,
        hidden_states: Callable[[Tensor, Tensor | None], Tensor],
        logits: Callable[[Tensor], Tensor],
        *,
        silent_ids: Sequence[int] = (),
    ) -> None:
        """hidden_states: (tokens int64 [b, s], valid bool [b, s] or None) -> [b, s, h]; logits:
        [n, h] -> [n, V]. silent_ids are never generated, and hence never the likeliest."""
        self._hidden_states, self._logits = hidden_states, logits
        self._silent_ids = list(silent_ids)

    @torch.no_grad()
    def read(self, rows: Sequence[Row], inputs: Sequence[Tensor]) -> list[Answer]:
        """Answers to rows whose tokens are among `inputs`, by one forward pass.

        Each input goes through the model once, however many rows ask about it.
        """
        place_of = {_key(tokens): place for place, tokens in enumerate(inputs)}
        tokens, valid = pad_left([tokens.tolist() for tokens in inputs], filler=0)
        width = tokens.shape[1]
        hidden = self._hidden_states(tokens, None if bool(valid.all()) else valid)
        row = [torch.full_like(row.slots, place_of[_key(row.tokens)]) for row in rows]
        slot = [row.slots + width - len(row.tokens) for row in rows]
        where = (torch.cat(row).to(hidden.device), torch.cat(slot).to(hidden.device))
        targets = torch.cat([row.targets for row in rows]).to(hidden.device)
        answer = self._answer(hidden, where, targets)
        sizes = [len(row.slots) for row in rows]
        parts = [column.cpu().split(sizes) for column in answer]
        return [Answer(*columns) for columns in zip(*parts, strict=True)]

    def _answer(self, hidden: Tensor, where: tuple[Tensor, Tensor], targets: Tensor) -> Answer:
        """Piece by piece, so that the logits of all slots never exist at once."""
        limit = _GPU_CHUNK_ELEMENTS if hidden.is_cuda else _CPU_CHUNK_ELEMENTS
        answers: list[Answer] = []
        start, size = 0, 1
        while start < len(targets):
            chosen = slice(start, start + size)
            logits = self._logits(hidden[where[0][chosen], where[1][chosen]])
            answers.append(self._answer_of(logits, targets[chosen]))
            start += size
            size = max(1, limit // logits.shape[1])
        return Answer(*(torch.cat(columns) for columns in zip(*answers, strict=True)))

    def _answer_of(self, logits: Tensor, targets: Tensor) -> Answer:
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        chosen = torch.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]
        allowed = logits.clone()
        allowed[:, self._silent_ids] = float("-inf")
        best = torch.log_softmax(allowed, dim=1).max(dim=1)
        return Answer(chosen.double(), best.indices, best.values.double())


def open_reader(model: LoadedModel) -> SlotReader:
    """The reader of a loaded model, on the model's device."""
    network = model.model
    head = network.lm_head
    table = network.model.embed_tokens.weight if head is None else head.weight

    def hidden_states(tokens: Tensor, valid: Tensor | None) -> Tensor:
        device = network.device
        valid = None if valid is None else valid.to(device)
        return network.model(tokens.to(device), valid).last_hidden_state

    silent_ids = network.config.silent_token_ids
    return SlotReader(hidden_states, lambda hidden: linear(hidden, table), silent_ids=silent_ids)


def read_rows(
    reader: SlotReader, rows: Iterable[Row], batch_size: int
) -> Iterator[tuple[Row, Answer]]:
    """Every row with its answer, in order; at most `batch_size` different inputs in a batch.

    Rows are drawn as they are needed. Neighbours of one length make batches without padding.
    """
    batch: list[Row] = []
    inputs: dict[bytes, Tensor] = {}
    for row in rows:
        key = _key(row.tokens)
        if key not in inputs and len(inputs) == batch_size:
            yield from zip(batch, reader.read(batch, list(inputs.values())), strict=True)
            batch, inputs = [], {}
        inputs[key] = row.tokens
        batch.append(row)
    if batch:
        yield from zip(batch, reader.read(batch, list(inputs.values())), strict=True)


def _key(tokens: Tensor) -> bytes:
    return tokens.numpy().tobytes()
