"""Three small tasks for lm-eval, made from the quickstart's held-out text; no network.

next_line: which of four lines follows; library_text: the likelihood of whole texts; say_it_again:
generate the second copy of a line. lm-eval's own format: a YAML file and a .jsonl per task.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dlm.runtime.files import write_whole

TASK_NAMES = ("next_line", "library_text", "say_it_again")
_NUM_QUESTIONS, _NUM_TEXTS, _NUM_COPIES = 200, 40, 20
_CONTEXT_LINES, _SHORTEST_LINE, _LONGEST_LINE, _LONGEST_TEXT = 3, 8, 60, 600

_OPTIONS = """\
task: {name}
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
_LIBRARY_TEXT = """\
task: library_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""
_SAY_IT_AGAIN = """\
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


def write_tasks(corpus: Path, directory: Path) -> None:
    """The three tasks from a .jsonl corpus; their YAML files name the data by absolute path."""
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    documents = corpus.read_bytes().splitlines()
    texts = [json.loads(document)["text"] for document in documents]
    short = [{"text": text} for text in texts if len(text) < _LONGEST_TEXT]
    lines = [{"line": line} for text in texts for line in text.splitlines() if _fits(line)]
    write_options_task(directory, "next_line", _questions(texts))
    _write_task(directory, "library_text", _LIBRARY_TEXT, _spread(short, _NUM_TEXTS))
    _write_task(directory, "say_it_again", _SAY_IT_AGAIN, _spread(lines, _NUM_COPIES))


def write_options_task(directory: Path, name: str, questions: Iterable[Mapping[str, Any]]) -> None:
    """A task of questions: context, options, and right, the number of the one that belongs there.

    directory: exists, and is absolute, as the YAML file names the data by it.
    """
    _write_task(directory, name, _OPTIONS, questions)


def _questions(texts: list[str]) -> list[dict[str, Any]]:
    """The first lines of a definition, the one that follows, and those of three others.

    All options stand at the same place of a definition, so that only the context tells them apart.
    """
    parts = [text.splitlines() for text in texts]
    begun = [part for part in parts if len(part) > _CONTEXT_LINES and _fits(part[_CONTEXT_LINES])]
    begun = begun[:: max(1, len(begun) // _NUM_QUESTIONS)]
    found = []
    for number, part in enumerate(begun):
        others = [begun[(number + step) % len(begun)][_CONTEXT_LINES] for step in (17, 59, 101)]
        right = number % 4
        options = [*others[:right], part[_CONTEXT_LINES], *others[right:]]
        context = "\n".join(part[:_CONTEXT_LINES]) + "\n"
        if len({*options}) == 4:
            found.append({"context": context, "options": options, "right": right})
    return found


def _fits(line: str) -> bool:
    """Neither a bracket alone nor a paragraph."""
    return _SHORTEST_LINE < len(line) < _LONGEST_LINE


def _spread(items: Sequence[Any], count: int) -> Sequence[Any]:
    """`count` of them, evenly; all where there are fewer."""
    return items[:: max(1, len(items) // count)][:count]


def _write_task(
    directory: Path, name: str, template: str, documents: Iterable[Mapping[str, Any]]
) -> None:
    data = directory / f"{name}.jsonl"
    write_whole(data, "".join(json.dumps(document) + "\n" for document in documents))
    # A JSON string is a YAML string, whatever characters the path has.
    write_whole(directory / f"{name}.yaml", template.format(name=name, file=json.dumps(str(data))))
