"""What we rely on in megatron-core, by name, so that an upgrade fails here and not in a run."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import pytest

VERSION = "0.16.1"
# Constants that the CPU adapter replaces in all modules that training imports.
EXPECTED_REWRITES = 67

# "module:name" -> parameters that we pass by name (or in this order).
CALLED = {
    "parallel_state:initialize_model_parallel": [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "distributed_timeout_minutes",
    ],
    "process_groups_config:ProcessGroupCollection.use_mpu_process_groups": [],
    "tensor_parallel.random:model_parallel_cuda_manual_seed": ["seed"],
    "tensor_parallel.mappings:gather_from_sequence_parallel_region": ["input_", "group"],
    "models.gpt.gpt_layer_specs:get_gpt_layer_local_spec": ["normalization", "qk_layernorm"],
    "models.gpt.gpt_layer_specs:get_gpt_layer_with_transformer_engine_spec": ["qk_layernorm"],
    "models.gpt.gpt_model:GPTModel._preprocess": [
        "input_ids",
        "position_ids",
        "packed_seq_params",
    ],
    "packed_seq_params:PackedSeqParams": [
        "qkv_format",
        "cu_seqlens_q",
        "cu_seqlens_kv",
        "max_seqlen_q",
        "max_seqlen_kv",
    ],
    "models.gpt.gpt_model:GPTModel.shared_embedding_or_output_weight": [],
    "models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.get_rotary_seq_len": [],
    "jit:jit_fuser": [],
    "tensor_parallel.layers:set_tensor_model_parallel_attributes": [
        "tensor",
        "is_parallel",
        "dim",
        "stride",
    ],
    "transformer.utils:make_sharded_tensors_for_checkpoint": [
        "state_dict",
        "prefix",
        "tensor_parallel_layers_axis_map",
    ],
    "transformer.transformer_block:get_num_layers_to_build": ["config", "vp_stage"],
    "transformer.transformer_block:TransformerBlock.forward": [
        "hidden_states",
        "attention_mask",
        "rotary_pos_emb",
        "packed_seq_params",
    ],
    "pipeline_parallel:get_forward_backward_func": [],
    "pipeline_parallel.schedules:forward_backward_no_pipelining": [
        "forward_step_func",
        "data_iterator",
        "model",
        "num_microbatches",
        "seq_length",
        "micro_batch_size",
        "forward_only",
    ],
    "distributed:DistributedDataParallel": ["config", "ddp_config", "module", "disable_bucketing"],
    "distributed:DistributedDataParallel.disable_forward_pre_hook": ["param_sync"],
    "distributed:DistributedDataParallel.enable_forward_pre_hook": [],
    "distributed:finalize_model_grads": ["model", "num_tokens"],
    "optimizer:get_megatron_optimizer": ["config", "model_chunks", "config_overrides"],
    "optimizer:ParamKey": ["with_name_predicate"],
    "optimizer:ParamWithNamePredicate": ["name", "fn"],
    "optimizer.distrib_optimizer:DistributedOptimizer.sharded_state_dict": [
        "model_sharded_state_dict",
        "is_loading",
        "metadata",
    ],
    "optimizer.distrib_optimizer:DistributedOptimizer."
    "load_parameter_state_from_fully_reshardable": ["state_dict"],
    "transformer.moe.router:Router.gating": ["input"],
    "transformer.moe.router:TopKRouter.routing": ["logits", "padding_mask"],
    "transformer.moe.router:TopKRouter.apply_z_loss": ["logits", "padding_mask"],
    "transformer.moe.router:TopKRouter._apply_aux_loss": [
        "probs",
        "scores_for_aux_loss",
        "routing_map",
    ],
    "transformer.moe.router:TopKRouter._apply_seq_aux_loss": [
        "probs",
        "scores_for_aux_loss",
        "routing_map",
        "seq_length",
        "bsz",
    ],
    "transformer.moe.router:TopKRouter._apply_global_aux_loss": [
        "probs",
        "scores_for_aux_loss",
        "routing_map",
    ],
    "transformer.moe.router:TopKRouter._apply_expert_bias": ["routing_map"],
    "transformer.moe.router:TopKRouter.attach_and_log_load_balancing_loss": [
        "activation",
        "aux_loss_coeff",
        "aux_loss",
        "aux_loss_name",
        "reduce_group",
    ],
    "transformer.moe.router:TopKRouter.is_aux_loss_enabled": [],
    "transformer.moe.moe_utils:MoEAuxLossAutoScaler.apply": [],
    "transformer.moe.moe_utils:compute_routing_scores_for_aux_loss": [
        "logits",
        "topk",
        "score_function",
        "fused",
    ],
    "transformer.moe.moe_utils:get_capacity": ["num_tokens", "num_experts", "capacity_factor"],
    "transformer.moe.moe_utils:topk_routing_with_score_function": [
        "logits",
        "topk",
        "use_pre_softmax",
        "num_groups",
        "group_topk",
        "scaling_factor",
        "score_function",
        "expert_bias",
        "fused",
    ],
    "transformer.moe.moe_utils:z_loss_func": ["logits", "z_loss_coeff"],
    "dist_checkpointing:save": ["sharded_state_dict", "checkpoint_dir", "async_sharded_save"],
    "dist_checkpointing:load": ["sharded_state_dict", "checkpoint_dir", "sharded_strategy"],
    "dist_checkpointing.strategies.async_utils:AsyncCallsQueue": ["persistent"],
    "dist_checkpointing.strategies.async_utils:AsyncCallsQueue.schedule_async_request": [
        "async_request"
    ],
    "dist_checkpointing.strategies.async_utils:AsyncRequest": [
        "async_fn",
        "async_fn_args",
        "finalize_fns",
    ],
    "dist_checkpointing.strategies.async_utils:AsyncRequest.execute_sync": [],
    "dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.write_preloaded_data": [
        "transform_list",
        "local_proc_idx",
        "write_bucket",
        "results_queue",
        "count_queue",
        "use_fsync",
    ],
    "dist_checkpointing.strategies.fully_parallel:FullyParallelLoadStrategyWrapper": [
        "strategy",
        "parallelization_group",
    ],
}
# Names that the adapters replace or read without calling.
REPLACED = [
    "jit:jit_fuser",
    "tensor_parallel.random:_get_cuda_rng_state",
    "tensor_parallel.random:_set_cuda_rng_state",
    "tensor_parallel.random:CudaRNGStatesTracker.fork",
    "tensor_parallel.mappings:_gather_along_first_dim",
    "tensor_parallel.mappings:_reduce_scatter_along_first_dim",
    "transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
    "distributed.param_and_grad_buffer:dist_reduce_scatter_func",
    "distributed.param_and_grad_buffer:dist_all_gather_func",
    "dist_checkpointing.strategies.filesystem_async:_results_queue",
    "dist_checkpointing.mapping:ShardedTensorFactory.build",
]


def find(location: str) -> object:
    module, _, path = location.partition(":")
    found: object = import_module(f"megatron.core.{module}")
    for name in path.split("."):
        found = getattr(found, name)
    return found


def test_version() -> None:
    assert version("megatron-core") == VERSION


@pytest.mark.parametrize("location", CALLED)
def test_called(location: str) -> None:
    parameters = list(inspect.signature(find(location)).parameters)
    assert set(CALLED[location]) <= set(parameters), f"{location} takes {parameters}"


@pytest.mark.parametrize("location", REPLACED)
def test_replaced(location: str) -> None:
    find(location)


def test_number_of_rewritten_constants() -> None:
    program = (
        "from megatron_dlm.runtime.device import open_device; open_device('cpu');"
        "import megatron_dlm.training.train;"
        "from megatron_dlm.runtime.cpu import rewritten_constants;"
        "print(rewritten_constants.total())"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert int(output) == EXPECTED_REWRITES
