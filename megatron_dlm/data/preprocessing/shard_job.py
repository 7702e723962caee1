"""One job of a preprocess run: the documents of its pieces become shards, one after the other.

Reading is ahead of encoding, in a thread of its own, and the encoder works outside of Python's
lock. A killed job goes on behind its last whole shard.
"""

from __future__ import annotations

import errno
import hashlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Literal, NamedTuple

import numpy as np

from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.inputs.documents import BEGINNING, Place
from megatron_dlm.data.inputs.input_plan import Job
from megatron_dlm.data.prefetch import prefetch
from megatron_dlm.data.preprocessing.part_reader import Batch, PartEnd, read_batches
from megatron_dlm.data.preprocessing.recipe import Recipe
from megatron_dlm.data.preprocessing.shard_set import (
    is_done,
    shard_prefix,
    valid_prefix,
    whole_parts,
)
from megatron_dlm.data.storage.manifest import HeldOut, Origin
from megatron_dlm.data.storage.shard_writer import ShardWriter
from megatron_dlm.data.tokenization.encoder import open_encoder
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer

_BATCHES_AHEAD = 2
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Progress(NamedTuple):
    """What has been done since the last report."""

    documents: int
    """Documents read, those left out included."""
    num_bytes: int
    """Bytes read, unpacked."""
    tokens: int


class JobRunner:
    """Runs jobs in this process; the tokenizer is opened once."""

    def __init__(self, config: PreprocessConfig, recipe: Recipe, *, num_threads: int) -> None:
        """`num_threads` are for the tokenizer's library.

        Raises ValueError where the tokenizer is not the one of the recipe.
        """
        self._config, self._recipe = config, recipe
        self._tokenizer = load_tokenizer(config.tokenizer)
        if self._tokenizer.sha256 != recipe.tokenizer_sha256:
            raise ValueError(f"tokenizer {config.tokenizer} changed meanwhile; start again")
        self._encoder = open_encoder(self._tokenizer, config.encoder, num_threads=num_threads)

    @property
    def encoder(self) -> str:
        """The library that encodes, and why it is not the fast one."""
        reason = self._encoder.reason
        return self._encoder.name + (f" ({reason})" if reason else "")

    def run(self, number: int, job: Job) -> Generator[Progress, None, None]:
        """Write the shards of a job that are not there yet; reports after every batch.

        Raises ValueError at text that cannot be read, OSError where a shard cannot be written.
        """
        parts = whole_parts(self._config.output_prefix, number, self._recipe.sha256)
        if is_done(parts):
            return
        part, start = len(parts), BEGINNING
        if parts and parts[-1].origin is not None:
            start = Place(*parts[-1].origin.resume_at)
        batches = read_batches(job.pieces, self._config, start)
        ahead = prefetch(lambda batch: batch, batches, depth=_BATCHES_AHEAD)
        with closing(ahead):
            for first in ahead:
                yield from self._write_part(number, part, _part_of(first, ahead))
                part += 1

    def _write_part(self, number: int, part: int, batches: Iterator[Batch]) -> Iterator[Progress]:
        """Publish the shard of the training documents last: its manifest makes the part whole."""
        train = shard_prefix(self._config.output_prefix, number, part)
        held = shard_prefix(valid_prefix(self._config.output_prefix), number, part)
        with ExitStack() as stack:
            sides = [stack.enter_context(self._open(train, "train"))]
            if self._recipe.validation_fraction:
                sides.append(stack.enter_context(self._open(held, "valid")))
            end = None
            for batch in batches:
                tokens = self._encode(batch.texts, sides) if batch.texts else 0
                yield Progress(batch.num_documents, batch.num_bytes, tokens)
                end = batch.end
            assert end is not None
            for side in reversed(sides):
                side.publish(end, self._origin(number, part, end))

    def _encode(self, texts: Sequence[str], sides: Sequence[_Side]) -> int:
        """Encode texts and hand them to their sides; the number of tokens."""
        tokens, lengths = self._encoder.encode(texts)
        if not lengths.all():  # a tokenizer may strip blanks
            texts = [text for text, length in zip(texts, lengths, strict=True) if length]
            sides[0].num_without_tokens += len(lengths) - len(texts)
            lengths = lengths[lengths > 0]
        if self._recipe.eod_id is not None:
            tokens, lengths = append_to_each(tokens, lengths, self._recipe.eod_id)
        num_bytes = np.fromiter(map(_utf8_bytes, texts), np.int64, count=len(texts))
        if len(sides) == 1:
            sides[0].add(tokens, lengths, int(num_bytes.sum()))
        else:
            fraction = self._recipe.validation_fraction
            is_held = np.fromiter((in_validation(text, fraction) for text in texts), bool)
            for side, chosen in zip(sides, (~is_held, is_held), strict=True):
                kept = tokens[np.repeat(chosen, lengths)]
                side.add(kept, lengths[chosen], int(num_bytes[chosen].sum()))
        return len(tokens)

    def _open(self, prefix: str, side: Literal["train", "valid"]) -> _Side:
        recipe = self._recipe
        writer = ShardWriter(
            prefix,
            vocab_size=recipe.vocab_size,
            tokenizer_sha256=recipe.tokenizer_sha256,
            eod_id=recipe.eod_id,
            mask_id=recipe.mask_id,
        )
        fraction = recipe.validation_fraction
        return _Side(writer, HeldOut(fraction, side) if fraction else None)

    def _origin(self, number: int, part: int, end: PartEnd) -> Origin:
        return Origin(
            sha256=self._recipe.inputs_sha256,
            recipe_sha256=self._recipe.sha256,
            job=number,
            num_jobs=self._recipe.num_jobs,
            part=part,
            is_last=end.is_last,
            resume_at=() if end.is_last else tuple(end.next),
        )


class _Side:
    """One of the shards that a part's documents are divided into."""

    def __init__(self, writer: ShardWriter, held_out: HeldOut | None) -> None:
        self._writer, self._held_out = writer, held_out
        self._text_bytes = 0
        self.num_without_tokens = 0
        """Documents left out because encoding gives nothing."""

    def add(self, tokens: np.ndarray, lengths: np.ndarray, num_bytes: int) -> None:
        with _named_errors(self._writer.prefix):
            self._writer.add_documents(tokens, lengths)
        self._text_bytes += num_bytes

    def publish(self, end: PartEnd, origin: Origin) -> None:
        # The shard of the training documents counts for both.
        is_valid = self._held_out is not None and self._held_out.side == "valid"
        left_out = Counter() if is_valid else Counter(end.left_out)
        left_out["no_tokens"] += self.num_without_tokens
        with _named_errors(self._writer.prefix):
            self._writer.publish(
                end.sources,
                text_bytes=self._text_bytes,
                left_out=+left_out,
                held_out=self._held_out,
                origin=origin,
            )

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)


def in_validation(text: str, fraction: float) -> bool:
    """Whether a document is held out: its hash decides, so the choice survives a growing corpus."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < int(fraction * 2.0**64)


def append_to_each(
    tokens: np.ndarray, lengths: np.ndarray, token: int
) -> tuple[np.ndarray, np.ndarray]:
    """Append one token to each document of `tokens` (back to back); new tokens and lengths."""
    longer = lengths + 1
    result = np.empty(len(tokens) + len(lengths), dtype=tokens.dtype)
    ends = np.cumsum(longer) - 1
    is_text = np.ones(len(result), dtype=bool)
    is_text[ends] = False
    result[is_text], result[ends] = tokens, token
    return result, longer


def _part_of(first: Batch, following: Iterator[Batch]) -> Iterator[Batch]:
    """The batches of one part, of which the first has been taken already."""
    yield first
    while first.end is None:
        first = next(following)
        yield first


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


@contextmanager
def _named_errors(prefix: str) -> Iterator[None]:
    """Say which file a full disk refuses, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        what = str(error.strerror)
        if error.errno in _NO_ROOM:
            what += "; make room, then the same command goes on from here"
        raise OSError(error.errno, what, f"{prefix}.bin") from None
