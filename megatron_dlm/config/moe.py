"""Mixture of experts: how many experts a layer has, who chooses whom, what keeps them busy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_dlm.config.checks import require


@dataclass(frozen=True)
class MoEConfig:
    """Layers whose MLP is a set of experts; num_experts 0 is a dense model."""

    num_experts: int = 0
    """Experts of every MoE layer; 0: all layers are dense."""
    ffn_hidden_size: int | None = None
    """Inner width of one expert; default: model.ffn_hidden_size."""
    num_dense_layers: int = 0
    """The first N layers keep a dense MLP."""
    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    """token_choice: every token takes its router_topk best experts; expert_choice: every expert
    takes its best tokens, router_topk per token on average (bidirectional objectives only)."""
    router_topk: int = 2
    """Experts per token; expert_choice: on average."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """What turns router logits into gates."""
    pre_softmax: bool = False
    """Gates are scores over all experts; false: over the chosen experts only."""
    aux_loss_coeff: float = 0.0
    """Weight of the balancing loss over the tokens of a micro-batch (Switch Transformer)."""
    seq_aux_loss_coeff: float = 0.0
    """Weight of the balancing loss over the tokens of each sequence: the one that does not depend
    on the micro-batch size."""
    global_aux_loss_coeff: float = 0.0
    """Weight of the balancing loss over the tokens of a global batch so far."""
    z_loss_coeff: float = 0.0
    """Weight of the squared log-sum-exp of the router logits (ST-MoE)."""
    expert_bias: bool = False
    """Balance without a loss: a bias on the choice, moved after every step (DeepSeek-V3); needs
    score_function sigmoid."""
    expert_bias_update_rate: float = 1e-3
    """Step of the bias of an expert that has too many or too few tokens."""
    capacity_factor: float | None = None
    """An expert takes at most this times its fair share of tokens; default: all that come."""
    drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an expert over capacity drops: the least probable or the last."""
    pad_to_capacity: bool = False
    """Pad every expert's tokens to its capacity: equal shapes on all ranks."""
    choice_scope: Literal["sequence", "micro_batch"] = "sequence"
    """expert_choice: an expert chooses among the tokens of one sequence, or of a whole micro-batch;
    with micro_batch results depend on train.micro_batch_size."""
    token_balance_loss_coeff: float = 0.0
    """expert_choice: weight of the loss that keeps tokens equally popular; 1 when they are."""
    count_scales: list[float] = field(default_factory=list)
    """expert_choice: factors of the routed output of a token that 0, 1, 2, … experts chose;
    num_experts + 1 numbers, or none."""
    shared_expert_ffn_hidden_size: int = 0
    """Inner width of an expert that every token passes through; 0: none."""
    shared_expert_gate: bool = False
    """A learned sigmoid gate scales the output of the shared expert."""
    token_dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach the ranks of their experts."""

    def __post_init__(self) -> None:
        require(
            self.num_experts >= 0,
            f"model.moe.num_experts is {self.num_experts}; it must be 0 (dense) or more",
        )
        if self.num_experts == 0:
            self._refuse_settings_of_dense()
            return
        self._check_sizes()
        self._check_routing()

    @property
    def is_moe(self) -> bool:
        """Some layers have experts."""
        return self.num_experts > 0

    def _refuse_settings_of_dense(self) -> None:
        for name in type(self).__dataclass_fields__:
            value = getattr(self, name)
            require(
                value == _default(name),
                f"model.moe.{name} is {value}, but model.moe.num_experts is 0 (a dense model); "
                "set model.moe.num_experts or remove it",
            )

    def _check_sizes(self) -> None:
        width = self.ffn_hidden_size
        require(
            width is None or width > 0,
            f"model.moe.ffn_hidden_size is {width}; it must be positive",
        )
        require(
            1 <= self.router_topk <= self.num_experts,
            f"model.moe.router_topk is {self.router_topk}; it must be between 1 and "
            f"model.moe.num_experts {self.num_experts}",
        )
        for name in (
            "num_dense_layers",
            "shared_expert_ffn_hidden_size",
            "aux_loss_coeff",
            "seq_aux_loss_coeff",
            "global_aux_loss_coeff",
            "z_loss_coeff",
            "token_balance_loss_coeff",
        ):
            value = getattr(self, name)
            require(value >= 0, f"model.moe.{name} is {value}; it must be at least 0")
        require(
            self.expert_bias_update_rate > 0,
            f"model.moe.expert_bias_update_rate is {self.expert_bias_update_rate}; it must be "
            "greater than 0",
        )
        require(
            self.shared_expert_ffn_hidden_size > 0 or not self.shared_expert_gate,
            "model.moe.shared_expert_gate needs model.moe.shared_expert_ffn_hidden_size",
        )

    def _check_routing(self) -> None:
        """Each kind of routing has settings that the other would silently ignore."""
        foreign = _OF_TOKEN_CHOICE if self.routing == "expert_choice" else _OF_EXPERT_CHOICE
        for name in foreign:
            self._require_default(name, f"model.moe.routing {self.routing} has no use for it")
        for name in ("drop_policy", "pad_to_capacity"):
            if self.capacity_factor is None:
                self._require_default(name, "it needs model.moe.capacity_factor")
        if not self.expert_bias:
            self._require_default("expert_bias_update_rate", "it needs model.moe.expert_bias")
        self._check_scores()
        self._check_capacity()
        self._check_count_scales()

    def _require_default(self, name: str, reason: str) -> None:
        value = getattr(self, name)
        require(value == _default(name), f"model.moe.{name} is {value}, but {reason}; remove it")

    def _check_scores(self) -> None:
        is_sigmoid = self.score_function == "sigmoid"
        require(
            is_sigmoid or not self.expert_bias,
            "model.moe.expert_bias needs model.moe.score_function sigmoid: the bias is added to "
            "scores that do not add up to 1",
        )
        require(
            not (is_sigmoid and self.pre_softmax),
            "model.moe.pre_softmax has no meaning with model.moe.score_function sigmoid; remove it",
        )
        is_constant = self.routing == "token_choice" and self.router_topk == 1
        require(
            not is_constant or is_sigmoid or self.pre_softmax,
            "model.moe.router_topk is 1: a softmax over one chosen expert is always 1, and the "
            "router would never learn; set model.moe.pre_softmax true or use score_function "
            "sigmoid",
        )

    def _check_capacity(self) -> None:
        factor, largest = self.capacity_factor, self.num_experts / self.router_topk
        require(
            factor is None or 0 < factor <= largest,
            f"model.moe.capacity_factor is {factor}; it must lie in (0, {largest:g}]: with "
            "num_experts / router_topk an expert has room for every token, remove it to drop none",
        )

    def _check_count_scales(self) -> None:
        scales = self.count_scales
        require(
            not scales or len(scales) == self.num_experts + 1,
            f"model.moe.count_scales has {len(scales)} numbers; give num_experts + 1 = "
            f"{self.num_experts + 1}, for tokens that 0, 1, ... {self.num_experts} experts chose",
        )
        for scale in scales:
            require(
                math.isfinite(scale) and scale >= 0,
                f"model.moe.count_scales has {scale}; its numbers must be finite and at least 0",
            )


def _default(name: str) -> object:
    item = MoEConfig.__dataclass_fields__[name]
    return item.default_factory() if callable(item.default_factory) else item.default


_OF_TOKEN_CHOICE = (
    "aux_loss_coeff",
    "seq_aux_loss_coeff",
    "global_aux_loss_coeff",
    "expert_bias",
    "capacity_factor",
)
_OF_EXPERT_CHOICE = ("choice_scope", "token_balance_loss_coeff", "count_scales")

WEIGHT_FIELDS = (
    "num_experts",
    "ffn_hidden_size",
    "num_dense_layers",
    "routing",
    "router_topk",
    "score_function",
    "pre_softmax",
    "expert_bias",
    "capacity_factor",
    "drop_policy",
    "choice_scope",
    "count_scales",
    "shared_expert_ffn_hidden_size",
    "shared_expert_gate",
)
"""The part of MoEConfig that says what the weights are; the rest is how they are trained."""
