"""Log-probabilities at chosen slots of many inputs, in batches; no other slot gets logits.

Shapes: b inputs, s slots of the longest, n slots read, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

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
    num_context: int = 0
    """So many first tokens see each other and nothing else, though all see them."""
    clean: Tensor | None = None
    """int64 [s]: the text without noise, which blocks of a block model see of those before."""
    log_snr: float = 0.0
    """Of the noise in the tokens, where the measure asks for it."""


class Answer(NamedTuple):
    """What a model says of the n targets of one row."""

    log_probs: Tensor
    """float64 [n], nats: of the targets, under the softmax that training uses; or the measure."""
    likeliest: Tensor
    """int64 [n]: the most probable of the ids that may be generated."""
    likeliest_log_probs: Tensor
    """float64 [n], nats: of the likeliest, among those ids."""


class Measure(Protocol):
    """A number for every slot that takes the place of its target's log-probability."""

    def __call__(self, logits: Tensor, targets: Tensor, tokens: Tensor, log_snr: Tensor) -> Tensor:
        """[n] of logits [n, V], targets and read tokens (int64 [n]) and log-SNRs (float64 [n])."""


class HiddenStates(Protocol):
    """A model up to its output layer."""

    def __call__(self, tokens: Tensor, valid: Tensor | None, **options: Any) -> Tensor:
        """tokens int64 [b, s], valid bool [b, s] or None -> [b, s, h].

        options, only where rows ask for them: context (bool [b, s]), doubled (True: tokens are
        [corrupted; clean])."""


class SlotReader:
    """A model as likelihoods see it."""

    def __init__(
        self,
        hidden_states: HiddenStates,
        logits: Callable[[Tensor], Tensor],
        *,
        silent_ids: Sequence[int] = (),
        measure: Measure | None = None,
    ) -> None:
        """logits: [n, h] -> [n, V]. silent_ids are never generated, and hence never the
        likeliest."""
        self._hidden_states, self._logits = hidden_states, logits
        self._silent_ids, self._measure = list(silent_ids), measure

    @torch.no_grad()
    def read(self, rows: Sequence[Row], inputs: Sequence[Row]) -> list[Answer]:
        """Answers to rows whose input is that of one of `inputs`, by one forward pass.

        Each input goes through the model once, however many rows ask about it.
        """
        place_of = {_key(row): place for place, row in enumerate(inputs)}
        hidden, width = self._pass(inputs)
        place = [torch.full_like(row.slots, place_of[_key(row)]) for row in rows]
        slot = [row.slots + width - len(row.tokens) for row in rows]
        where = (torch.cat(place).to(hidden.device), torch.cat(slot).to(hidden.device))
        asked = (
            torch.cat([row.targets for row in rows]),
            torch.cat([row.tokens[row.slots] for row in rows]),
            torch.cat([torch.full(row.slots.shape, row.log_snr).double() for row in rows]),
        )
        answer = self._answer(hidden, where, [column.to(hidden.device) for column in asked])
        sizes = [len(row.slots) for row in rows]
        parts = [column.cpu().split(sizes) for column in answer]
        return [Answer(*columns) for columns in zip(*parts, strict=True)]

    def _pass(self, inputs: Sequence[Row]) -> tuple[Tensor, int]:
        """Hidden states of the inputs, padded on the left, and the width of their tokens."""
        tokens, valid = pad_left([row.tokens.tolist() for row in inputs], filler=0)
        width = tokens.shape[1]
        options: dict[str, Any] = {}
        if any(row.num_context for row in inputs):
            counts = torch.tensor([[row.num_context] for row in inputs])
            options["context"] = valid & (valid.cumsum(1) <= counts)
        clean = [row.clean.tolist() for row in inputs if row.clean is not None]
        if clean:
            assert len(clean) == len(inputs)
            tokens = torch.cat([tokens, pad_left(clean, filler=0)[0]], dim=1)
            valid, options["doubled"] = valid.repeat(1, 2), True
        return self._hidden_states(tokens, None if bool(valid.all()) else valid, **options), width

    def _answer(
        self, hidden: Tensor, where: tuple[Tensor, Tensor], asked: Sequence[Tensor]
    ) -> Answer:
        """Piece by piece, so that the logits of all slots never exist at once."""
        limit = _GPU_CHUNK_ELEMENTS if hidden.is_cuda else _CPU_CHUNK_ELEMENTS
        answers: list[Answer] = []
        start, size = 0, 1
        while start < len(where[0]):
            chosen = slice(start, start + size)
            logits = self._logits(hidden[where[0][chosen], where[1][chosen]])
            answers.append(self._answer_of(logits, *(column[chosen] for column in asked)))
            start += size
            size = max(1, limit // logits.shape[1])
        return Answer(*(torch.cat(columns) for columns in zip(*answers, strict=True)))

    def _answer_of(
        self, logits: Tensor, targets: Tensor, tokens: Tensor, log_snr: Tensor
    ) -> Answer:
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        if self._measure is None:
            chosen = torch.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]
        else:
            chosen = self._measure(logits, targets, tokens, log_snr)
        allowed = logits.clone()
        allowed[:, self._silent_ids] = float("-inf")
        best = torch.log_softmax(allowed, dim=1).max(dim=1)
        return Answer(chosen.double(), best.indices, best.values.double())


def open_reader(model: LoadedModel, measure: Measure | None = None) -> SlotReader:
    """The reader of a loaded model, on the model's device."""
    network = model.model

    def hidden_states(tokens: Tensor, valid: Tensor | None, **options: Any) -> Tensor:
        device = network.device
        valid = None if valid is None else valid.to(device)
        return network.model(tokens.to(device), valid, **options).last_hidden_state

    silent_ids = network.config.silent_token_ids
    return SlotReader(hidden_states, network.logits, silent_ids=silent_ids, measure=measure)


def read_rows(
    reader: SlotReader, rows: Iterable[Row], batch_size: int
) -> Iterator[tuple[Row, Answer]]:
    """Every row with its answer, in order; at most `batch_size` different inputs in a batch.

    Rows are drawn as they are needed. Neighbours of one length make batches without padding.
    """
    batch: list[Row] = []
    inputs: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = _key(row)
        if key not in inputs and len(inputs) == batch_size:
            yield from zip(batch, reader.read(batch, list(inputs.values())), strict=True)
            batch, inputs = [], {}
        inputs[key] = row
        batch.append(row)
    if batch:
        yield from zip(batch, reader.read(batch, list(inputs.values())), strict=True)


def _key(row: Row) -> tuple[object, ...]:
    """Equal for rows that the model sees as one input."""
    clean = None if row.clean is None else row.clean.numpy().tobytes()
    return row.tokens.numpy().tobytes(), row.num_context, clean
