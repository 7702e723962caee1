"""Where parts end is a function of the text; reading goes on behind any of them."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.inputs.documents import BEGINNING, Piece
from megatron_dlm.data.preprocessing import part_reader
from megatron_dlm.data.preprocessing.part_reader import PartEnd, read_batches

RECORDS = st.lists(
    st.one_of(
        st.text(max_size=30).map(lambda text: json.dumps({"text": text}).encode()),
        st.sampled_from([b"", b"[]", b'{"text": 5}', b'{"text": "\xff"}', b"{"]),
    ),
    max_size=40,
)


def config(part_bytes: int) -> PreprocessConfig:
    return PreprocessConfig(
        ["-"], "-", "-", shard_size_bytes=part_bytes, minimum_characters=3, on_error="skip"
    )


def parts_of(
    pieces: list[Piece], part_bytes: int, start: tuple[int, int] = BEGINNING
) -> Iterator[tuple[list[str], PartEnd]]:
    """Texts and end of every part."""
    texts: list[str] = []
    for batch in read_batches(
        pieces, config(part_bytes), BEGINNING._replace(piece=start[0], offset=start[1])
    ):
        texts += batch.texts
        if batch.end is not None:
            yield texts, batch.end
            texts = []
    assert texts == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(files=st.lists(RECORDS, min_size=1, max_size=3), part_bytes=st.integers(1, 400))
def test_going_on_behind_any_part_gives_the_rest(files: list[list[bytes]], part_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pieces = []
        for number, records in enumerate(files):
            content = b"".join(record + b"\n" for record in records)
            path = Path(folder, f"{number}.jsonl" + ".gz" * (number % 2))
            path.write_bytes(gzip.compress(content) if number % 2 else content)
            pieces.append(Piece(str(path), 0, path.stat().st_size))
        parts = list(parts_of(pieces, part_bytes))
        assert [end.is_last for _, end in parts] == [False] * (len(parts) - 1) + [True]
        ((all_texts, whole),) = parts_of(pieces, 10**9)
        assert [text for texts, _ in parts for text in texts] == all_texts
        counts: Counter[str] = Counter()
        for _, end in parts:
            counts.update(end.left_out)
        assert counts == Counter(whole.left_out)
        for number, (_, end) in enumerate(parts[:-1]):
            assert list(parts_of(pieces, part_bytes, end.next)) == parts[number + 1 :]


def test_a_part_ends_with_the_document_that_fills_it(tmp_path: Path) -> None:
    line = b'{"text": "0123456789"}\n'
    path = tmp_path / "lines.jsonl"
    path.write_bytes(line * 10)
    piece = Piece(str(path), 0, path.stat().st_size)
    found = [(len(texts), end.sources[0]) for texts, end in parts_of([piece], 3 * len(line))]
    assert [count for count, _ in found] == [3, 3, 3, 1]
    stretches = [(source.begin, source.end) for _, source in found]
    size = len(line)
    assert stretches == [
        (0, 3 * size),
        (3 * size, 6 * size),
        (6 * size, 9 * size),
        (9 * size, 10 * size),
    ]
    # One byte more, and a fourth document is needed.
    assert [len(texts) for texts, _ in parts_of([piece], 3 * len(line) + 1)] == [4, 4, 2]
    # The last document fills the last part: no empty one follows.
    assert [len(texts) for texts, _ in parts_of([piece], 5 * len(line))] == [5, 5]


def test_batches_hold_few_documents_and_few_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"text": "0123456789"}\n' * 10)
    piece = Piece(str(path), 0, path.stat().st_size)

    def sizes() -> list[int]:
        return [len(batch.texts) for batch in read_batches([piece], config(10**9), BEGINNING)]

    monkeypatch.setattr(part_reader, "_BATCH_DOCUMENTS", 4)
    assert sizes() == [4, 4, 2]
    monkeypatch.setattr(part_reader, "_BATCH_CHARACTERS", 25)
    assert sizes() == [3, 3, 3, 1]


def test_a_job_without_documents_is_one_empty_part(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"[]\n")
    (batch,) = read_batches([Piece(str(path), 0, 3)], config(10), BEGINNING)
    assert batch.texts == []
    assert batch.end is not None
    assert (batch.end.left_out, batch.end.is_last, batch.end.sources) == (
        {"not_an_object": 1},
        True,
        [],
    )
