"""Three small tasks for lm-eval from the sources of Python's standard library, without network.

    python examples/04_evaluate/make_tasks.py DIRECTORY

next_line: which of four lines follows; library_text: the likelihood of whole texts; say_it_again:
generate the second copy of a line. Every fifth file of the library, the ones that
`megatron-dlm quickstart` holds out from training.
"""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HOLD_OUT_EVERY = 5
NUM_QUESTIONS, NUM_TEXTS, NUM_COPIES = 200, 40, 20
CONTEXT_LINES, SHORTEST_LINE, LONGEST_LINE, LONGEST_TEXT = 3, 8, 60, 600

NEXT_LINE = """\
task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: right
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
LIBRARY_TEXT = """\
task: library_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
metadata: {{version: 1.0}}
"""
SAY_IT_AGAIN = """\
task: say_it_again
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{line}}}}\\n"
doc_to_target: "{{{{line}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def write_tasks(directory: Path) -> None:
    """The YAML files and the data of the three tasks."""
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    texts = list(held_out_definitions())
    lines = [line for text in texts for line in text.splitlines() if fits(line)]
    write_task(directory, "next_line", NEXT_LINE, questions(texts))
    short = [{"text": text} for text in texts if len(text) < LONGEST_TEXT]
    write_task(
        directory, "library_text", LIBRARY_TEXT, short[:: len(short) // NUM_TEXTS][:NUM_TEXTS]
    )
    copies = [{"line": line} for line in lines[:: len(lines) // NUM_COPIES][:NUM_COPIES]]
    write_task(directory, "say_it_again", SAY_IT_AGAIN, copies)


def held_out_definitions() -> Iterable[str]:
    """Top-level functions and classes: two blank lines lie between them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py"))[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]:
        for part in re.split(r"\n\n\n+", path.read_text(encoding="utf-8", errors="replace")):
            if part.strip():
                yield part.strip() + "\n"


def questions(texts: list[str]) -> list[dict[str, Any]]:
    """The first lines of a definition, the one that follows, and those of three others.

    All options stand at the same place of a definition, so that only the context tells them apart.
    """
    parts = [text.splitlines() for text in texts]
    begun = [part for part in parts if len(part) > CONTEXT_LINES and fits(part[CONTEXT_LINES])]
    begun = begun[:: max(1, len(begun) // NUM_QUESTIONS)]
    found = []
    for number, part in enumerate(begun):
        others = [begun[(number + step) % len(begun)][CONTEXT_LINES] for step in (17, 59, 101)]
        right = number % 4
        options = [*others[:right], part[CONTEXT_LINES], *others[right:]]
        context = "\n".join(part[:CONTEXT_LINES]) + "\n"
        if len({*options}) == 4:
            found.append({"context": context, "options": options, "right": right})
    return found


def fits(line: str) -> bool:
    """Neither a bracket alone nor a paragraph."""
    return SHORTEST_LINE < len(line) < LONGEST_LINE


def write_task(
    directory: Path, name: str, template: str, documents: Iterable[Mapping[str, Any]]
) -> None:
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    # A JSON string is a YAML string, whatever characters the path has.
    (directory / f"{name}.yaml").write_text(template.format(file=json.dumps(str(data))))


if __name__ == "__main__":
    write_tasks(Path(sys.argv[1]))
