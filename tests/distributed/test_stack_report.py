"""The report names what was built; Megatron Core tells FP8 layers when their weights are new."""

from __future__ import annotations

from typing import Any

from rank_pool import RankPool
from tiny_run import layout, model_config

from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.objective import ObjectiveConfig

MODEL = model_config(num_layers=2, recompute_granularity="selective", moe=MoEConfig(num_experts=2))
WHERE = layout("", 2, overlap_grad_reduce=True, gradient_accumulation_fusion=True)


def opened() -> dict[str, Any]:
    from tiny_run import SEED, _micro_batches

    from megatron_dlm.config.optimizer import OptimizerConfig
    from megatron_dlm.models.build import build_model
    from megatron_dlm.objectives.build import build_objective
    from megatron_dlm.ops.counter_rng import Stream
    from megatron_dlm.runtime.device import open_device
    from megatron_dlm.runtime.parallel import laid_out
    from megatron_dlm.runtime.seeding import seed_dropout
    from megatron_dlm.training.metrics import Metrics
    from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_dlm.training.stack_report import stack_report
    from megatron_dlm.training.step import Pass, run_micro_batches

    device = open_device("cpu")
    with laid_out(WHERE.parallel) as parallel:
        seed_dropout(SEED, 0, parallel)
        chunks = build_model(
            MODEL,
            WHERE.parallel,
            ObjectiveConfig(),
            precision="bf16",
            seed=SEED,
            device=device,
            parallel=parallel,
        )
        wrapped = wrap_data_parallel(chunks, WHERE.parallel, parallel)
        optimizer = build_optimizer(wrapped, OptimizerConfig(), overlap_param_gather=False)
        report = stack_report(
            chunks=wrapped, optimizer=optimizer, device=device, loss_chunk_slots=64
        )
        objective = build_objective(
            ObjectiveConfig(), vocab_size=77, mask_token_id=76, batch_size=8, training=True
        )
        metrics = Metrics(objective.metric_names, device.torch_device)
        setup = Pass(wrapped, objective, SEED, Stream.VALIDATION, device, parallel, metrics)
        seen = _first_pass_marks(chunks[0])
        batches = _micro_batches(WHERE, parallel, 0, MODEL.seq_length, documents=False)
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
    found = ranks.run(opened, num_ranks=2)[0]
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
