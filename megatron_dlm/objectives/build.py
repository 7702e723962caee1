"""From the objective section of the config to an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.objectives.autoregressive import AutoregressiveObjective
from megatron_dlm.objectives.base import Objective
from megatron_dlm.objectives.block import BlockObjective
from megatron_dlm.objectives.curricula import TimeCurriculum
from megatron_dlm.objectives.hybrid import HybridObjective, HybridWeighting
from megatron_dlm.objectives.masked import MaskedObjective, Weighting
from megatron_dlm.objectives.noise import noise_path
from megatron_dlm.objectives.noise_profile import DiffusionObjective, NoiseProfile
from megatron_dlm.objectives.schedules import build_schedule


def build_objective(
    config: ObjectiveConfig,
    *,
    vocab_size: int,
    mask_token_id: int | None,
    batch_size: int,
    training: bool,
    num_noise_buckets: int = 0,
) -> Objective:
    """batch_size is the number of consecutive samples over which noise times are stratified.

    training=False leaves out what only training wants (input masking, variable length, curricula,
    prompts, noise levels of single tokens, empty tokens) and always stratifies the noise levels.
    num_noise_buckets: also measure the loss of diffusion in that many ranges of the noise level.
    """
    if config.kind == "autoregressive":
        ratio = config.input_masking_ratio if training else 0.0
        mask = None
        if ratio > 0:
            mask = _checked_mask_id(mask_token_id, vocab_size, "objective.input_masking_ratio > 0")
        return AutoregressiveObjective(vocab_size, ratio, mask)
    mask = _checked_mask_id(mask_token_id, vocab_size, f"objective.kind {config.kind}")
    build = _DIFFUSION[config.kind]
    objective = build(config, vocab_size, mask, batch_size=batch_size, training=training)
    return NoiseProfile(objective, num_noise_buckets) if num_noise_buckets else objective


def _masked(
    config: ObjectiveConfig, vocab_size: int, mask: int, *, batch_size: int, training: bool
) -> MaskedObjective:
    curriculum = None
    if training and config.time_curriculum_steps > 0:
        floor = 0.0 if config.weighting == "count" else config.time_floor
        curriculum = TimeCurriculum(
            config.time_curriculum_steps, config.time_curriculum_width, floor
        )
    return MaskedObjective(
        vocab_size=vocab_size,
        mask_token_id=mask,
        schedule=build_schedule(config.schedule, config.schedule_exponent),
        batch_size=batch_size,
        weighting=cast("Weighting", config.weighting),  # checked by ObjectiveConfig
        time_sampling=config.time_sampling if training else "stratified",
        time_floor=config.time_floor,
        variable_length_probability=config.variable_length_probability if training else 0.0,
        time_curriculum=curriculum,
        attention_annealing_steps=config.attention_annealing_steps if training else 0,
    )


def _hybrid(
    config: ObjectiveConfig, vocab_size: int, mask: int, *, batch_size: int, training: bool
) -> HybridObjective:
    pad = config.pad_token_id
    if config.empty_token_share > 0:
        _check_pad_id(pad, vocab_size, mask)
    return HybridObjective(
        vocab_size=vocab_size,
        mask_token_id=mask,
        path=noise_path(config),
        batch_size=batch_size,
        weighting=cast("HybridWeighting", config.weighting),  # checked by ObjectiveConfig
        time_sampling=config.time_sampling if training else "stratified",
        independent_noise_share=config.independent_noise_share if training else 0.0,
        prompt_share=config.prompt_share if training else 0.0,
        infilling_share=config.infilling_share if training else 0.0,
        empty_token_share=config.empty_token_share if training else 0.0,
        pad_token_id=pad,
    )


def _block(
    config: ObjectiveConfig, vocab_size: int, mask: int, *, batch_size: int, training: bool
) -> BlockObjective:
    return BlockObjective(
        vocab_size=vocab_size,
        mask_token_id=mask,
        schedule=build_schedule(config.schedule, config.schedule_exponent),
        batch_size=batch_size,
        block_size=config.block_size,
        weighting=cast(
            "Literal['elbo', 'count', 'unweighted']", config.weighting
        ),  # checked by ObjectiveConfig
        time_sampling=config.time_sampling if training else "stratified",
        time_floor=config.time_floor,
        lowest_mask_rate=config.lowest_mask_rate if training else 0.0,
        highest_mask_rate=config.highest_mask_rate if training else 1.0,
    )


_DIFFUSION: dict[str, Callable[..., DiffusionObjective]] = {
    "masked": _masked,
    "hybrid": _hybrid,
    "block": _block,
}


def _check_pad_id(pad: int | None, vocab_size: int, mask: int) -> None:
    if pad is None:
        raise ValueError(
            "objective.empty_token_share > 0 needs objective.pad_token_id; set it or use a "
            "tokenizer with a pad token"
        )
    if not 0 <= pad < vocab_size or pad == mask:
        raise ValueError(
            f"objective.pad_token_id is {pad}; it must lie in [0, {vocab_size}) and differ from "
            f"objective.mask_token_id {mask}"
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
