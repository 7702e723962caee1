"""From a sample number to tokens: the datasets (tiers) of a blend, their budgets and epochs.

Sample i of the training order is a pure function of (datasets, weights, budget, packing, sequence
length, seed, i): every rank reads its own samples, and a restart needs only the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dlm.data.blend import Blend
from megatron_dlm.data.order import Use, derive_key, permute
from megatron_dlm.data.packing import Sample, Windows
from megatron_dlm.data.storage.dataset import Dataset


@dataclass(frozen=True)
class Tier:
    """One dataset of a blend: the part of it that training uses, cut into windows."""

    name: str
    """Short name for reports; no other tier has it."""
    dataset: Dataset
    weight: float
    """As given by the user."""
    unique_tokens: int
    """Different tokens that training may see."""
    windows: Windows


@dataclass(frozen=True)
class TierReport:
    """What a number of samples takes from one tier."""

    name: str
    prefix: str
    weight: float
    available_tokens: int
    """Tokens of the whole dataset."""
    unique_tokens: int
    """Tokens in the budget, or all."""
    samples: int
    epochs: float
    """Passes over the unique tokens."""
    seen_tokens: int
    """Different tokens among the samples; inside the first epoch pro rata of its windows."""

    def line(self) -> str:
        """In words, for a log."""
        return (
            f"data {self.name}: weight {self.weight:g}, {self.unique_tokens:,} unique of "
            f"{self.available_tokens:,} tokens, {self.samples:,} samples, {self.epochs:.4g} "
            f"epochs; the run sees {self.seen_tokens:,} different tokens"
        )


class Corpus:
    """All tiers of a blend; made by `open_corpus`."""

    def __init__(
        self, tiers: Sequence[Tier], blend: Blend, *, seed: int, seq_length: int, digest: str
    ) -> None:
        self.tiers, self._blend = list(tiers), blend
        self._seed, self.seq_length, self.digest = seed, seq_length, digest
        """Identifies the text, weights, budget, packing, sequence length and seed; no paths."""
        self.unique_tokens = sum(tier.unique_tokens for tier in tiers)
        """Different tokens that training may see, over all tiers."""

    @property
    def num_windows(self) -> int:
        """Samples in one epoch."""
        return sum(tier.windows.num_windows for tier in self.tiers)

    @property
    def text_share(self) -> float:
        """Unique tokens per column of the windows; what is missing to 1 is filler or context."""
        return self.unique_tokens / (self.num_windows * self.seq_length)

    @property
    def datasets(self) -> list[Dataset]:
        return [tier.dataset for tier in self.tiers]

    def prepare(self) -> None:
        """Read now what the order of the documents needs, rather than at the first sample."""
        for tier in self.tiers:
            tier.windows.prepare()

    def locate(self, index: int) -> tuple[int, int, int]:
        """Sample number -> (tier, epoch of that tier, window)."""
        place, pick = self._blend.locate(index)
        size = self.tiers[place].windows.num_windows
        epoch, step = divmod(pick, size)
        key = derive_key(self._seed, Use.WINDOW_ORDER, place, epoch)
        return place, epoch, permute(step, size=size, key=key)

    def sample(self, index: int) -> Sample:
        """One sample of the training order; raises ValueError for ids that the model lacks."""
        place, _, window = self.locate(index)
        return self.tiers[place].windows.read(window)

    def report(self, num_samples: int) -> list[TierReport]:
        """What the first `num_samples` samples take from each tier."""
        counts = self._blend.counts(num_samples)
        return [_report(tier, counts[place]) for place, tier in enumerate(self.tiers)]

    def progress(self, num_samples: int) -> dict[str, float]:
        """`epoch` and `unique_tokens` (different tokens seen) after so many samples.

        With several tiers also `epoch/<name>` and `unique_tokens/<name>` of each.
        """
        rows = self.report(num_samples)
        values = {
            "epoch": num_samples / self.num_windows,
            "unique_tokens": sum(row.seen_tokens for row in rows),
        }
        for row in rows if len(rows) > 1 else ():
            values[f"epoch/{row.name}"] = row.epochs
            values[f"unique_tokens/{row.name}"] = row.seen_tokens
        return values


def _report(tier: Tier, samples: int) -> TierReport:
    num_windows = tier.windows.num_windows
    return TierReport(
        name=tier.name,
        prefix=tier.dataset.prefix,
        weight=tier.weight,
        available_tokens=tier.dataset.num_tokens,
        unique_tokens=tier.unique_tokens,
        samples=samples,
        epochs=samples / num_windows,
        seen_tokens=tier.unique_tokens * min(samples, num_windows) // num_windows,
    )
