"""Tokenizer and shards of the toy studies: Python's library, a fifth of its files held out.

    python examples/studies/toy_data.py          # writes toy/, once

Corpus and tokenizer depend on the version of Python; the studies' tables name what they were made
with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dlm.config.tokenizer_metadata import METADATA_FILE
from megatron_dlm.data.storage.dataset import dataset_path
from megatron_dlm.launch.child_command import run_command
from megatron_dlm.launch.quickstart_corpus import write_corpus

_VOCAB_SIZE = 512


def main() -> None:
    """Take the steps whose files are not there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("toy"))
    root = parser.parse_args().output_dir
    texts = {split: root / "corpus" / f"{split}.jsonl" for split in ("train", "valid")}
    if not all(path.exists() for path in texts.values()):
        write_corpus(texts["train"], texts["valid"], packages=True)
    tokenizer = root / "tokenizer"
    if not (tokenizer / METADATA_FILE).exists():
        run_command(
            [
                *("tokenizer", "--input", str(texts["train"]), "--output_dir", str(tokenizer)),
                *("--vocab_size", str(_VOCAB_SIZE)),
            ]
        )
    for split, text in texts.items():
        prefix = root / "data" / split
        if not dataset_path(prefix).exists():
            run_command(
                [
                    *("preprocess", "--input", str(text), "--output_prefix", str(prefix)),
                    *("--tokenizer", str(tokenizer)),
                ]
            )


if __name__ == "__main__":
    main()
