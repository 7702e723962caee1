"""Norms and histograms of whole parameters and gradients, however they are split over ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megatron_dlm.checkpoint.state import optimizer_parts
from megatron_dlm.config.schema import LoggingConfig
from megatron_dlm.runtime.memory import peak_memory_bytes
from megatron_dlm.training.histogram import EDGES, Histogram
from megatron_dlm.training.step import Pass

_SUM, _SQUARES, _BINS = 0, 1, 2  # columns of a table: the last is the first of the bins
_PIECE = 1 << 22  # elements looked at at a time: the places of a whole matrix would need its memory
_KINDS = ("gradient", "parameter")


@dataclass(frozen=True)
class _Shard:
    """What this rank alone counts of one parameter."""

    row: int
    parameter: nn.Parameter
    first: int
    last: int

    def values(self, kind: str) -> Tensor:
        """[n], the gradient after the reduction over ranks and before clipping."""
        if kind == "gradient":
            whole: Tensor = self.parameter.main_grad  # type: ignore[attr-defined]
        else:
            whole = self.parameter.detach()
        return whole.reshape(-1)[self.first : self.last]


class Inspection:
    """Looks at the model between the backward pass and the update, at the steps that are asked for.

    Every number of every parameter counts once: on the rank whose optimizer holds it, and of copies
    on tensor-parallel ranks on the first. So the results are the same on every layout, to rounding.
    """

    def __init__(self, logging: LoggingConfig, optimizer: MegatronOptimizer, setup: Pass) -> None:
        """Collective: all ranks agree on the names. `setup` is the pass that trains."""
        self._logging = logging
        self._device = setup.device
        self._group = setup.parallel.control_group
        self._norms: dict[str, float] = {}
        self._histograms: dict[str, Histogram] = {}
        self._names: list[str] = []
        self._shards: list[_Shard] = []
        if logging.norms_interval_steps or logging.histogram_interval_steps:
            self._find_shards(optimizer, setup)

    def of(self, step: int) -> Callable[[], None] | None:
        """What to call before update number `step`, on all ranks; None where nothing is due."""
        with_norms = _is_due(step, self._logging.norms_interval_steps)
        with_histograms = _is_due(step, self._logging.histogram_interval_steps)
        if not with_norms and not with_histograms:
            return None
        return lambda: self._look(with_norms=with_norms, with_histograms=with_histograms)

    def report(self) -> dict[str, float]:
        """grad_norm_LAYER and param_norm_LAYER of the last look, once; peak_memory_bytes always."""
        norms, self._norms = self._norms, {}
        return {"peak_memory_bytes": float(peak_memory_bytes(self._device)), **norms}

    def histograms(self) -> dict[str, Histogram]:
        """gradient/NAME and parameter/NAME of the last look, once."""
        histograms, self._histograms = self._histograms, {}
        return histograms

    def _find_shards(self, optimizer: MegatronOptimizer, setup: Pass) -> None:
        names = dict(_named_globally(setup.chunks))
        own = sorted({name for item, name in names.items() if param_is_not_shared(item)})
        all_names: list[list[str]] = [[] for _ in range(setup.parallel.world_size)]
        dist.all_gather_object(all_names, own, group=self._group)
        self._names = sorted({name for some in all_names for name in some})
        rows = {name: row for row, name in enumerate(self._names)}
        for part in optimizer_parts(optimizer):
            tp_group = getattr(part, "tp_group", None)
            for parameter in _parameters_of(part):
                is_first = param_is_not_tensor_parallel_duplicate(parameter, tp_group)
                if is_first and param_is_not_shared(parameter):
                    place = part._get_model_param_range_map(parameter)["param"]
                    row = rows[names[parameter]]
                    self._shards.append(_Shard(row, parameter, place.start, place.end))

    @torch.no_grad()
    def _look(self, *, with_norms: bool, with_histograms: bool) -> None:
        edges = torch.tensor(EDGES, device=self._device.torch_device)
        num_columns = _BINS + (len(EDGES) + 1 if with_histograms else 0)
        device = self._device.torch_device
        table = torch.zeros(
            len(_KINDS), len(self._names), num_columns, dtype=torch.float64, device=device
        )
        for number, kind in enumerate(_KINDS):
            for shard in self._shards:
                _count(shard.values(kind), table[number, shard.row], edges)
        table = table.cpu()
        dist.all_reduce(table, group=self._group)
        if with_norms:
            self._norms = _norms_by_layer(self._names, table[:, :, _SQUARES])
        if with_histograms:
            self._histograms = {
                f"{kind}/{name}": Histogram(row[_SUM], row[_SQUARES], row[_BINS:])
                for kind, rows in zip(_KINDS, table.tolist(), strict=True)
                for name, row in zip(self._names, rows, strict=True)
            }


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _named_globally(
    chunks: Sequence[DistributedDataParallel],
) -> Iterator[tuple[nn.Parameter, str]]:
    """Every parameter with its name, layers counted from 0 over all stages, experts left out."""
    for chunk in chunks:
        places = {
            name: module.layer_number - 1
            for name, module in chunk.module.named_modules()
            if re.fullmatch(r"decoder\.layers\.\d+", name)
        }
        for name, parameter in chunk.module.named_parameters():
            layer = re.match(r"decoder\.layers\.\d+", name)
            if layer:
                name = f"decoder.layers.{places[layer[0]]}{name[layer.end() :]}"
            # Experts are numbered on each rank anew: those of a layer make one row.
            name = re.sub(r"\.local_experts\.\d+", "", name)
            yield parameter, re.sub(r"(\.experts\..*weight)\d+$", r"\1", name)


def _parameters_of(part: object) -> Iterator[nn.Parameter]:
    """Those of which this rank's optimizer holds a piece."""
    for kind in ("model_float16_groups", "model_fp32_groups"):
        for group in getattr(part, kind):
            yield from group


def _count(values: Tensor, row: Tensor, edges: Tensor) -> None:
    """Add `values` [n] to a row of the table, float64 [columns]."""
    for piece in values.split(_PIECE):
        numbers = piece.double()
        row[_SUM] += numbers.sum()
        row[_SQUARES] += numbers.square().sum()
        if len(row) > _BINS:
            places = torch.bucketize(piece.float(), edges, out_int32=True)
            row[_BINS:] += torch.bincount(places, minlength=len(edges) + 1)


def _norms_by_layer(names: Sequence[str], squares: Tensor) -> dict[str, float]:
    """grad_norm_LAYER and param_norm_LAYER from the squares [kinds, names]."""
    numbers = [
        int(found[1]) for name in names if (found := re.match(r"decoder\.layers\.(\d+)", name))
    ]
    width = len(str(max(numbers, default=0)))
    sums: dict[str, float] = {}
    for label, row in zip(("grad_norm", "param_norm"), squares.tolist(), strict=True):
        for name, square in zip(names, row, strict=True):
            key = f"{label}_{_layer_of(name, width)}"
            sums[key] = sums.get(key, 0.0) + square
    return {key: value**0.5 for key, value in sums.items()}


def _layer_of(name: str, width: int) -> str:
    """layer_03, embedding, final_layernorm or output_layer."""
    layer = re.match(r"decoder\.layers\.(\d+)", name)
    if layer:
        return f"layer_{int(layer[1]):0{width}d}"
    return name.removeprefix("decoder.").partition(".")[0]
