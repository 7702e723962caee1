"""Cropping and moving a batch, and where its documents begin."""

from __future__ import annotations

import torch

from megatron_dlm.ops.batch import TokenBatch, document_starts

DOCUMENT = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 2, 2]])


def make_batch(document: torch.Tensor | None) -> TokenBatch:
    tokens = torch.arange(12).reshape(2, 6)
    return TokenBatch(tokens, tokens % 5 > 0, torch.tensor([7, 8]), document)


def test_crop_keeps_the_documents_of_the_tokens_it_keeps() -> None:
    batch = make_batch(DOCUMENT).crop(3)
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert batch.valid.tolist() == [[False, True, True, True], [True, True, True, True]]
    assert batch.sample_index.tolist() == [7, 8]
    assert batch.document is not None
    assert batch.document.tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    assert batch.input_document is not None
    assert batch.input_document.tolist() == [[0, 0, 0], [0, 1, 2]]


def test_a_batch_moves_whole() -> None:
    moved = make_batch(DOCUMENT).to("meta")
    fields = (moved.tokens, moved.valid, moved.sample_index, moved.document)
    assert all(field is not None and field.device.type == "meta" for field in fields)


def test_a_batch_without_documents_stays_so() -> None:
    batch = make_batch(None)
    assert batch.input_document is None
    assert batch.crop(3).document is None
    assert batch.to("meta").document is None


def test_a_document_begins_in_every_row_and_where_the_number_changes() -> None:
    starts = document_starts(torch.tensor([[0, 0, 0, 1, 1, 2], [2, 2, 3, 3, 4, 5], [0] * 6]))
    assert starts.int().tolist() == [[1, 0, 0, 1, 0, 1], [1, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0]]


def test_a_moved_batch_knows_its_first_sample() -> None:
    """On the meta device no number can be read."""
    moved = make_batch(None).to("meta")
    assert moved.sample_index.is_meta
    assert moved.first_sample == 7
