"""`figures:` of a study file: what is read, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from study_runs import CROSSOVER, LINES, write_study

from megatron_dlm import cli
from megatron_dlm.scaling.figures import kinds
from megatron_dlm.scaling.figures.crossover_spec import CrossoverSpec
from megatron_dlm.scaling.figures.curves import CurvesSpec
from megatron_dlm.scaling.figures.default import default_figures
from megatron_dlm.scaling.figures.kinds import parse_figures
from megatron_dlm.scaling.study import Study, read_study


def test_keys_and_defaults(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, LINES + CROSSOVER))
    (name, spec), *others = study.figures.items()
    assert (name, others) == ("crossover", [])
    assert spec == CrossoverSpec(axis="objective", first="ar", second="masked", x="tokens")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("crossover: {kind", "a/b: {kind"), "figures has the name 'a/b'; names become files"),
        (("kind: crossover", "kind: crosover"), "unknown kind crosover; did you mean crossover?"),
        (("kind: crossover", "kind: [1]"), "unknown kind [1] (have: crossover, curves, "),
        (("kind: crossover, ", ""), "expected kind: and its keys; kinds are crossover"),
        (("x: tokens", "axes: tokens"), "kind crossover has no key axes; did you mean axis?"),
        (("x: tokens", "x: hours"), "x is 'hours'; expected one of epoch, tokens"),
        (("x: tokens", "smoothing: wide"), "smoothing is 'wide'; expected a number"),
        (("x: tokens", "smoothing: -1"), "smoothing is -1.0; it must be at least 0"),
        (("x: tokens", "resamples: 2.5"), "resamples is 2.5; expected an integer"),
        (("x: tokens", "resamples: true"), "resamples is True; expected an integer"),
        (("axis: objective, ", ""), "axis is missing; expected text"),
        (("axis: objective", "axis: objectiv"), "axis objectiv is no axis of lines; did you mean"),
        (("second: masked", "second: block"), "second block is no label of objective (have: ar, "),
        (("second: masked", "second: ar"), "first and second are both ar; compare two labels"),
        (("x: tokens", "seeds: objective"), "axis and seeds are both objective; name two axes"),
        (("x: tokens", "seeds: lr"), "seeds lr is no axis of lines"),
    ],
)
def test_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    message: str,
) -> None:
    path = write_study(tmp_path, LINES + CROSSOVER.replace(*change))
    flags = ["--study", str(path), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["study", "plan", *flags]) == 2  # long before there is anything to draw
    error = capsys.readouterr().err
    place = f"{path}: figures" + ("" if "a/b" in message else ".crossover: ")
    assert place in error
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("declared", ["[a, b]", "3", "yes"])
def test_figures_are_a_mapping(tmp_path: Path, declared: str) -> None:
    with pytest.raises(ValueError, match=r"study\.yaml: figures is .*; expected names"):
        read_study(write_study(tmp_path, LINES + f"figures: {declared}\n"))


@dataclass(frozen=True)
class EveryType:
    """A kind with a key of every type."""

    number: float = 0.0
    either: int | tuple[float, ...] = 3
    names: tuple[str, ...] = ()
    only: Mapping[str, tuple[str, ...]] | None = None
    scale: Literal["linear", "log"] = "linear"
    flag: bool = False

    def check(self, study: Study) -> None:
        """Nothing."""


@pytest.fixture(name="parsed")
def _parsed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(kinds.KINDS, "every", (EveryType, lambda *_: None))
    study = Study(name="s", question="", axes=(), runs=())

    def parsed(text: str) -> Any:
        declared = {"one": {"kind": "every", **yaml.safe_load(text)}}
        return parse_figures(Path("s.yaml"), declared, study)["one"]

    return parsed


def test_every_type_of_key(parsed: Any) -> None:
    found = parsed("{number: 1e-3, either: 5, names: a, only: {x: [b, c], y: d}, flag: true}")
    assert found == EveryType(
        number=0.001, either=5, names=("a",), only={"x": ("b", "c"), "y": ("d",)}, flag=True
    )
    assert parsed("{number: 2, either: [1, 2.5], names: [a, b], only: null}") == EveryType(
        number=2.0, either=(1.0, 2.5), names=("a", "b")
    )
    assert isinstance(parsed("{number: 2}").number, float)
    assert isinstance(parsed("{either: 5}").either, int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{number: many}", "number is 'many'; expected a number"),
        ("{number: [1]}", "number is [1]; expected a number"),
        ("{either: [a]}", "either is ['a']; expected an integer or a list, each item a number"),
        ("{names: [1]}", "names is [1]; expected a list, each item text"),
        ("{only: [a]}", "only is ['a']; expected a mapping of text to a list, each item text"),
        ("{only: {a: [3]}}", "only is {'a': [3]}; expected a mapping"),
        ("{scale: square}", "scale is 'square'; expected one of linear, log"),
        ("{flag: 1}", "flag is 1; expected true or false"),
        ("{scale: null}", "scale is None; expected one of linear, log"),
    ],
)
def test_every_type_refuses(parsed: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^s\.yaml: figures\.one: ") as caught:
        parsed(text)
    assert message in str(caught.value)


def test_axes_that_would_hide_columns_are_refused(tmp_path: Path) -> None:
    for name in ("tokens", "commit", "a.b", "2"):
        with pytest.raises(ValueError, match=r"study\.yaml: axes has the name .*; axes become"):
            read_study(write_study(tmp_path, LINES.replace("unique:", f"{name}:")))


def test_a_study_without_figures_has_its_curves(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, LINES))
    assert study.figures == {}
    assert default_figures(study) == {"curves": CurvesSpec(lines="objective", panels="unique")}
    more = LINES.replace(" seed:", " size:")
    assert default_figures(read_study(write_study(tmp_path, more))) == {}
