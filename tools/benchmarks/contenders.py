"""Three trainers that do the same work from the same weights on the same batch.

Import only after `open_device`: on CPU it has to adapt Megatron Core first.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from measure import Step
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import AttnMaskType
from plain import PlainTransformer
from torch import Tensor
from torch.nn import functional

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.schema import OptimizerConfig
from megatron_dlm.models.build import build_model
from megatron_dlm.models.transformer_config import transformer_config
from megatron_dlm.objectives.base import Objective
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.ops.batch import ModelInputs, TokenBatch
from megatron_dlm.ops.counter_rng import Stream
from megatron_dlm.runtime.device import Device
from megatron_dlm.runtime.parallel import ParallelContext
from megatron_dlm.runtime.seeding import seed_dropout
from megatron_dlm.training.metrics import Metrics
from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_dlm.training.step import Pass, train_step

SEED = 1
OPTIMIZER = OptimizerConfig(lr=1e-4)
_PARALLEL = ParallelConfig()
_SHARE_TOLERANCE = 0.005


@dataclass(frozen=True)
class Task:
    """What all contenders train."""

    model: ModelConfig
    objective_config: ObjectiveConfig
    batch_size: int
    device: Device
    parallel: ParallelContext

    def __post_init__(self) -> None:
        seed_dropout(SEED, 0, self.parallel)  # building a model already forks the random state

    @property
    def vocab_size(self) -> int:
        assert self.model.vocab_size is not None
        return self.model.vocab_size

    @property
    def is_masked(self) -> bool:
        return self.objective_config.kind == "masked"

    @property
    def num_tokens(self) -> int:
        """Tokens in one step."""
        return self.batch_size * self.model.seq_length

    def objective(self) -> Objective:
        return build_objective(
            self.objective_config,
            vocab_size=self.vocab_size,
            mask_token_id=self.vocab_size - 1 if self.is_masked else None,
            batch_size=self.batch_size,
            training=True,
        )

    def batch(self) -> TokenBatch:
        """Uniform tokens; for masked diffusion a step that masks half of them, as the mean does."""
        shape = (self.batch_size, self.model.seq_length + 1)
        tokens = torch.randint(
            self.vocab_size - 1, shape, generator=torch.Generator().manual_seed(SEED)
        )
        valid = torch.ones(shape, dtype=torch.bool)
        step = 0
        while True:
            index = torch.arange(self.batch_size) + step * self.batch_size
            batch = TokenBatch(tokens, valid, index)
            if not self.is_masked or abs(self.scored_share(batch) - 0.5) < _SHARE_TOLERANCE:
                return batch
            step += 1

    def inputs(self, batch: TokenBatch) -> ModelInputs:
        return self.objective().prepare(batch, SEED, Stream.TRAINING)

    def scored_share(self, batch: TokenBatch) -> float:
        """Share of the slots on which our output layer runs."""
        return float(self.inputs(batch).scored.float().mean())

    def weights(self) -> dict[str, Tensor]:
        """The initial weights, under Megatron Core's names."""
        return {
            name: value
            for name, value in self.build_model().state_dict().items()
            if value is not None
        }

    def build_model(self) -> Any:
        """Our model, freshly initialised."""
        [chunk] = build_model(
            self.model,
            _PARALLEL,
            self.objective_config,
            precision="fp32",
            seed=SEED,
            device=self.device,
            parallel=self.parallel,
        )
        return chunk


def our_step(task: Task, batch: TokenBatch, objective: Objective | None = None) -> Step:
    """train_step, as the training loop calls it; corrupting the batch is part of the step."""
    chunks = wrap_data_parallel([task.build_model()], _PARALLEL, task.parallel)
    optimizer = build_optimizer(chunks, OPTIMIZER, overlap_param_gather=False)
    objective = objective or task.objective()
    metrics = Metrics(objective.metric_names, task.device.torch_device)
    setup = Pass(
        chunks=chunks,
        objective=objective,
        seed=SEED,
        stream=Stream.TRAINING,
        device=task.device,
        parallel=task.parallel,
        metrics=metrics,
    )

    def step() -> float:
        train_step(setup, optimizer, [batch])
        return metrics.reduce()["loss"]

    return step


def stock_step(task: Task, batch: TokenBatch) -> Step:
    """Megatron Core's GPTModel with its local layer spec and its own cross entropy.

    Same configuration, data-parallel wrapper and optimizer as ours; reads ready inputs.
    """
    model = _stock_model(task)
    chunks = wrap_data_parallel([model], _PARALLEL, task.parallel)
    optimizer = build_optimizer(chunks, OPTIMIZER, overlap_param_gather=False)
    inputs = task.inputs(batch)
    num_scored = inputs.counted.sum(dtype=torch.int32)

    def forward(_: object, chunk: Any) -> tuple[Tensor, Any]:
        losses = chunk(inputs.tokens, inputs.position_ids, None, labels=inputs.targets)
        return losses, finish

    def finish(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss_sum = (losses * inputs.weights).sum()
        return loss_sum, num_scored.clone(), {"loss": loss_sum.detach() / num_scored}

    def step() -> float:
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        [report] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=None,
            model=chunks,
            num_microbatches=1,
            seq_length=task.model.seq_length,
            micro_batch_size=task.batch_size,
            forward_only=False,
        )
        optimizer.step()
        return float(report["loss"])

    return step


def _stock_model(task: Task) -> Any:
    config = transformer_config(task.model, _PARALLEL, precision="fp32", device=task.device)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    if task.objective_config.attention is AttentionPattern.BIDIRECTIONAL:
        layer.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.no_mask
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer,
        vocab_size=task.model.padded_vocab_size,
        max_sequence_length=task.model.seq_length,
        share_embeddings_and_output_weights=not task.model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=task.model.rotary_base,
    )
    model.load_state_dict(task.weights(), strict=False)  # strict=False: empty _extra_state entries
    return model


def plain_step(task: Task, batch: TokenBatch) -> Step:
    """A loop as one writes it in plain PyTorch; reads ready inputs, scores every slot."""
    is_causal = task.objective_config.attention is AttentionPattern.CAUSAL
    model = PlainTransformer(task.model, is_causal=is_causal)
    model.load_megatron(task.weights())
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    exempt = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": OPTIMIZER.weight_decay},
            {"params": exempt, "weight_decay": 0.0},
        ],
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2),
        eps=OPTIMIZER.adam_eps,
    )
    inputs = task.inputs(batch)
    weights = inputs.weights.flatten() / inputs.counted.sum() if task.is_masked else None

    def step() -> float:
        optimizer.zero_grad()
        logits, targets = model(inputs.tokens).flatten(0, 1), inputs.targets.flatten()
        if weights is None:
            loss = functional.cross_entropy(logits, targets)
        else:
            loss = (functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        return loss.item()

    return step


@dataclass(frozen=True)
class _AllSlots(ModelInputs):
    @property
    def scored(self) -> Tensor:
        return torch.ones_like(self.valid)


class ScoringAllSlots:
    """The same objective with the output layer and its softmax on every slot, as is common."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def prepare(self, batch: TokenBatch, seed: int, stream: Stream) -> ModelInputs:
        inputs = self._objective.prepare(batch, seed, stream)
        fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
        return _AllSlots(**fields)
