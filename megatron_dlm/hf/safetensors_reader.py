"""Rows of single tensors out of a Hugging Face directory; only safetensors, never a pickle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.config.json_text import parse_json
from megatron_dlm.hf.extra import library
from megatron_dlm.hf.mapping import ExportedTensor
from megatron_dlm.hf.safetensors_writer import INDEX_FILE, SINGLE_FILE

CONFIG_FILE = "config.json"


class SafetensorsDirectory:
    """The weights of a directory; `names` says which there are."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a directory without safetensors, and for a missing shard."""
        self.path = path
        self._places = _places(path)

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        with self._slice(name) as opened:
            return tuple(opened.get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor as stored."""
        return self.rows(name, 0, 1).dtype

    def rows(self, name: str, start: int = 0, num_rows: int | None = None) -> Tensor:
        """Rows [num_rows, ...] from `start` on; all by default."""
        stop = None if num_rows is None else start + num_rows
        with self._slice(name) as opened:
            tensor: Tensor = opened[start:stop]
        return tensor

    def check(self, expected: Iterable[ExportedTensor], *, may_hold: Iterable[str] = ()) -> None:
        """Refuse a directory that lacks a tensor, has another shape, or holds more than expected.

        `may_hold` names tensors that are allowed besides.
        """
        shapes = {tensor.name: tensor.shape for tensor in expected}
        found = self._shapes()
        for name, shape in shapes.items():
            if name not in found:
                raise ValueError(
                    f"{self.path} lacks the tensor {name} that its config.json implies"
                )
            if found[name] != shape:
                raise ValueError(
                    f"{self._places[name]}: {name} has shape {list(found[name])}, "
                    f"{CONFIG_FILE} implies {list(shape)}"
                )
        others = sorted(self.names - shapes.keys() - set(may_hold))
        others = [name for name in others if not name.endswith("rotary_emb.inv_freq")]
        if others:
            raise ValueError(
                f"{self.path} holds tensors that our model does not have: {', '.join(others[:3])}"
                + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, opening every file once: one of experts holds thousands."""
        names_of: dict[Path, list[str]] = {}
        for name, file in self._places.items():
            names_of.setdefault(file, []).append(name)
        shapes: dict[str, tuple[int, ...]] = {}
        for file, names in names_of.items():
            with _opened(file, "its tensors") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
        return shapes

    @contextmanager
    def _slice(self, name: str) -> Iterator[Any]:
        file = self._places.get(name)
        if file is None:
            raise ValueError(f"{self.path} holds no tensor {name}")
        # Opened anew each time: what was read of a mapped file counts as memory until it is closed.
        with _opened(file, name) as opened:
            yield opened.get_slice(name)


@contextmanager
def _opened(file: Path, what: str) -> Iterator[Any]:
    safetensors = library("safetensors")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            yield opened
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {what} cannot be read ({error})") from None


def read_config_file(path: Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory; ValueError names the file."""
    file = path / CONFIG_FILE
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(
            f"{path} is no run, no checkpoint and no Hugging Face directory (it has no "
            f"{CONFIG_FILE})"
        ) from None
    except ValueError:
        raise ValueError(f"{file} is not valid JSON") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object")
    return config


def _places(path: Path) -> dict[str, Path]:
    index = path / INDEX_FILE
    single = path / SINGLE_FILE
    if index.is_file():
        try:
            weight_map = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
            places = {name: path / Path(file).name for name, file in weight_map.items()}
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index} is no index of safetensors files") from None
        missing = sorted({file for file in places.values() if not file.is_file()})
        if missing:
            raise ValueError(f"{missing[0]} is missing, but {INDEX_FILE} names it")
        return places
    if single.is_file():
        safetensors = library("safetensors")
        try:
            with safetensors.safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{single} cannot be read ({error})") from None
    pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)]
    hint = f"; {pickled[0]} is a pickle, which can run code: convert it first" if pickled else ""
    raise ValueError(f"{path} holds no {SINGLE_FILE} and no {INDEX_FILE}{hint}")
