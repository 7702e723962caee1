"""A task for the toys, as HellaSwag and MMLU are too hard for them: which of four words comes next.

    python examples/studies/toy_data.py           # the held-out text
    python examples/studies/toy_task.py           # toy/tasks, for lm-eval: task next_word

The words are as long as the right one and come from the same text as often as there, so that only
the context tells them apart. They are short: all ways to mask one are few, and the likelihood of
diffusion is exact in them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from megatron_dlm.launch.quickstart_tasks import write_options_task

_NUM_QUESTIONS = 500
_CONTEXT_LETTERS, _HEADER_LETTERS = 32, 200
_WORD = re.compile(r"\b[A-Za-z_]{3,5}\b")


def main() -> None:
    """Write the task where it is not there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("toy"))
    root = parser.parse_args().output_dir
    folder = (root / "tasks").absolute()
    if (folder / "next_word.yaml").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (root / "corpus" / "valid.jsonl").open(encoding="utf-8") as lines:
        found = questions([json.loads(line)["text"] for line in lines])
    write_options_task(folder, "next_word", found)


def questions(texts: list[str]) -> list[dict[str, Any]]:
    """context, four options and the number of the right one; the same ones on every machine."""
    generator = random.Random(0)
    places = []
    for text in texts:
        words = [match for match in _WORD.finditer(text) if match.start() > _HEADER_LETTERS]
        if words:
            [match] = generator.sample(words, 1)
            places.append((text[: match.start()][-_CONTEXT_LETTERS:], match[0]))
    generator.shuffle(places)
    pools: dict[int, list[str]] = {}
    for _, word in places:
        pools.setdefault(len(word), []).append(word)
    found = []
    for context, word in places[:_NUM_QUESTIONS]:
        options = {word}
        while len(options) < 4:
            options.add(generator.choice(pools[len(word)]))
        order = sorted(options)
        generator.shuffle(order)
        found.append({"context": context, "options": order, "right": order.index(word)})
    return found


if __name__ == "__main__":
    main()
