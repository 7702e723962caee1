"""What came of a preprocess run: totals over its manifests, also those of earlier starts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megatron_dlm.data.preprocessing.recipe import Recipe
from megatron_dlm.data.preprocessing.shard_set import shard_prefix, valid_prefix, whole_parts
from megatron_dlm.data.storage.dataset import dataset_path
from megatron_dlm.data.storage.manifest import Manifest


@dataclass(frozen=True)
class Totals:
    """What the shards of one dataset hold."""

    dataset: str
    shards: int
    """Those with text."""
    documents: int
    tokens: int
    text_bytes: int
    left_out: Counter[str]


@dataclass(frozen=True)
class Summary:
    """The training side and, where documents are held out, the validation side of a run."""

    sides: Sequence[Totals]
    facts: Mapping[str, str]
    """Rows about the work itself."""
    missing: Sequence[int]
    """Jobs that other array tasks still have to do; the datasets are listed when there is none."""

    def print(self) -> None:
        """A table, and what to do next."""
        names = ("", "train", "validation")
        table = Table(*names[: 1 + len(self.sides)], box=None)
        ratios = [side.text_bytes / side.tokens if side.tokens else 0.0 for side in self.sides]
        table.add_row("documents", *(f"{side.documents:,}" for side in self.sides))
        table.add_row("tokens", *(f"{side.tokens:,}" for side in self.sides))
        table.add_row("bytes per token", *(f"{ratio:.3f}" for ratio in ratios))
        table.add_row("shards with text", *(f"{side.shards:,}" for side in self.sides))
        Console(highlight=False).print(table)
        for name, value in {"left out": in_words(self.sides[0].left_out), **self.facts}.items():
            print(f"{name}: {value}")
        print(self._next_step())

    def _next_step(self) -> str:
        prefix = self.sides[0].dataset
        if not self.missing:
            keys = zip(("train", "valid"), self.sides, strict=False)
            lines = [f"  data.{key}: {json.dumps({side.dataset: 1.0})}" for key, side in keys]
            return "\n".join([f"{dataset_path(prefix)} lists the shards; train with", *lines])
        shown = ", ".join(map(str, self.missing[:10])) + (", ..." if len(self.missing) > 10 else "")
        return (
            f"jobs of other array tasks are not done yet ({len(self.missing)}: {shown}); the task "
            f"that ends last writes {dataset_path(prefix)}, and so does, once all have ended, "
            f"`megatron-dlm data merge --output_prefix {prefix}`"
        )


def totals(prefix: str, jobs: Iterable[int], recipe: Recipe) -> list[Totals]:
    """Totals of these jobs on each side."""
    parts = {
        (job, part): manifest
        for job in jobs
        for part, manifest in enumerate(whole_parts(prefix, job, recipe.sha256))
    }
    sides = [_totals_of(prefix, parts.values())]
    if recipe.validation_fraction:
        held = valid_prefix(prefix)
        manifests = (Manifest.read(shard_prefix(held, *place)) for place in parts)
        sides.append(_totals_of(held, filter(None, manifests)))
    return sides


def in_words(left_out: Mapping[str, int]) -> str:
    """`12 too short, 1 not utf8`."""
    reasons = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in reasons) or "nothing"


def _totals_of(dataset: str, shards: Iterable[Manifest]) -> Totals:
    manifests = list(shards)
    left_out: Counter[str] = Counter()
    for manifest in manifests:
        left_out.update(manifest.left_out)
    return Totals(
        dataset=dataset,
        shards=sum(manifest.tokens > 0 for manifest in manifests),
        documents=sum(manifest.documents for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        text_bytes=sum(manifest.text_bytes or 0 for manifest in manifests),
        left_out=left_out,
    )
