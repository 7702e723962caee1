"""`megatron-dlm quickstart`: the whole story on an embedded corpus, in minutes on a laptop.

Every step leaves files; a step whose files are whole is not taken again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dlm.checkpoint.retention import LATEST_NAME
from megatron_dlm.config.commands import QuickstartConfig
from megatron_dlm.config.tokenizer_metadata import METADATA_FILE
from megatron_dlm.data.storage.dataset import dataset_path
from megatron_dlm.launch.child_command import run_command
from megatron_dlm.launch.quickstart_corpus import write_corpus
from megatron_dlm.launch.quickstart_tasks import TASK_NAMES, write_tasks
from megatron_dlm.runtime.files import write_whole
from megatron_dlm.scaling.plots import CurveSummary, plot_validation_curves

GLOBAL_BATCH_SIZE = 64
SEQ_LENGTH = 64

# Directory of the run -> (objective.kind, name in the figure).
RUNS = {
    "ar": ("autoregressive", "autoregressive (exact NLL)"),
    "masked": ("masked", "masked diffusion (upper bound)"),
}
_NEEDED = {"matplotlib": "plot", "transformers": "hf", "lm_eval": "eval"}
_CARD = "README.md"  # what an export writes last
_SCORED_TASKS = ("next_line", "library_text")
# Few, for a quick look: questions per task, and draws of noise per answer of a masked model.
_LIMIT, _NUM_DRAWS = 50, 8
_PROMPTS = ("def ", "class ", "import ", "    if not ")
_SAMPLE_TOKENS = 48

_RUN_CONFIG = """\
# Written by `megatron-dlm quickstart`. Goes on from its newest checkpoint, on any layout:
#   {command}
model:
  num_layers: 3
  hidden_size: 96
  num_attention_heads: 4
  seq_length: {seq_length}
objective:
  kind: {kind}
data:
  tokenizer: {tokenizer}
  train: {{{train}: 1.0}}
  valid: {{{valid}: 1.0}}
  unique_tokens: {unique_tokens}   # this little text, {epochs:.0f} times over
optimizer:
  lr: 2.0e-3
schedule:
  kind: cosine
  warmup_steps: {warmup_steps}
train:
  steps: {steps}
  global_batch_size: {global_batch_size}
  micro_batch_size: {micro_batch_size}
  precision: fp32
  device: cpu
  seed: {seed}
  output_dir: {output_dir}
checkpoint:
  interval_steps: 200
validation:
  interval_steps: {validation_steps}
  num_samples: 256
logging:
  interval_steps: 10
"""


def quickstart(config: QuickstartConfig) -> None:
    """Text, shards, two runs, their curves; both as Hugging Face models, scored and sampled."""
    _check(config)
    root = Path(config.output_dir)
    console = Console(highlight=False)
    console.print("Seven steps, about six minutes on two idle cores. Stop and go on as you like.")
    _headline(console, 1, "a corpus: the sources of Python's standard library")
    _prepare_data(root)
    for number, name in enumerate(RUNS, start=2):
        _headline(console, number, f"training: {RUNS[name][1]}, {config.num_ranks} ranks")
        _train(config, name)
    _headline(console, 4, "validation curves")
    runs = {label: root / name / "metrics.jsonl" for name, (_, label) in RUNS.items()}
    summary = plot_validation_curves(
        runs,
        root / "curves.png",
        title=f"{config.unique_tokens:,} unique tokens, repeated",
    )
    _headline(console, 5, "both models as Hugging Face directories, compared with the checkpoints")
    for name in RUNS:
        _export(root, name)
    _headline(console, 6, "scores of both in lm-eval, on tasks made from the held-out text")
    _write_tasks(root)
    for name in RUNS:
        _evaluate(root, name)
    _headline(console, 7, "text from both, with transformers alone")
    _sample(root, config.seed, console)
    _tell_results(console, summary)
    _tell_where(console, config)


def _check(config: QuickstartConfig) -> None:
    """What would otherwise fail after minutes."""
    for module, extra in _NEEDED.items():
        if find_spec(module) is None:
            raise ValueError(
                f"{module} is not installed; install megatron-dlm with its extra [{extra}]"
            )
    if GLOBAL_BATCH_SIZE % config.num_ranks:
        raise ValueError(
            f"num_ranks is {config.num_ranks}; the batch of {GLOBAL_BATCH_SIZE} samples is shared "
            "by the ranks, use 1, 2, 4 or 8"
        )


def _headline(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}/7  {text}[/bold]")


def _prepare_data(root: Path) -> None:
    tokenizer = root / "tokenizer"
    texts = {split: root / "corpus" / f"{split}.jsonl" for split in ("train", "valid")}
    if not all(path.exists() for path in texts.values()):
        write_corpus(texts["train"], texts["valid"])
    if not (tokenizer / METADATA_FILE).exists():
        flags = {"input": texts["train"], "output_dir": tokenizer, "vocab_size": 512}
        run_command(["tokenizer", *_as_arguments(flags)])
    for split, text in texts.items():
        prefix = root / "data" / split
        if not dataset_path(prefix).exists():
            flags = {"input": text, "output_prefix": prefix, "tokenizer": tokenizer}
            run_command(["preprocess", *_as_arguments(flags)])


def _as_arguments(flags: Mapping[str, object]) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def _train(config: QuickstartConfig, name: str) -> None:
    root = Path(config.output_dir)
    path = root / f"{name}.yaml"
    text = _run_config(config, name)
    is_same = path.exists() and path.read_text(encoding="utf-8") == text
    if is_same and _latest_step(root / name) == config.steps:
        print(f"done before: {root / name}")
        return
    write_whole(path, text)
    run_command(["train", "--config", str(path)], num_ranks=config.num_ranks)
    if _latest_step(root / name) != config.steps:
        raise ValueError(f"{root / name} was stopped early; the same command goes on from here")


def _run_config(config: QuickstartConfig, name: str) -> str:
    root = Path(config.output_dir)
    return _RUN_CONFIG.format(
        command=f"megatron-dlm train --config {root / f'{name}.yaml'}",
        kind=RUNS[name][0],
        # JSON strings are YAML strings, whatever characters the path has.
        tokenizer=json.dumps(str(root / "tokenizer")),
        train=json.dumps(str(root / "data" / "train")),
        valid=json.dumps(str(root / "data" / "valid")),
        output_dir=json.dumps(str(root / name)),
        seq_length=SEQ_LENGTH,
        unique_tokens=config.unique_tokens,
        epochs=config.steps * GLOBAL_BATCH_SIZE * SEQ_LENGTH / config.unique_tokens,
        steps=config.steps,
        warmup_steps=min(20, config.steps // 2),
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=min(32, GLOBAL_BATCH_SIZE // config.num_ranks),
        seed=config.seed,
        validation_steps=max(1, min(20, config.steps // 5)),
    )


def _latest_step(run: Path) -> int:
    path = run / "checkpoints" / LATEST_NAME
    return int(path.read_text()) if path.exists() else 0


def _is_done(output: Path, source: Path) -> bool:
    """Whether the last file that a step writes is there, and not older than what it was made of."""
    return output.exists() and output.stat().st_mtime >= source.stat().st_mtime


def _export(root: Path, name: str) -> None:
    output = root / "hf" / name
    if _is_done(output / _CARD, root / name / "checkpoints" / LATEST_NAME):
        print(f"done before: {output}")
        return
    flags: dict[str, object] = {"checkpoint": root / name, "output_dir": output}
    if output.exists():
        flags["overwrite"] = "true"
    run_command(["export", *_as_arguments(flags)])


def _write_tasks(root: Path) -> None:
    corpus = root / "corpus" / "valid.jsonl"
    if not all(_is_done(root / "tasks" / f"{task}.yaml", corpus) for task in TASK_NAMES):
        write_tasks(corpus, root / "tasks")


def _evaluate(root: Path, name: str) -> None:
    model, output = root / "hf" / name, root / "scores" / name
    if _is_done(output / "tasks.json", model / _CARD):
        print(f"done before: {output}")
        return
    flags = {
        "model": model,
        "tasks": ",".join(_SCORED_TASKS),
        "include_path": root / "tasks",
        "limit": _LIMIT,
        "num_samples": _NUM_DRAWS,
        "output_dir": output,
    }
    # The data are local; nothing has to be asked of the network.
    run_command(["evaluate", *_as_arguments(flags)], environment={"HF_HUB_OFFLINE": "1"})


def _sample(root: Path, seed: int, console: Console) -> None:
    output = root / "samples.txt"
    if not all(_is_done(output, root / "hf" / name / _CARD) for name in RUNS):
        from megatron_dlm.launch.quickstart_texts import write_texts  # imports torch

        blocks = []
        for name, (kind, label) in RUNS.items():
            with console.status(f"sampling: {label}"):
                written = write_texts(
                    root / "hf" / name,
                    _PROMPTS,
                    trust_remote_code=kind != "autoregressive",
                    num_tokens=_SAMPLE_TOKENS,
                    temperature=0.8,
                    seed=seed,
                )
            blocks.append(f"=== {label}: {written.loaded_as}\n")
            for prompt, text in zip(_PROMPTS, written.texts, strict=True):
                blocks.append(f"--- prompt {prompt!r}\n{text}\n")
        # A young model emits any byte, also those that would reprogram a terminal.
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in "\n".join(blocks))
        write_whole(output, text)
    console.print(output.read_text(encoding="utf-8"), markup=False, soft_wrap=True)


def _tell_results(console: Console, summary: CurveSummary) -> None:
    table = Table("validation loss, nats per token", "best", "at epoch", "at the end", box=None)
    for label, best in summary.best.items():
        last = summary.last[label].nats_per_token
        table.add_row(label, f"{best.nats_per_token:.3f}", f"{best.epoch:.0f}", f"{last:.3f}")
    console.print(table)
    ar, masked = summary.best.values()
    if summary.crossing is None:
        console.print("The curves have not crossed; try more --steps or fewer --unique_tokens.")
    else:
        console.print(
            f"The curves cross at epoch {summary.crossing.epoch:.0f}. After it the autoregressive "
            "model, which has learnt its text by heart, is worse on new text than the diffusion "
            "model's upper bound."
        )
    ahead = "autoregressive" if ar.nats_per_token < masked.nats_per_token else "diffusion"
    console.print(
        f"The stricter test compares the best values, each run stopped in time: here the {ahead} "
        "model is ahead."
    )


def _tell_where(console: Console, config: QuickstartConfig) -> None:
    root = Path(config.output_dir)
    masked, exported = root / "masked.yaml", root / "hf" / "masked"
    console.print("\nWhere everything is:", style="bold")
    for what, where in {
        "the picture": ["curves.png"],
        "text from both models": ["samples.txt"],
        "Hugging Face directories": [f"hf/{name}" for name in RUNS],
        "scores, their tasks": [*(f"scores/{name}" for name in RUNS), "tasks"],
        "run configurations": [f"{name}.yaml" for name in RUNS],
        "metrics, logs, checkpoints": list(RUNS),
        "tokenizer, shards, corpus": ["tokenizer", "data", "corpus"],
    }.items():
        paths = "  ".join(str(root / part) for part in where)
        console.print(f"  {what:<28}{paths}", soft_wrap=True, markup=False)
    console.print("\nTry next:", style="bold")
    for what, command in {
        "four times the text": f"megatron-dlm quickstart --output_dir {root}_more_text "
        f"--unique_tokens {4 * config.unique_tokens}",
        "the runs in TensorBoard": f"tensorboard --logdir {root}",
        "tokens that appear as the noise is removed": f"megatron-dlm generate --model {exported} "
        '--prompt "def " --num_tokens 48 --live true --live_pause_seconds 0.1',
        "the autoregressive model goes on learning as a diffusion model": "megatron-dlm import "
        f"--model {root / 'hf' / 'ar'} --objective masked --output_dir {root}_adapted",
        "the cost of a run": f"megatron-dlm plan --config {masked}",
        "the same run, every layer split over two ranks": "torchrun --nproc-per-node 2 "
        f"-m megatron_dlm train --config {masked} --train.output_dir {root / 'masked_tp2'} "
        "--parallel.tensor_model_parallel_size 2",
    }.items():
        console.print(f"  # {what}\n  {command}", soft_wrap=True, markup=False)
