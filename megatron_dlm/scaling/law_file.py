"""The file of a fitted law: numbers with intervals, resamples, and where it was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.runtime.files import write_whole
from megatron_dlm.scaling.bootstrap import Estimate, Floats
from megatron_dlm.scaling.parametric_laws import LAWS

FORMAT = "megatron_dlm scaling law 1"

_COMPUTE_OPTIMAL = ("flops_per_token", "tokens", "parameters", "loss")
NUMBERS: dict[str, tuple[str, ...]] = {
    "isoflop": tuple(
        f"{name}_{part}" for name in _COMPUTE_OPTIMAL for part in ("coefficient", "exponent")
    ),
    **{name: law.names for name, law in LAWS.items()},
    "power": ("coefficient", "exponent"),
    "batch": ("coefficient", "exponent"),
    "learning_rate": ("coefficient", "exponent"),
}
"""Law -> the names of its numbers, in the order of the columns of `drawn`."""

Setting = str | float | bool | None | list[float]

CONVENTIONS = ("six_n", "six_p_and_attention", "fine")


@dataclass(frozen=True)
class Source:
    """What all fits of a file were measured on."""

    tables: tuple[str, ...]
    studies: tuple[str, ...]
    commits: tuple[str, ...]
    metric: str
    score: str
    """last or best: which validation of a run counts."""
    convention: str
    """How FLOPs are counted: six_n, six_p_and_attention or fine."""
    parameters: str
    """What the size is: without_embeddings or all."""
    settings: Mapping[str, Setting]
    """Other settings of the command that made it."""


@dataclass(frozen=True)
class Fit:
    """A law of one kind of run."""

    label: str
    """Value of the column that the runs were divided by; empty where they were not."""
    numbers: Mapping[str, Estimate]
    drawn: Floats
    """[resamples, numbers]"""
    goodness: Mapping[str, float]
    """How well the law describes its own runs."""
    num_runs: int
    flops_per_token: tuple[float, float] | None
    """Coefficient and exponent of the runs' own FLOPs per token, in the parameters; None where the
    tables do not say."""
    ranges: Mapping[str, tuple[float, float]]
    """Lowest and highest of what was measured: parameters, unique_tokens, epochs, tokens,
    training_flops, batch_tokens, learning_rate, loss."""
    points: tuple[Mapping[str, float], ...]
    """What the law goes through where that is not the runs themselves: optima."""
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> float:
        return self.numbers[name].value

    @property
    def theta(self) -> Floats:
        """[numbers], in the order of drawn."""
        return np.array([estimate.value for estimate in self.numbers.values()])


@dataclass(frozen=True)
class LawFile:
    """One law for every label whose runs fix one."""

    law: str
    by: str | None
    source: Source
    fits: tuple[Fit, ...]
    without_law: Mapping[str, str]
    """Label -> why its runs do not."""


def write_law(path: Path, file: LawFile) -> None:
    """Under a temporary name first; one resample per line."""
    marks = {f'"drawn {place}"': fit.drawn for place, fit in enumerate(file.fits)}
    fits = [
        {
            "label": fit.label,
            "numbers": {name: asdict(number) for name, number in fit.numbers.items()},
            "goodness": dict(fit.goodness),
            "num_runs": fit.num_runs,
            "flops_per_token": fit.flops_per_token and list(fit.flops_per_token),
            "ranges": {name: list(ends) for name, ends in fit.ranges.items()},
            "points": [dict(point) for point in fit.points],
            "notes": list(fit.notes),
            "drawn": f"drawn {place}",
        }
        for place, fit in enumerate(file.fits)
    ]
    content = {
        **{"format": FORMAT, "law": file.law, "by": file.by},
        **{"source": asdict(file.source), "without_law": dict(file.without_law), "fits": fits},
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    for mark, drawn in marks.items():
        lines = (f"[{', '.join(f'{value:.9g}' for value in row)}]" for row in drawn)
        text = text.replace(mark, "[\n" + ",\n".join(lines) + "]")
    write_whole(path, text + "\n")


def read_law(path: Path) -> LawFile:
    """Raises ValueError, which names the file and the key, for anything that is not as written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read the law ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file of `scaling fit`: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise ValueError(
            f"{path} is no law of this version: format is {found!r}, expected {FORMAT!r}; make it "
            "with `megatron-dlm scaling fit`"
        )
    reader = _Reader(path)
    reader.keys("", content, ("format", "law", "by", "source", "without_law", "fits"))
    law = content["law"]
    reader.require(law in NUMBERS, "law", law, f"one of {', '.join(NUMBERS)}")
    by = content["by"]
    reader.require(by is None or isinstance(by, str), "by", by, "a column or null")
    reader.require(isinstance(content["fits"], list) and content["fits"], "fits", "", "a list")
    fits = [
        reader.fit(f"fits[{place}]", value, NUMBERS[law])
        for place, value in enumerate(content["fits"])
    ]
    without_law = reader.reasons("without_law", content["without_law"])
    return LawFile(law, by, reader.source(content["source"]), tuple(fits), without_law)


class _Reader:
    """Checks values, and names the file and the key of one that is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def require(self, condition: object, key: str, value: object, expected: str) -> None:
        if not condition:
            raise ValueError(f"{self.path}: {key} is {value!r}; expected {expected}")

    def keys(self, key: str, value: Any, names: Sequence[str]) -> Mapping[str, Any]:
        self.require(isinstance(value, dict), key or "the file", value, "a mapping")
        prefix = f"{key}." if key else ""
        missing = [name for name in names if name not in value]
        unknown = [name for name in value if name not in names]
        if missing or unknown:
            fault = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown"
            raise ValueError(f"{self.path}: {prefix}{fault}; make the file anew with `scaling fit`")
        mapping: Mapping[str, Any] = value
        return mapping

    def number(self, key: str, value: Any) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        self.require(is_number and math.isfinite(value), key, value, "a finite number")
        return float(value)

    def texts(self, key: str, value: Any) -> tuple[str, ...]:
        is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
        self.require(is_list, key, value, "a list of texts")
        return tuple(value)

    def reasons(self, key: str, value: Any) -> dict[str, str]:
        is_mapping = isinstance(value, dict) and all(isinstance(w, str) for w in value.values())
        self.require(is_mapping, key, value, "a mapping of labels to reasons")
        return dict(value)

    def source(self, value: Any) -> Source:
        self.keys("source", value, [field.name for field in fields(Source)])
        for name in ("metric", "score", "convention", "parameters"):
            self.require(isinstance(value[name], str), f"source.{name}", value[name], "text")
        convention = value["convention"]
        expected = f"one of {', '.join(CONVENTIONS)}"
        self.require(convention in CONVENTIONS, "source.convention", convention, expected)
        settings = value["settings"]
        self.require(isinstance(settings, dict), "source.settings", settings, "a mapping")
        lists = {
            name: self.texts(f"source.{name}", value[name])
            for name in ("tables", "studies", "commits")
        }
        return Source(**{**value, **lists})

    def fit(self, key: str, value: Any, names: Sequence[str]) -> Fit:
        self.keys(key, value, [field.name for field in fields(Fit)])
        self.require(isinstance(value["label"], str), f"{key}.label", value["label"], "text")
        numbers = self.keys(f"{key}.numbers", value["numbers"], names)
        goodness, points = value["goodness"], value["points"]
        self.require(isinstance(goodness, dict), f"{key}.goodness", goodness, "a mapping")
        self.require(isinstance(points, list), f"{key}.points", points, "a list")
        num_runs = value["num_runs"]
        is_count = isinstance(num_runs, int) and num_runs > 0
        self.require(is_count, f"{key}.num_runs", num_runs, "a whole number above 0")
        return Fit(
            label=value["label"],
            numbers={n: self.estimate(f"{key}.numbers.{n}", numbers[n]) for n in names},
            drawn=self.drawn(f"{key}.drawn", value["drawn"], len(names)),
            goodness={
                name: self.number(f"{key}.goodness.{name}", item) for name, item in goodness.items()
            },
            num_runs=num_runs,
            flops_per_token=self.cost(f"{key}.flops_per_token", value["flops_per_token"]),
            ranges=self.ranges(f"{key}.ranges", value["ranges"]),
            points=tuple(points),
            notes=self.texts(f"{key}.notes", value["notes"]),
        )

    def cost(self, key: str, value: Any) -> tuple[float, float] | None:
        is_pair = value is None or (isinstance(value, list) and len(value) == 2)
        self.require(is_pair, key, value, "[coefficient, exponent] or null")
        return None if value is None else (self.number(key, value[0]), self.number(key, value[1]))

    def estimate(self, key: str, value: Any) -> Estimate:
        self.keys(key, value, ("value", "low", "high"))
        estimate = Estimate(
            *(self.number(f"{key}.{n}", value[n]) for n in ("value", "low", "high"))
        )
        self.require(estimate.low <= estimate.high, f"{key}.low", estimate.low, "at most its high")
        return estimate

    def drawn(self, key: str, value: Any, width: int) -> Floats:
        is_table = isinstance(value, list) and all(
            isinstance(row, list) and len(row) == width for row in value
        )
        self.require(is_table and value, key, "", f"a list of rows of {width} numbers")
        return np.array(
            [[self.number(f"{key}[{n}]", item) for item in row] for n, row in enumerate(value)]
        )

    def ranges(self, key: str, value: Any) -> dict[str, tuple[float, float]]:
        self.require(isinstance(value, dict), key, value, "a mapping")
        found = {}
        for name, ends in value.items():
            is_pair = isinstance(ends, list) and len(ends) == 2
            self.require(is_pair, f"{key}.{name}", ends, "[lowest, highest]")
            low, high = (self.number(f"{key}.{name}", end) for end in ends)
            self.require(low <= high, f"{key}.{name}", ends, "[lowest, highest]")
            found[name] = (low, high)
        return found
