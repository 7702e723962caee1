"""Mixture of experts: how many experts a layer has, who chooses whom, what keeps them busy."""

from __future__ import annotations

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
        default = type(self).__dataclass_fields__
        for name, item in default.items():
            value = getattr(self, name)
            factory = item.default_factory
            wanted = factory() if callable(factory) else item.default
            require(
                value == wanted,
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
