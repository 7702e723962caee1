"""Text of lower quality for toy_data_quality.yaml: words of a file in each other's places.

    python examples/studies/toy_data.py           # the text as it is
    python examples/studies/toy_tiers.py          # toy/data/train_medium and train_low

Of every file 10% (medium) or 30% (low) of the words are shuffled among themselves, the same ones on
every machine. So letters, words and their counts stay those of the clean text; what goes is which
word follows from which.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from megatron_dlm.data.storage.dataset import dataset_path
from megatron_dlm.launch.child_command import run_command

_SHARES = {"medium": 0.1, "low": 0.3}
_WORD = re.compile(r"\w+")


def main() -> None:
    """Take the steps whose files are not there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("toy"))
    root = parser.parse_args().output_dir
    clean = root / "corpus" / "train.jsonl"
    for tier, share in _SHARES.items():
        text, prefix = root / "corpus" / f"train_{tier}.jsonl", root / "data" / f"train_{tier}"
        if not text.exists():
            degrade(clean, text, share=share)
        if not dataset_path(prefix).exists():
            run_command(
                [
                    *("preprocess", "--input", str(text), "--output_prefix", str(prefix)),
                    *("--tokenizer", str(root / "tokenizer")),
                ]
            )


def degrade(source: Path, target: Path, *, share: float) -> None:
    """Write the documents of a .jsonl with this share of the words of each shuffled."""
    generator = random.Random(0)
    temporary = target.with_suffix(".tmp")
    with source.open(encoding="utf-8") as read, temporary.open("w", encoding="utf-8") as written:
        for line in read:
            text = shuffled(json.loads(line)["text"], share=share, generator=generator)
            written.write(json.dumps({"text": text}) + "\n")
    temporary.rename(target)


def shuffled(text: str, *, share: float, generator: random.Random) -> str:
    """The text with this share of its words in each other's places."""
    places = [match.span() for match in _WORD.finditer(text) if generator.random() < share]
    words = [text[start:end] for start, end in places]
    generator.shuffle(words)
    parts, last = [], 0
    for (start, end), word in zip(places, words, strict=True):
        parts += [text[last:start], word]
        last = end
    return "".join([*parts, text[last:]])


if __name__ == "__main__":
    main()
