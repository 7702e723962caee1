"""The routers of MoE layers: token choice over Megatron Core's, and expert choice.

A balancing loss rides on the gates through Megatron Core's MoEAuxLossAutoScaler. All gradients are
divided by the counted tokens of the global batch at the end, so a loss of one micro-batch enters
times its slots, on all ranks that share them: it then weighs coefficient * (mean over the batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    get_capacity,
    topk_routing_with_score_function,
    z_loss_func,
)
from megatron.core.transformer.moe.router import Router, TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.models.moe_choice import (
    choice_scores,
    choose_tokens,
    gates,
    places,
    scaled_by_count,
    token_balance_loss,
)
from megatron_dlm.models.moe_statistics import RouterStatistics
from megatron_dlm.ops.context_parallel import by_rank, in_order

_METRIC_OF_LOSS = {
    "load_balancing_loss": "moe_aux_loss",
    "seq_load_balancing_loss": "moe_seq_aux_loss",
    "global_load_balancing_loss": "moe_global_aux_loss",
}
"""Megatron Core's name of a loss -> ours."""


class TokenChoiceRouter(TopKRouter):
    """Every token takes its top-k experts.

    Differs from Megatron Core's in what goes wrong there without an error: losses keep their weight
    under SP, CP and DP, counts stay exact in bf16, the bias sees demand before drops, and drops by
    position drop the last.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        settings: MoEConfig,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.settings = settings
        self.statistics = RouterStatistics(settings)
        self.balancing_scale: Tensor | float = 1.0

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates and map (bool), [s * b, E], of logits [s, b, E]."""
        assert padding_mask is None, "no slot is padding: filler is routed as text is"
        length, rows, num_experts = logits.shape
        flat = self.apply_z_loss(logits.reshape(-1, num_experts))
        probs, wanted = topk_routing_with_score_function(
            flat,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=self.config.moe_router_fusion,
        )
        served = sent = wanted
        if self.settings.capacity_factor is not None:
            num_pairs = wanted.shape[0] * self.topk
            capacity = get_capacity(num_pairs, num_experts, self.settings.capacity_factor)
            has_room = places(probs, wanted, capacity, policy=self.settings.drop_policy)
            served = wanted & has_room
            sent = has_room if self.settings.pad_to_capacity else served
            probs = probs * served
        if self.training and torch.is_grad_enabled():
            self.statistics.add(flat, wanted, served)
            if self.is_aux_loss_enabled():
                probs = self._balanced(probs, flat, length=length, rows=rows)
        self._apply_expert_bias(wanted)
        return probs, sent

    def _balanced(self, probs: Tensor, logits: Tensor, *, length: int, rows: int) -> Tensor:
        wanted, scores = compute_routing_scores_for_aux_loss(
            logits, self.topk, self.score_function, fused=self.config.moe_router_fusion
        )
        probs = self._apply_aux_loss(probs, scores, wanted)
        probs = self._apply_seq_aux_loss(probs, scores, wanted, length, rows)
        return self._apply_global_aux_loss(probs, scores, wanted)

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: ProcessGroup,
        *_: object,
        **__: object,
    ) -> Tensor:
        """The sum of `aux_loss` over `reduce_group` is the mean over all of its slots."""
        size = reduce_group.size()
        name = _METRIC_OF_LOSS[aux_loss_name]
        self.statistics.add_loss(name, aux_loss / aux_loss_coeff, 1 / size)
        num_slots = activation.shape[0] * size
        return _attached(activation, aux_loss * num_slots, self.balancing_scale)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach the z-loss to logits [n, E]."""
        return _with_z_loss(self, logits, self.settings.z_loss_coeff)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return _keep_buffers_in_float32(self, lambda: super(TokenChoiceRouter, self)._apply(fn))


class ExpertChoiceRouter(Router):
    """Every expert takes its best tokens of a sequence, or of the micro-batch.

    The choice is over all tokens of the sequence, so the logits are gathered over the TP ranks (SP)
    and the CP ranks, and put into the order of the sequence, which decides between equals.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        settings: MoEConfig,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.settings = settings
        self.statistics = RouterStatistics(settings)
        self.balancing_scale: Tensor | float = 1.0

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates and map (bool), [s * b, E], of hidden states [s, b, h]."""
        assert padding_mask is None, "no slot is padding: filler is routed as text is"
        return self.routing(self.gating(input))

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and map (bool), [s * b, E], of logits [s, b, E]."""
        moe, num_experts = self.settings, logits.shape[2]
        logits = _with_z_loss(self, logits, moe.z_loss_coeff)
        whole = self._whole(logits)
        chosen = self._own(self._choose(whole))
        gate = gates(logits, chosen, score_function=moe.score_function, pre_softmax=moe.pre_softmax)
        if moe.count_scales:
            gate = scaled_by_count(gate, chosen, moe.count_scales)
        chosen_rows = chosen.reshape(-1, num_experts)
        if self.training and torch.is_grad_enabled():
            self.statistics.add(logits.reshape(-1, num_experts), chosen_rows, chosen_rows)
            if moe.token_balance_loss_coeff > 0:
                gate = self._balanced(gate, logits, whole, chosen)
        return gate.reshape(-1, num_experts), chosen_rows

    def _whole(self, own: Tensor) -> Tensor:
        """[s, b, E] of this rank -> [S, b, E] of the sequence; ranks sum its gradients."""
        ranks = self.cp_group.size()
        whole: Tensor = gather_from_sequence_parallel_region(own, group=self.tp_cp_group)
        return whole if ranks == 1 else in_order(whole.unflatten(0, (ranks, -1)))

    def _own(self, whole: Tensor) -> Tensor:
        """[S, b, E] of the sequence -> [s, b, E] of this rank."""
        ranks = self.cp_group.size()
        parts = whole if ranks == 1 else by_rank(whole, ranks)[self.cp_group.rank()]
        return parts.chunk(self.tp_group.size())[self.tp_group.rank()]

    def _choose(self, logits: Tensor) -> Tensor:
        scores = choice_scores(logits, pre_softmax=self.settings.pre_softmax)
        groups = self._groups(scores)
        return choose_tokens(groups, self.settings.router_topk).view_as(logits)

    def _groups(self, values: Tensor) -> Tensor:
        """[T, groups, E]: the tokens that compete for an expert along the first axis."""
        is_sequence = self.settings.choice_scope == "sequence"
        return values if is_sequence else values.flatten(0, 1)[:, None]

    def _balanced(self, gate: Tensor, logits: Tensor, whole: Tensor, chosen: Tensor) -> Tensor:
        moe, groups = self.settings, self._groups(logits)
        loss = token_balance_loss(
            self._groups(whole).logsumexp(0), groups, self._groups(chosen), moe.router_topk
        )
        loss = loss / groups.shape[1]
        self.statistics.add_loss("moe_token_balance_loss", loss, 1 / self.tp_cp_group.size())
        num_slots = whole.shape[0] * whole.shape[1]
        weighted = loss * (moe.token_balance_loss_coeff * num_slots)
        return _attached(gate, weighted, self.balancing_scale)


def routers_of(chunks: Iterable[nn.Module]) -> list[TokenChoiceRouter | ExpertChoiceRouter]:
    """The routers of the MoE layers of these model chunks."""
    modules = (module for chunk in chunks for module in chunk.modules())
    kinds = (TokenChoiceRouter, ExpertChoiceRouter)
    return [module for module in modules if isinstance(module, kinds)]


def _attached(activation: Tensor, loss: Tensor, scale: Tensor | float) -> Tensor:
    attached: Tensor = MoEAuxLossAutoScaler.apply(activation, loss * scale)
    return attached


def _with_z_loss(
    router: TokenChoiceRouter | ExpertChoiceRouter, logits: Tensor, coefficient: float
) -> Tensor:
    if not (coefficient and router.training and torch.is_grad_enabled()):
        return logits
    flat = logits.reshape(-1, logits.shape[-1])
    loss = z_loss_func(flat, 1.0)
    share = 1 / router.tp_cp_group.size()
    router.statistics.add_loss("moe_z_loss", loss * share, share)
    return _attached(logits, loss * (coefficient * flat.shape[0]), router.balancing_scale)


def _keep_buffers_in_float32(router: TopKRouter, convert: Callable[[], nn.Module]) -> nn.Module:
    """Counts and the expert bias lose their meaning in bf16: counts stop at 256."""
    exact = {name: buffer for name, buffer in router.named_buffers() if buffer.is_floating_point()}
    module = convert()
    for name, buffer in exact.items():
        setattr(router, name, buffer.to(getattr(router, name).device))
    return module
