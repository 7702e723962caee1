"""From the objective section of the config to an objective."""

from __future__ import annotations

from typing import cast

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.objectives.autoregressive import AutoregressiveObjective
from megatron_dlm.objectives.base import Objective
from megatron_dlm.objectives.masked import MaskedObjective, Weighting
from megatron_dlm.objectives.schedules import build_schedule


def build_objective(
    config: ObjectiveConfig,
    *,
    vocab_size: int,
    mask_token_id: int | None,
    batch_size: int,
    training: bool,
) -> Objective:
    """batch_size is the number of consecutive samples over which noise times are stratified.

    training=False leaves out what only training wants (input masking, variable length) and always
    stratifies the noise times.
    """
    if config.kind == "autoregressive":
        ratio = config.input_masking_ratio if training else 0.0
        mask = None
        if ratio > 0:
            mask = _checked_mask_id(mask_token_id, vocab_size, "objective.input_masking_ratio > 0")
        return AutoregressiveObjective(vocab_size, ratio, mask)
    if config.kind != "masked":
        raise ValueError(f"objective.kind {config.kind} is not available yet")
    return MaskedObjective(
        vocab_size=vocab_size,
        mask_token_id=_checked_mask_id(mask_token_id, vocab_size, f"objective.kind {config.kind}"),
        schedule=build_schedule(config.schedule, config.schedule_exponent),
        batch_size=batch_size,
        weighting=cast("Weighting", config.weighting),  # checked by ObjectiveConfig
        time_sampling=config.time_sampling if training else "stratified",
        time_floor=config.time_floor,
        variable_length_probability=config.variable_length_probability if training else 0.0,
    )


def _checked_mask_id(mask_token_id: int | None, vocab_size: int, reason: str) -> int:
    if mask_token_id is None:
        raise ValueError(
            f"{reason} needs objective.mask_token_id; set it or use a tokenizer with a mask token"
        )
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"objective.mask_token_id is {mask_token_id}; it must lie in [0, {vocab_size}), "
            "the rows of model.vocab_size"
        )
    return mask_token_id
