"""Peak memory and speed of `megatron-dlm export` on a checkpoint of more than 1 GB.

    python tools/benchmarks/export.py [--checkpoint RUN] [--parity]

Without --checkpoint it writes one with arbitrary weights to a temporary directory first. Memory is
that of the whole process above what its imports take; the promise is 1.2 x the largest layer and
1 GB.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_dlm.checkpoint.find import find_checkpoint
from megatron_dlm.checkpoint.writer import write_checkpoint
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.mapping import CheckpointTensor, checkpoint_tensors
from megatron_dlm.models.accounting import count_parameters

# 0.35 billion parameters in fp32: 1.4 GB, of which the embedding is 0.4 GB.
MODEL = ModelConfig(
    num_layers=20, hidden_size=1024, num_attention_heads=16, num_query_groups=8, vocab_size=100_000
)
_MEASURED = """
import resource, sys
from megatron_dlm.cli import main
import megatron_dlm.hf.export, transformers
if {parity}:
    from megatron_dlm.runtime.device import open_device
    open_device("auto")
    import megatron_dlm.models.build
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = main(sys.argv[1:])
print("kilobytes", before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="run or checkpoint to export instead")
    parser.add_argument("--parity", action="store_true", help="compare the logits, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = options.checkpoint or make_checkpoint(Path(temporary))
        measure(source, Path(temporary) / "exported", parity=options.parity)


def make_checkpoint(directory: Path) -> Path:
    """A run directory with one checkpoint of MODEL, weights N(0, 0.02)."""
    generator = torch.Generator().manual_seed(0)

    def read(tensor: CheckpointTensor) -> torch.Tensor:
        return torch.empty(tensor.shape).normal_(0, 0.02, generator=generator)

    config = asdict(RunConfig(model=MODEL, objective=ObjectiveConfig(mask_token_id=99_999)))
    write_checkpoint(
        directory / "checkpoints",
        checkpoint_tensors(MODEL),
        read,
        dtype=torch.float32,
        description={
            "model": config["model"],
            "data": {"digest": None},
            "config": config,
            "num_parameters": count_parameters(MODEL).total,
        },
    )
    return directory


def measure(source: Path, output: Path, *, parity: bool) -> None:
    """Export in a fresh process and print what it took."""
    reader = CheckpointReader(find_checkpoint(source).path)
    largest = largest_layer_bytes(reader)
    flags = ["export", "--checkpoint", str(source), "--output_dir", str(output)]
    flags += ["--parity", str(parity).lower()]
    program = _MEASURED.format(parity=parity)
    started, used = time.perf_counter(), processor_seconds()
    answer = subprocess.run(
        [sys.executable, "-c", program, *flags], capture_output=True, text=True, check=False
    )
    seconds, used = time.perf_counter() - started, processor_seconds() - used
    if answer.returncode:
        sys.exit(answer.stderr)
    before, peak = (int(word) * 1024 for word in answer.stdout.split()[-2:])
    written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    bound = 1.2 * largest + 1e9
    print(f"written             {written / 1e9:8.2f} GB")
    print(f"seconds             {seconds:8.1f}    (imports included)")
    print(f"processor seconds   {used:8.1f}    (what other work on the machine does not change)")
    print(f"speed               {written / 1e6 / seconds:8.0f} MB/s")
    print(f"largest layer       {largest / 1e9:8.2f} GB")
    print(f"memory of imports   {before / 1e9:8.2f} GB")
    print(f"memory above it     {(peak - before) / 1e9:8.2f} GB, promised {bound / 1e9:.2f} GB")
    if peak - before > bound:
        sys.exit("more than promised")


def processor_seconds() -> float:
    """Of all processes that this one has started and seen end."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def largest_layer_bytes(reader: CheckpointReader) -> int:
    """Bytes of one transformer layer, or of the embedding where that is more."""
    sizes: dict[str, int] = {}
    for key, stored in reader.tensors.items():
        if key.startswith(("optimizer", "train_state")):
            continue
        num_bytes = torch.Size(stored.shape).numel() * stored.dtype.itemsize
        is_stacked = key.startswith("decoder.layers.")
        name = "layer" if is_stacked else key
        sizes[name] = sizes.get(name, 0) + num_bytes // (stored.shape[0] if is_stacked else 1)
    return max(sizes.values())


if __name__ == "__main__":
    main()
