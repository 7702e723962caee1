"""Megatron-LM's `preprocess_data.py` flags over `megatron-dlm preprocess`: same files, much faster.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model DIRECTORY --append-eod --workers 16

writes corpus_text_document.bin and .idx, byte for byte those of Megatron-LM, and a manifest. Three
things differ: text that spells a special token is encoded as text, documents without tokens are
left out, and a killed run goes on where it stopped. What cannot be honoured is refused.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_dlm.config.commands import PreprocessConfig
from megatron_dlm.data.commands.merge import join_shards
from megatron_dlm.data.preprocessing.preprocess import make_dataset
from megatron_dlm.data.preprocessing.shard_set import completed_shards

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer")

_USE_JSON = "give the tokenizer.json with --tokenizer-type HuggingFaceTokenizer"
# Flag of Megatron-LM -> why it is refused.
REFUSED = {
    "--split-sentences": "documents are not split into sentences",
    "--keep-newlines": "documents are not split into sentences",
    "--lang": "documents are not split into sentences",
    "--vocab-file": _USE_JSON,
    "--merge-file": _USE_JSON,
    "--vocab-size": "the tokenizer itself says how many ids it has",
    "--tiktoken-pattern": _USE_JSON,
    "--tiktoken-num-special-tokens": _USE_JSON,
    "--tiktoken-special-tokens": _USE_JSON,
    "--tokenizer-sentencepiece-legacy": "no special tokens are added to the model",
    "--tokenizer-hf-include-special-tokens": "nothing but text and the end of document is written",
    "--find-optimal-num-workers": "--workers 0 takes every core",
    "--workers-to-check": "--workers 0 takes every core",
    "--max-documents": "--workers 0 takes every core",
    "--performance-dir": "--workers 0 takes every core",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        options = _parse(sys.argv[1:] if argv is None else argv)
        for key in options.json_keys:
            _write_dataset(options, key)
    except (ValueError, OSError) as error:
        print(f"preprocess_data.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--input", required=True, help="file, directory, glob or @LIST")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY")
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--tokenizer-type", required=True, help=" or ".join(TOKENIZER_TYPES))
    parser.add_argument("--tokenizer-model", required=True, help="file or directory")
    parser.add_argument("--append-eod", action="store_true")
    parser.add_argument("--workers", type=int, required=True, help="0: one per core")
    parser.add_argument("--log-interval", help="not used: progress is shown by the clock")
    parser.add_argument("--partitions", type=int, default=1, help="only 1: use more --workers")
    parser.add_argument("--keep-sequential-samples", action="store_true", help="always so")
    for flag, reason in REFUSED.items():
        parser.add_argument(flag, nargs="*", help=f"refused: {reason}")
    options = parser.parse_args(argv)
    for flag, reason in REFUSED.items():
        if getattr(options, flag[2:].replace("-", "_")) is not None:
            raise ValueError(f"{flag} cannot be honoured: {reason}; leave the flag away")
    if options.partitions != 1:
        raise ValueError(
            f"--partitions {options.partitions} would change the order of the documents; leave the "
            "flag away: every worker reads its own part of the input"
        )
    if options.tokenizer_type not in TOKENIZER_TYPES:
        raise ValueError(
            f"--tokenizer-type {options.tokenizer_type} is not supported; have: "
            + ", ".join(TOKENIZER_TYPES)
        )
    return options


def _write_dataset(options: argparse.Namespace, key: str) -> None:
    """One shard for one key; its parts lie beside it until it is whole."""
    output = f"{options.output_prefix}_{key}_document"
    parts = Path(f"{output}.parts")
    config = PreprocessConfig(
        input=[options.input],
        output_prefix=str(parts / "part"),
        tokenizer=options.tokenizer_model,
        text_field=key,
        append_eod=options.append_eod,
        workers=options.workers,
        array_index=0,
        array_count=1,
    )
    make_dataset(config)
    shards, _ = completed_shards(config.output_prefix)
    manifest = join_shards(shards, output)
    assert manifest is not None, "every part has one"
    shutil.rmtree(parts)
    print(f"{output}.bin, .idx: {manifest.tokens:,} tokens in {manifest.documents:,} documents")


if __name__ == "__main__":
    sys.exit(main())
