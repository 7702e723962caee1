"""Preprocessing the way Megatron-LM's tool does it: the baseline of `preprocess.py`.

A pool of worker processes; a worker parses one line and encodes one document at a time with the
tokenizer's own library, `imap` hands documents out 32 at a time, and the main process appends one
document after the other to Megatron Core's own IndexedDatasetBuilder. Written anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

_CHUNK_DOCUMENTS = 32
_encode: Callable[[str], list[int]]
_eod: int


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    for name in ("input", "output_prefix", "kind", "model"):
        options.add_argument(name)
    options.add_argument("workers", type=int)
    arguments = options.parse_args()
    vocab_size = _open(arguments.kind, arguments.model)
    started = time.perf_counter()
    num_tokens = 0
    builder = IndexedDatasetBuilder(
        f"{arguments.output_prefix}.bin", dtype=DType.optimal_dtype(vocab_size)
    )
    pool = multiprocessing.Pool(
        arguments.workers, initializer=_open, initargs=(arguments.kind, arguments.model)
    )
    with open(arguments.input, encoding="utf-8") as lines, pool:
        for ids in pool.imap(_encode_line, lines, _CHUNK_DOCUMENTS):
            builder.add_document(ids, [len(ids)])
            num_tokens += len(ids)
    builder.finalize(f"{arguments.output_prefix}.idx")
    seconds = time.perf_counter() - started
    json.dump({"tokens": num_tokens, "loop_seconds": seconds}, sys.stdout)


def _open(kind: str, model: str) -> int:
    """Make the encoder of this process; the size of the vocabulary."""
    global _encode, _eod
    if kind == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=model)
        _encode, _eod = processor.encode_as_ids, processor.eos_id()
        return int(processor.vocab_size())
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(model)
    _encode, _eod = (
        (lambda text: tokenizer.encode(text).ids),
        tokenizer.token_to_id("<|endoftext|>"),
    )
    return int(tokenizer.get_vocab_size())


def _encode_line(line: str) -> list[int]:
    return [*_encode(json.loads(line)["text"]), _eod]


if __name__ == "__main__":
    main()
