"""An autoregressive model out to Hugging Face, back in, and on as a diffusion model.

    make quickstart                       # trains the model, once
    python examples/03_huggingface/run.py

Needs megatron-dlm's extra [hf]; no network. `--help` lists other models and lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

PROMPT = "def __init__(self"


def main() -> None:
    arguments = read_arguments()
    disable_progress_bar()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    exported, adapted, scratch = output / "ar_hf", output / "adapted", output / "scratch"

    print("1. the autoregressive model as a Hugging Face directory")
    run("export", "--checkpoint", arguments.ar, "--output_dir", exported, log=output)
    parity = json.loads((exported / "parity.json").read_text())
    print(f"   largest difference of a logit: {parity['maximum_difference']:.0e}")

    print("2. the directory in transformers, without code of ours")
    show(exported, trust_remote_code=False)

    print("3. the directory as the first checkpoint of a diffusion run")
    run("import", "--model", exported, "--objective", "masked", "--output_dir", adapted, log=output)

    print(f"4. {arguments.steps} steps of masked diffusion from it, and as many from scratch")
    settings = ["--config", arguments.masked_config, "--train.steps", arguments.steps]
    settings += ["--validation.interval_steps", arguments.steps, *arguments.set]
    # The later file wins: what the weights imply, and where the run lies.
    from_weights = ["--config", adapted / "imported.yaml"]
    run("train", *settings[:2], *from_weights, *settings[2:], log=output)
    run("train", *settings, "--train.output_dir", scratch, log=output)
    for name, directory in (("from the weights", adapted), ("from scratch", scratch)):
        print(f"   {name:17}{validation(directory):8.3f} nats per token, at most")

    print("5. the adapted model as a Hugging Face directory, in transformers")
    run("export", "--checkpoint", adapted, "--output_dir", output / "adapted_hf", log=output)
    show(output / "adapted_hf", trust_remote_code=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export, import and adapt a small model.")
    parser.add_argument("--ar", default="quickstart/ar", help="autoregressive run")
    parser.add_argument(
        "--masked_config", default="quickstart/masked.yaml", help="configuration of a masked run"
    )
    parser.add_argument("--steps", default="100", help="steps to adapt")
    parser.add_argument("--output", default="runs/03_huggingface", help="new directory")
    parser.add_argument(
        "--set",
        nargs=argparse.REMAINDER,
        default=["--optimizer.lr", "1e-3", "--schedule.warmup_steps", "10"],
        help="other settings of both masked runs; last, as `megatron-dlm train` takes them",
    )
    return parser.parse_args()


def run(*words: str | Path, log: Path) -> None:
    """One command of megatron-dlm, shown; its output goes to a file."""
    arguments = [str(word) for word in words]
    print(f"   $ megatron-dlm {shlex.join(arguments)}", flush=True)
    file = log / "log.txt"
    with file.open("a") as stream:
        command = [sys.executable, "-m", "megatron_dlm", *arguments]
        # One thread: more only wait for each other in a model as small as this.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        ended = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    if ended.returncode:
        sys.exit(f"it failed, see {file}:\n{file.read_text()[-2000:]}")


def show(directory: Path, *, trust_remote_code: bool) -> None:
    """What transformers makes of the directory, and what that model writes."""
    trust = {"trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(directory, **trust)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, **trust)
    print(f"   {type(model).__name__}, {model.num_parameters():,} parameters")
    tokens = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(0)
    written = model.generate(**tokens, max_new_tokens=24)
    print(f"   {tokenizer.decode(written[0], skip_special_tokens=True)!r}")


def validation(run_directory: Path) -> float:
    """The last validation loss of a run."""
    lines = (run_directory / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return float([entry["nelbo"] for entry in entries if entry["split"] == "valid"][-1])


if __name__ == "__main__":
    main()
