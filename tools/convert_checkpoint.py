"""Megatron-LM's `tools/checkpoint/convert.py` flags over `megatron-dlm export` and `import`.

    python tools/convert_checkpoint.py --model-type GPT --loader core --saver hf \
        --load-dir runs/masked --save-dir exported
    python tools/convert_checkpoint.py --model-type GPT --loader llama_mistral --saver core \
        --checkpoint-type hf --load-dir Qwen3-0.6B --save-dir runs/adapted

Checkpoints here load on any layout, so the sizes of the target are not needed. What cannot be
honoured is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_dlm.config.hf_commands import ExportConfig, ImportConfig
from megatron_dlm.hf.export import export
from megatron_dlm.hf.importing import import_model

MEGATRON, HUGGING_FACE = ("core", "mcore"), ("hf", "llama_mistral")
ANY_LAYOUT = (
    "--target-tensor-parallel-size",
    "--target-pipeline-parallel-size",
    "--target-expert-parallel-size",
)
# Flag of Megatron-LM -> why it is refused.
REFUSED = {
    "--true-vocab-size": "the model and its tokenizer say it",
    "--vocab-file": "give a tokenizer directory with --tokenizer-model",
    "--fp16": "weights are fp32 or bf16",
    "--lora-dir": "adapters are not merged",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        _convert(_parse(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model-type", required=True, choices=["GPT"])
    parser.add_argument("--loader", required=True, choices=[*MEGATRON, *HUGGING_FACE])
    parser.add_argument("--saver", required=True, choices=[*MEGATRON, "hf"])
    parser.add_argument("--load-dir", required=True)
    parser.add_argument("--save-dir", required=True)
    parser.add_argument("--checkpoint-type", choices=["hf"], help="of a llama_mistral loader")
    parser.add_argument("--tokenizer-model", help="tokenizer file or directory")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    parser.add_argument("--bf16", action="store_true", help="write bf16, whatever is read")
    for flag in ANY_LAYOUT:
        parser.add_argument(flag, help="not needed: checkpoints load on any layout")
    for flag in ("--max-queue-size", "--megatron-path", "--model-size"):
        parser.add_argument(flag, help="not needed")
    for flag, reason in REFUSED.items():
        parser.add_argument(flag, nargs="*", help=f"refused: {reason}")
    options = parser.parse_args(argv)
    for flag, reason in REFUSED.items():
        if getattr(options, flag[2:].replace("-", "_")) is not None:
            raise ValueError(f"{flag} cannot be honoured: {reason}; leave the flag away")
    return options


def _convert(options: argparse.Namespace) -> None:
    if options.loader in MEGATRON and options.saver == "hf":
        export(
            ExportConfig(
                checkpoint=options.load_dir,
                output_dir=options.save_dir,
                tokenizer=options.tokenizer_model,
                dtype="bf16" if options.bf16 else "checkpoint",
            )
        )
    elif options.loader in HUGGING_FACE and options.saver in MEGATRON:
        import_model(
            ImportConfig(
                model=options.load_dir,
                output_dir=options.save_dir,
                tokenizer=options.tokenizer_model,
                make_vocab_size_divisible_by=options.make_vocab_size_divisible_by,
                dtype="bf16" if options.bf16 else "same",
            )
        )
    else:
        raise ValueError(
            f"--loader {options.loader} --saver {options.saver} has nothing to convert: a "
            "checkpoint of one layout loads on any other"
        )


if __name__ == "__main__":
    sys.exit(main())
