"""The report names what was built; Megatron Core tells FP8 layers when their weights are new."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opened import opened_model
from rank_pool import RankPool
from tiny_run import layout, model_config

from megatron_dlm.config.moe import MoEConfig

MODEL = model_config(num_layers=2, recompute_granularity="selective", moe=MoEConfig(num_experts=2))
WHERE = layout("", 2, overlap_grad_reduce=True, gradient_accumulation_fusion=True)


def report_and_marks() -> dict[str, Any]:
    from tiny_run import micro_batches

    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.ops.counter_rng import Stream
    from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_dlm.training.stack_report import stack_report
    from megatron_dlm.training.step import run_micro_batches

    with opened_model(WHERE.parallel, MODEL, precision="bf16") as opened:
        chunks, parallel = opened.chunks, opened.parallel
        wrapped = wrap_data_parallel(chunks, WHERE.parallel, parallel)
        optimizer = build_optimizer(wrapped, OptimizerConfig(), overlap_param_gather=False)
        report = stack_report(
            chunks=wrapped, optimizer=optimizer, device=opened.device, loss_chunk_slots=64
        )
        setup = replace(opened.pass_of(wrapped), stream=Stream.VALIDATION)
        seen = _first_pass_marks(chunks[0])
        batches = micro_batches(WHERE, parallel, 0, MODEL.seq_length, documents=False)
        run_micro_batches(setup, batches, forward_only=True)
        run_micro_batches(setup, batches, forward_only=True)
        return {"report": report, "marks": seen, "passes": len(batches)}


def _first_pass_marks(chunk: Any) -> list[bool]:
    """What a Transformer Engine layer would see before each pass; it clears its mark afterwards."""
    seen: list[bool] = []
    layer = chunk.decoder.layers[0].self_attention.linear_qkv
    layer.is_first_microbatch = False
    chunk.config.fp8 = "hybrid"  # only read by set_is_first_microbatch and by the engine

    def note(module: Any, _: Any) -> None:
        seen.append(module.is_first_microbatch)
        module.is_first_microbatch = False

    layer.register_forward_pre_hook(note)
    return seen


def test_report_and_marks(ranks: RankPool) -> None:
    found = ranks.run(report_and_marks, num_ranks=2)[0]
    # Validation too begins with new weights: its first pass must not use FP8 copies of old ones.
    assert found["marks"] == [True, *[False] * (found["passes"] - 1)] * 2
    assert found["passes"] > 1
    report = found["report"]
    assert report.pop("gradients").startswith("kept and summed in fp32, reduced in ")
    assert report == {
        "machine": "cpu: no GPU",
        "precision": "bfloat16",
        "layers": "local spec, ColumnParallelLinear",
        "attention": "CoreAttention (bidirectional, PyTorch's SDPA)",
        "norms": "RMSNorm",
        "loss": "our vocabulary-parallel log-probabilities on the scored slots, 64 at a time",
        "optimizer": "torch.optim.adamw.AdamW, sharded over data-parallel ranks",
        "recompute": "core_attn",
    }
