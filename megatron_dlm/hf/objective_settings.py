"""What config.json says of the objective: all that samplers and likelihoods must know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from megatron_dlm.config.objective import AttentionPattern, ObjectiveConfig, ObjectiveKind
from megatron_dlm.objectives.noise import SigmoidNoise, noise_path

# Fields of the section, by kind, under their own names.
_FIELDS: dict[str, tuple[str, ...]] = {
    "hybrid": (
        "noise_type",
        "noise_bias",
        "noise_scale",
        "uniform_probability",
        "prompt_share",
        "infilling_share",
    ),
    "block": ("block_size",),
}
_PATTERNS = {
    AttentionPattern.CAUSAL: "causal",
    AttentionPattern.BIDIRECTIONAL: "bidirectional",
    # What such a mask hides in training is said by prompt_share; annealed attention hides nothing.
    AttentionPattern.ARBITRARY: "bidirectional",
    AttentionPattern.BLOCK: "block",
}


def attention_pattern(objective: ObjectiveConfig) -> str:
    """attn_mask_type: causal, bidirectional or block."""
    return _PATTERNS[objective.attention]


def write_objective(objective: ObjectiveConfig) -> dict[str, Any]:
    """The keys of our own layout; the bias of the noise as a number where it has one."""
    values = {name: getattr(objective, name) for name in _FIELDS.get(objective.kind, ())}
    if objective.kind == "hybrid":
        values["noise_bias"] = _bias(objective)
        if objective.noise_bias is not None:
            values["noise_type"] = None  # a bias without a name
    return {
        "attn_mask_type": attention_pattern(objective),
        "objective_kind": objective.kind,
        **values,
    }


def read_objective(
    config: Mapping[str, Any], path: Path, *, mask_token_id: int | None
) -> ObjectiveConfig:
    """The section of a directory in our own layout; ValueError naming `path` and the key."""
    kind = config.get("objective_kind", "autoregressive")
    if kind not in get_args(ObjectiveKind):
        known = ", ".join(get_args(ObjectiveKind))
        raise ValueError(f"{path}: objective_kind is {kind}; use one of {known}")
    values = {name: config[name] for name in _FIELDS.get(kind, ()) if config.get(name) is not None}
    if "noise_type" in values:
        values.pop("noise_bias", None)  # the same in numbers
    try:
        objective = ObjectiveConfig(kind=kind, mask_token_id=mask_token_id, **values)
        if kind == "hybrid" and _bias(objective) != config.get("noise_bias", _bias(objective)):
            raise ValueError(
                f"noise_bias {config['noise_bias']} is not that of noise_type "
                f"{objective.noise_type}; remove one"
            )
    except KeyError:
        raise ValueError(f"{path}: noise_type is {values['noise_type']}, not one of ours") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    pattern = config.get("attn_mask_type", attention_pattern(objective))
    if pattern != attention_pattern(objective):
        raise ValueError(
            f"{path}: attn_mask_type is {pattern}; {attention_pattern(objective)} is that of "
            f"objective_kind {kind}"
        )
    return objective


def _bias(objective: ObjectiveConfig) -> float | None:
    noise = noise_path(objective)
    return noise.bias if isinstance(noise, SigmoidNoise) else None
