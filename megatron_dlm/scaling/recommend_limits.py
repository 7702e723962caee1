"""Numbers that no law at hand can give are left out, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_dlm.scaling.advice import Recommendation

FARTHEST_DECADES = 5.0
"""Farther from what was measured a power law is no guess any more."""
_COUNTS = ("parameters", "tokens", "batch_tokens", "steps")


def within_reach(recommendation: Recommendation) -> Recommendation:
    """Without numbers too far from what was measured, and without less than one of a thing."""
    kept = dict(recommendation.numbers)
    far = [name for name, advice in kept.items() if advice.decades > FARTHEST_DECADES]
    small = [name for name in _COUNTS if name in kept and kept[name].value < 1]
    notes = []
    if far:
        decades = max(kept[name].decades for name in far)
        notes.append(
            f"no {_listed(far)}: {decades:.3g} decades from what was measured, and beyond "
            f"{FARTHEST_DECADES:g} a law says nothing"
        )
    small = [name for name in small if name not in far]
    if small:
        lowest = min(kept[name].value for name in small)
        notes.append(f"no {_listed(small)}: less than one would do ({lowest:.3g}); give more FLOPs")
    kept = {name: advice for name, advice in kept.items() if name not in (*far, *small)}
    return replace(recommendation, numbers=kept, notes=(*recommendation.notes, *notes))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names).replace("_", " ").replace("flops", "FLOPs")
