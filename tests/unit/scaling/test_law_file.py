"""The file of a law: what is written is read, and what is not as written is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dlm.scaling.bootstrap import Estimate
from megatron_dlm.scaling.law_file import NUMBERS, Fit, LawFile, Source, read_law, write_law


def a_law(law: str = "batch") -> LawFile:
    source = Source(
        tables=("a.csv", "b.csv"),
        studies=("grid",),
        commits=("abc",),
        metric="nelbo",
        score="last",
        convention="six_p_and_attention",
        parameters="without_embeddings",
        settings={"resamples": 3, "weighting": "equal", "uncommitted_changes": False, "x": None},
    )
    random = np.random.default_rng(0)
    names = NUMBERS[law]
    fits = [
        Fit(
            label=label,
            numbers={name: Estimate(1.5, 1.25, 2.0) for name in names},
            drawn=random.normal(size=(3, len(names))).round(6),
            goodness={"r_squared": 0.9},
            num_runs=12,
            flops_per_token=cost,
            ranges={"tokens": (1e8, 1e9)},
            points=({"tokens": 2e8, "batch_tokens": 3e4},),
            notes=("a note",),
        )
        for label, cost in (("ar", (6.6, 1.0)), ("masked", None))
    ]
    return LawFile(law, "objective", source, tuple(fits), {"block": "3 runs are too few"})


@pytest.mark.parametrize("law", NUMBERS)
def test_what_is_written_is_read(law: str, tmp_path: Path) -> None:
    file = a_law(law)
    write_law(tmp_path / "law.json", file)
    found = read_law(tmp_path / "law.json")
    for name in ("law", "by", "source", "without_law"):
        assert getattr(found, name) == getattr(file, name), name
    for ours, theirs in zip(found.fits, file.fits, strict=True):
        np.testing.assert_array_equal(ours.drawn, theirs.drawn)
        for name in ("label", "numbers", "goodness", "num_runs", "flops_per_token", "ranges"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert (ours.points, ours.notes) == (theirs.points, theirs.notes)
        assert ours[NUMBERS[law][0]] == 1.5
    assert [path.name for path in tmp_path.iterdir()] == ["law.json"]


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    write_law(path, a_law())
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "format is 'other', expected 'megatron_dlm scaling"),
        (lambda c: c.update(law="kaplan"), "law is 'kaplan'; expected one of isoflop"),
        (lambda c: c.pop("source"), "source is missing; make the file anew"),
        (lambda c: c.update(more=1), "more is unknown"),
        (lambda c: c.update(without_law={"a": 1}), "expected a mapping of labels to reasons"),
        (lambda c: c.update(fits=[]), "fits is ''; expected a list"),
        (lambda c: c["source"].update(convention="7ND"), "source.convention is '7ND'; expected"),
        (lambda c: c["source"].update(tables="a.csv"), "source.tables is 'a.csv'; expected a list"),
        (lambda c: c["fits"][1].pop("ranges"), r"fits\[1\].ranges is missing"),
        (lambda c: c["fits"][0].update(num_runs=0), r"fits\[0\].num_runs is 0; expected a whole"),
        (
            lambda c: c["fits"][0]["numbers"].pop("exponent"),
            r"fits\[0\].numbers.exponent is missing",
        ),
        (
            lambda c: c["fits"][0]["numbers"]["exponent"].update(value="x"),
            r"fits\[0\].numbers.exponent.value is 'x'; expected a finite number",
        ),
        (
            lambda c: c["fits"][0]["numbers"]["exponent"].update(low=9),
            r"fits\[0\].numbers.exponent.low is 9.0; expected at most its high",
        ),
        (lambda c: c["fits"][0]["drawn"][1].pop(), r"fits\[0\].drawn .* rows of 2 numbers"),
        (lambda c: c["fits"][0]["drawn"].clear(), r"fits\[0\].drawn .* rows of 2 numbers"),
        (
            lambda c: c["fits"][0]["drawn"][0].__setitem__(0, float("nan")),
            r"fits\[0\].drawn\[0\] is nan; expected a finite number",
        ),
        (
            lambda c: c["fits"][0]["ranges"].update(tokens=[2, 1]),
            r"fits\[0\].ranges.tokens is \[2, 1\]; expected \[lowest, highest\]",
        ),
        (
            lambda c: c["fits"][0].update(flops_per_token=[6.0]),
            r"\[coefficient, exponent\] or null",
        ),
    ],
)
def test_what_is_wrong_is_named(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    path = changed(tmp_path / "law.json", change)
    with pytest.raises(ValueError, match=message) as caught:
        read_law(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the law"),
        (b"{", "is no JSON file of `scaling fit`"),
        (b"\xff\xfe", "is no JSON file of `scaling fit`"),
        (b"[" * 100_000, "is no JSON file of `scaling fit`"),
        (b"[1]", "format is None"),
    ],
)
def test_other_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_law(path)
