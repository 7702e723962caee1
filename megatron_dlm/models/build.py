"""Builds this rank's chunks of the language model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.fp8 import Fp8Config
from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.layer_specs import block_spec
from megatron_dlm.models.packed import PackedDocuments
from megatron_dlm.models.parametrization import initialize_weights
from megatron_dlm.models.rotary import LocalRotary
from megatron_dlm.models.transformer_config import transformer_config
from megatron_dlm.runtime.device import Device
from megatron_dlm.runtime.parallel import ParallelContext

_STANDARD = OptimizerConfig()

HeadLoss = Callable[[nn.Module, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]
"""Output layer, hidden states [n, h] of the scored slots, weight (None: the layer's), flat indices
int64 [n] of these slots -> the sums of `chunked_loss`."""


class LanguageModel(GPTModel):
    """GPTModel whose output layer runs only on the slots that are scored."""

    rotary_pos_emb: LocalRotary

    def __init__(
        self, *, attention: AttentionPattern, output_multiplier: float, **arguments: object
    ) -> None:
        super().__init__(**arguments)
        self.output_multiplier = output_multiplier
        is_twofold = attention is AttentionPattern.BLOCK
        self.rotary_pos_emb = LocalRotary(self.rotary_pos_emb, self.cp_group, is_twofold=is_twofold)
        if self.post_process and self.output_layer.sequence_parallel:
            # The slots are chosen from whole sequences: we gather, and the gather's backward pass
            # already sums the input gradients over the TP ranks.
            self.output_layer.sequence_parallel = False
            self.output_layer.disable_grad_reduce = True

    def forward(
        self,
        tokens: Tensor | None,
        position_ids: Tensor | None,
        *,
        scored: Tensor | None = None,
        packed: PackedDocuments | None = None,
        attention_mask: Tensor | None = None,
        loss: HeadLoss | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One pass of this chunk.

        tokens, position_ids: int64 [b, s] of this rank's slots, s of S (None behind the first
        stage); where attention is BLOCK, S is twice the text: noisy, then clean slots, both at the
        same positions. scored: bool [b, s], read by the last stage only; None scores every slot.
        packed: the documents of the micro-batch, given to every stage; attention stays inside each
        of them, and the rows run as one sequence [1, b * S]: ranks that share it give fields of
        [1, s]. attention_mask: bool [b or 1, 1, S, S], True hides a key; given to every stage of a
        model whose attention is ARBITRARY. Returns logits [n, V/tp] of the n scored slots in
        row-major [b, s] order, with `loss` its sums instead (see `chunked_loss`), and before the
        last stage hidden states [s, b, h] ([b * s, 1, h] when packed).
        """
        if packed is not None:
            tokens, position_ids, scored = map(_one_row, (tokens, position_ids, scored))
        is_thd = packed is not None and packed.qkv_format == "thd"
        decoder_input, rotary = self._preprocess(
            input_ids=tokens,
            position_ids=position_ids,
            packed_seq_params=packed if is_thd else None,
        )[:2]
        if packed is not None and not is_thd:
            rotary = self.rotary_pos_emb.inside(packed)
        hidden = self.decoder(
            hidden_states=decoder_input,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary,
            packed_seq_params=packed,
        )
        return self._head(hidden, scored, loss) if self.post_process else hidden

    def _head(
        self, hidden: Tensor, scored: Tensor | None, loss: HeadLoss | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        length, num_rows, _ = hidden.shape
        if scored is None:
            slots = torch.arange(num_rows * length, device=hidden.device)
        else:
            slots = scored.flatten().nonzero().flatten()
        rows = hidden[slots % length, slots // length]
        if self.output_multiplier != 1.0:  # of the logits; there are fewer numbers here
            rows = rows * self.output_multiplier
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        if loss is not None:
            return loss(self.output_layer, rows, weight, slots)
        logits: Tensor = self.output_layer(rows, weight=weight)[0]
        return logits


def _one_row(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(1, -1)


def build_model(
    model: ModelConfig,
    parallel_config: ParallelConfig,
    objective: ObjectiveConfig,
    *,
    precision: str,
    seed: int,
    device: Device,
    parallel: ParallelContext,
    optimizer: OptimizerConfig = _STANDARD,
    fp8: Fp8Config | None = None,
) -> list[LanguageModel]:
    """This rank's chunks of the model, initialised; one per virtual pipeline stage.

    The parametrization of `optimizer` says how wide the initial weights are; `fp8` is read where
    precision is fp8.
    Raises ValueError when the options are impossible (see `transformer_config`).
    """
    config = transformer_config(model, parallel_config, precision=precision, device=device, fp8=fp8)
    chunks = []
    for number in range(parallel.num_chunks):
        chunk = _build_chunk(model, config, objective, number=number, parallel=parallel)
        chunk.to(device=device.torch_device, dtype=config.params_dtype)
        sharded = chunk.sharded_state_dict(metadata=sharding_metadata(parallel))
        initialize_weights(sharded, model, seed, optimizer=optimizer)
        chunks.append(chunk)
    return chunks


def sharding_metadata(parallel: ParallelContext) -> dict[str, object]:
    """What Megatron's sharded state dicts must be told."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gather optimizer state on one DP rank instead of on all: host memory is finite.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel.groups.dp_cp,
    }


def _build_chunk(
    model: ModelConfig,
    config: TransformerConfig,
    objective: ObjectiveConfig,
    *,
    number: int,
    parallel: ParallelContext,
) -> LanguageModel:
    virtual_stage = number if parallel.virtual_pipeline_size else None
    return LanguageModel(
        config=config,
        attention=objective.attention,
        output_multiplier=model.output_multiplier,
        transformer_layer_spec=block_spec(
            config,
            model,
            objective,
            tp_group=parallel.groups.tp,
            virtual_stage=virtual_stage,
        ),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.seq_length,
        pre_process=parallel.holds_first_stage(number),
        post_process=parallel.holds_last_stage(number),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling_factor is not None,
        rope_scaling_factor=model.rope_scaling_factor or 1.0,
        pg_collection=parallel.groups,
        vp_stage=virtual_stage,
    )
