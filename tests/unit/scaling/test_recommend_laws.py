"""Recommendations by files of laws: the best plan, repeated data, tuning laws, and the choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dlm import cli
from megatron_dlm.scaling.advice import Question, Recommendation
from megatron_dlm.scaling.bootstrap import Floats, intervals
from megatron_dlm.scaling.law_file import NUMBERS, Fit, LawFile, Source, write_law
from megatron_dlm.scaling.parametric_laws import LAWS
from megatron_dlm.scaling.published import BATCH_TOKENS, LEARNING_RATE
from megatron_dlm.scaling.recommend_choice import choose_fitted
from megatron_dlm.scaling.recommend_fitted import read_laws, recommend_fitted
from megatron_dlm.scaling.recommend_plans import Plans

Capture = pytest.CaptureFixture[str]
CONVENTION = "six_p_and_attention"
CHINCHILLA = (np.log(1.69), np.log(406.4), np.log(410.7), 0.34, 0.28)
OVERFITTED = (*CHINCHILLA, np.log(15.0), np.log(3e3), 0.5, 0.4, 1.5)
ISOFLOP = (0.15, 0.45, 6.7, 0.55, 0.02, 0.45, 60.0, -0.068)
"""Of FLOPs per token, tokens, parameters and loss."""
MEASURED = {
    "parameters": (1e6, 1e7),
    "tokens": (1e8, 1e10),
    "epochs": (1.0, 1.0),
    "training_flops": (1e17, 1e21),
    "batch_tokens": (1e4, 1e6),
}


def drawn_around(values: Sequence[float], *, spread: float = 0.002, count: int = 200) -> Floats:
    random = np.random.default_rng(0)
    return np.array(values) * (1 + spread * random.normal(size=(count, len(values))))


def write(
    path: Path,
    law: str,
    fits: Mapping[str, Sequence[float]],
    *,
    drawn: Floats | None = None,
    ranges: Mapping[str, tuple[float, float]] = MEASURED,
    settings: Mapping[str, str] | None = None,
    convention: str = CONVENTION,
    cost: tuple[float, float] = (6.6, 1.0),
) -> Path:
    """A file with one fit for every label."""
    source = Source(
        tables=("a.csv",),
        studies=("made_up",),
        commits=("abc1234",),
        metric="nelbo",
        score="last",
        convention=convention,
        parameters="without_embeddings",
        settings=settings or {},
    )
    made = []
    for label, values in fits.items():
        rows = drawn_around(values) if drawn is None else drawn
        made.append(
            Fit(
                label=label,
                numbers=dict(zip(NUMBERS[law], intervals(values, rows), strict=True)),
                drawn=rows,
                goodness={},
                num_runs=40,
                flops_per_token=cost,
                ranges=ranges,
                points=(),
                notes=(),
            )
        )
    write_law(path, LawFile(law, "objective", source, tuple(made), {}))
    return path


def ask(unique: float = 1e13, flops: float = 1e21) -> Question:
    return Question(unique, flops, CONVENTION, 2048)


def recommended(question: Question, *paths: Path) -> list[Recommendation]:
    return recommend_fitted(question, read_laws([str(path) for path in paths], question))


def plan(capsys: Capture, **flags: object) -> dict[str, Any]:
    """What the command answers."""
    words = ["scaling", "recommend", "--json", "true"]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(each) for each in values)]
    capsys.readouterr()
    assert cli.main(words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: Capture, **flags: object) -> str:
    words = ["scaling", "recommend"]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(each) for each in values)]
    capsys.readouterr()
    assert cli.main(words) == 2
    return capsys.readouterr().err


def test_a_best_size_far_from_the_measured_ones(tmp_path: Path) -> None:
    """By hand: alpha A / N^alpha = beta B / D^beta where a token costs 6.6 N."""
    path = write(tmp_path / "law.json", "chinchilla", {"masked": CHINCHILLA})
    (found,) = recommended(ask(), path)
    power = 1 / (0.34 + 0.28)
    best = (0.34 * 406.4 / (0.28 * 410.7)) ** power * (1e21 / 6.6) ** (0.28 * power)
    assert best > 100 * MEASURED["parameters"][1]
    sizes, tokens = found.numbers["parameters"], found.numbers["tokens"]
    assert sizes.value == pytest.approx(best, rel=0.003)
    assert tokens.value == pytest.approx(1e21 / 6.6 / best, rel=0.003)
    for advice in (sizes, tokens):
        assert advice.low is not None
        assert advice.high is not None
        assert advice.low < 0.99 * advice.value
        assert advice.high > 1.01 * advice.value
    assert sizes.decades == pytest.approx(np.log10(best / 1e7), rel=0.01)


@pytest.mark.parametrize("exponent", [0.9, 1.0, 1.1])
@pytest.mark.parametrize("flops", [1e14, 1e21, 1e28])
def test_the_best_plan_is_where_neither_size_nor_data_is_better(
    exponent: float, flops: float
) -> None:
    plans = Plans(flops, 1e30, (6.6, exponent))
    (best,), is_inside = plans.best(LAWS["chinchilla"](), np.array([CHINCHILLA]), may_stop=False)
    log_size, log_tokens = best[0], best[1] + best[2]
    assert is_inside.all()
    assert log_tokens + exponent * log_size == pytest.approx(np.log(flops / 6.6))
    of_size = 0.34 * 406.4 * np.exp(-0.34 * log_size)
    of_data = exponent * 0.28 * 410.7 * np.exp(-0.28 * log_tokens)
    assert of_size / of_data == pytest.approx(1, rel=0.003)


@pytest.mark.parametrize(("unique", "flops"), [(1e8, 1e20), (1e6, 1e24), (1e9, 1e17)])
def test_no_length_is_better_than_that_of_the_best_plan(unique: float, flops: float) -> None:
    """By all plans of a fine grid; in the second case 1e-4 of the FLOPs is of use, or less."""
    law, theta = LAWS["overfitted"](), np.array(OVERFITTED)
    (best,), is_inside = Plans(flops, unique, (6.6, 1.0)).best(law, theta[None], may_stop=True)
    assert is_inside.all()
    sizes, lengths = np.meshgrid(np.geomspace(1e2, 1e14, 600), np.geomspace(1, 1e9, 500))
    sizes, tokens = sizes.ravel(), unique * lengths.ravel() * (1e-3 if flops < 1e18 else 1)
    can_pay = 6.6 * sizes * tokens <= flops
    first = np.minimum(tokens, unique)
    grid = np.log(np.stack([sizes, first, tokens / first], axis=1)[can_pay])
    lowest = float(law.log_loss(theta, grid)[0].min())
    found = float(law.log_loss(theta, best[None])[0][0])
    assert found <= lowest + 1e-6
    assert found == pytest.approx(lowest, abs=2e-3)
    assert np.log(6.6) + best.sum() <= np.log(flops) + 1e-9


def test_resamples_without_a_best_size(tmp_path: Path) -> None:
    drawn = drawn_around(CHINCHILLA, count=100)
    path = write(tmp_path / "law.json", "chinchilla", {"masked": CHINCHILLA}, drawn=drawn)
    (without,) = recommended(ask(), path)
    drawn[:2, 3] = -0.1
    path = write(tmp_path / "law.json", "chinchilla", {"masked": CHINCHILLA}, drawn=drawn)
    (found,) = recommended(ask(), path)
    # A falling law has no best size below that of one token: the upper end moves by a few ranks.
    for name in ("parameters", "tokens"):
        ours, theirs = found.numbers[name], without.numbers[name]
        assert ours.low == pytest.approx(theirs.low, rel=0.05)
        assert ours.high == pytest.approx(theirs.high, rel=0.05)
    assert not found.notes
    drawn[:5, 3] = -0.1
    path = write(tmp_path / "law.json", "chinchilla", {"masked": CHINCHILLA}, drawn=drawn)
    (found,) = recommended(ask(), path)
    for name in ("parameters", "tokens"):
        assert found.numbers[name].low is None
        assert found.numbers[name].high is None
    assert found.notes == (
        "5% of the resamples have no best size: size and tokens have no interval",
    )
    assert found.numbers["loss"].low is not None


def test_what_recommends_no_size(tmp_path: Path) -> None:
    path = write(tmp_path / "law.json", "chinchilla", {"ar": CHINCHILLA}, cost=(6.6, -0.1))
    with pytest.raises(ValueError, match=r"law.json: a token costs 6.6 N\^-0.1 of 1e\+21 FLOPs"):
        recommended(ask(), path)
    without_data = (*CHINCHILLA[:2], -60.0, *CHINCHILLA[3:])  # the larger the better, up to 1 token
    path = write(tmp_path / "law.json", "chinchilla", {"ar": without_data})
    with pytest.raises(ValueError, match=r"law.json: the law of ar has no best size at 1e\+21"):
        recommended(ask(), path)


@pytest.mark.parametrize(("law", "values"), [("isoflop", ISOFLOP), ("chinchilla", CHINCHILLA)])
def test_laws_of_fresh_data_decide_nothing_on_repeated_data(
    law: str, values: Sequence[float], tmp_path: Path
) -> None:
    worse = list(values)
    worse[-2 if law == "isoflop" else 0] *= 1.1
    path = write(tmp_path / "law.json", law, {"ar": values, "masked": worse})
    both = recommended(ask(1e8), path)
    for found in both:
        epochs = found.numbers["epochs"].value
        assert epochs > 500
        assert "loss" not in found.numbers
        (note,) = found.notes
        assert note.startswith(f"no loss: the plan repeats the data {epochs:.3g} times and the law")
        assert "up to 1 epochs" in note
    choice = choose_fitted(both)
    assert choice is not None
    assert choice.objective is None
    assert "the plan of ar has" in choice.reasons[0]
    assert "measured on up to 1: its loss there decides nothing" in choice.reasons[1]
    fresh = recommended(ask(), path)
    assert all("loss" in each.numbers and not each.notes for each in fresh)


def test_a_law_of_repeated_data_is_trusted_as_far_as_it_was_measured(tmp_path: Path) -> None:
    repeated = (*CHINCHILLA, np.log(15.0))
    better = (np.log(1.5), *repeated[1:])
    fits = {"ar": repeated, "masked": better}
    for most, objective in ((1e4, "masked"), (20.0, None)):
        ranges = {**MEASURED, "epochs": (1.0, most)}
        path = write(tmp_path / "law.json", "repeated", fits, ranges=ranges)
        both = recommended(ask(1e8, 1e20), path)
        assert all(25 < each.numbers["epochs"].value < 1e4 for each in both)
        assert all("loss" in each.numbers for each in both)
        choice = choose_fitted(both)
        assert choice is not None
        assert choice.objective == objective


@pytest.mark.parametrize(
    ("factors", "objective"),
    [
        ({"ar": 1.0, "masked": 1.1}, None),
        ({"ar": 1.1, "masked": 1.0}, "masked"),
        ({"ar": 1.0, "masked": 1.0001}, None),
        ({"masked": 1.0, "uniform": 1.1}, "masked"),
        ({"ar_dropout": 1.0, "AR": 1.1}, "ar_dropout"),
        ({"masked": 1.0, "ar": 1.1, "uniform": 1.0001}, None),
        ({"arcsine": 1.0, "ar": 1.1}, "arcsine"),
    ],
)
def test_only_a_lower_bound_decides(
    factors: dict[str, float], objective: str | None, tmp_path: Path
) -> None:
    fits = {label: (*ISOFLOP[:6], 60.0 * factor, -0.068) for label, factor in factors.items()}
    drawn = drawn_around(ISOFLOP, spread=1e-5)
    path = tmp_path / "law.json"
    found = []
    for label, values in fits.items():
        rows = drawn * np.array(values) / np.array(ISOFLOP)
        found += recommended(ask(), write(path, "isoflop", {label: values}, drawn=rows))
    choice = choose_fitted(found)
    assert choice is not None
    assert choice.objective == objective
    has_both = any(name[:2].lower() == "ar" and name != "arcsine" for name in factors) and any(
        name in ("masked", "uniform", "arcsine") for name in factors
    )
    assert any("need not hold" in reason for reason in choice.reasons) == has_both


def test_own_rate_at_the_published_batch(tmp_path: Path, capsys: Capture) -> None:
    sizes = write(tmp_path / "sizes.json", "chinchilla", {"masked": CHINCHILLA})
    rate = write(tmp_path / "rate.json", "learning_rate", {"masked": (0.5, 0.25)})
    found = plan(capsys, unique_tokens=1e13, flops=1e20, laws=[sizes, rate])
    ours = {each["objective"]: each["numbers"] for each in found["recommendations"]}
    numbers = ours["masked"]
    batch = numbers["batch_tokens"]["value"]
    assert batch == pytest.approx(BATCH_TOKENS(numbers["tokens"]["value"]))
    assert numbers["learning_rate"]["value"] == pytest.approx(0.5 * batch**0.25)
    assert numbers["learning_rate"]["law"] == f"learning_rate of {rate}"
    assert numbers["learning_rate"]["low"] < 0.5 * batch**0.25 < numbers["learning_rate"]["high"]
    assert numbers["steps"]["value"] == pytest.approx(numbers["tokens"]["value"] / batch)
    # The file is of masks only.
    assert ours["uniform"]["learning_rate"]["law"].startswith("SBD")
    assert found["unused_laws"] == []


def test_own_batch_and_rate_at_published_sizes(tmp_path: Path, capsys: Capture) -> None:
    """One law of all runs, one with labels: its own label stands before the law of all."""
    batch = write(tmp_path / "batch.json", "batch", {"": (2e-3, 0.9), "ar": (1e-3, 0.9)})
    rate = write(tmp_path / "rate.json", "learning_rate", {"": (0.5, 0.25)})
    asked: dict[str, Any] = {"unique_tokens": 1e13, "flops": 1e20, "noise_type": "masked"}
    found = plan(capsys, **asked, laws=[batch, rate])
    assert [each["objective"] for each in found["recommendations"]] == ["ar", "masked"]
    for each, factor in zip(found["recommendations"], (1e-3, 2e-3), strict=True):
        numbers = each["numbers"]
        expected = factor * numbers["tokens"]["value"] ** 0.9
        assert numbers["batch_tokens"]["value"] == pytest.approx(expected)
        assert numbers["learning_rate"]["value"] == pytest.approx(0.5 * expected**0.25)
        assert each["is_published"]
        assert not any("carry" in note for note in each["notes"])
    without = plan(capsys, **asked)["recommendations"]
    rates = [each["numbers"]["learning_rate"]["value"] for each in without]
    assert rates == [LEARNING_RATE(each["numbers"]["batch_tokens"]["value"]) for each in without]
    assert ["carry" in " ".join(each["notes"]) for each in without] == [True, False]


def test_a_law_that_is_not_used_is_named(tmp_path: Path, capsys: Capture) -> None:
    batch = write(tmp_path / "batch.json", "batch", {"uniform": (2e-3, 0.9)})
    first = write(tmp_path / "first.json", "chinchilla", {"masked": CHINCHILLA})
    second = write(tmp_path / "second.json", "isoflop", {"masked": ISOFLOP})
    asked: dict[str, Any] = {"unique_tokens": 1e13, "flops": 1e20, "noise_type": "masked"}
    found = plan(capsys, **asked, laws=[batch, first, second])
    assert found["unused_laws"] == [
        f"batch of {batch}, of uniform, is not used: no plan of masked, ar needs it",
        f"chinchilla of {first}, of masked, is not used: isoflop of {second} stands before",
    ]
    words = [f"--{name}={value}" for name, value in asked.items()]
    assert cli.main(["scaling", "recommend", *words, "--laws", str(batch)]) == 0
    assert "is not used: no plan of ar, masked needs it" in capsys.readouterr().out


def test_laws_that_answer_the_same_question(tmp_path: Path, capsys: Capture) -> None:
    asked: dict[str, Any] = {"unique_tokens": 1e13, "flops": 1e20}
    for law, values in (("batch", (2e-3, 0.9)), ("isoflop", ISOFLOP)):
        paths = [write(tmp_path / f"{n}.json", law, {"": values}) for n in ("one", "two")]
        of_whom = "all runs" if law == "batch" else "made_up"
        message = f"two.json and {paths[0]} both have a law {law} of {of_whom}; give one of them"
        assert message in refused(capsys, **asked, laws=paths)
    # Laws of one objective each are told apart.
    for name in ("ar", "masked"):
        write(
            tmp_path / f"{name}.json", "isoflop", {"": ISOFLOP}, settings={"only.objective": name}
        )
    paths = [tmp_path / f"{name}.json" for name in ("ar", "masked")]
    assert [each.objective for each in recommended(ask(), *paths)] == ["ar", "masked"]


def test_no_size_under_a_convention_that_no_paper_has(tmp_path: Path, capsys: Capture) -> None:
    rate = write(tmp_path / "rate.json", "learning_rate", {"": (0.5, 0.25)})
    line = refused(capsys, unique_tokens=1e13, flops=1e20, laws=rate, convention="fine")
    assert "rate.json recommends a size, and no paper counts FLOPs as fine does; give a law" in line


@pytest.mark.parametrize("name", ["flops", "unique_tokens"])
def test_numbers_without_end(name: str, capsys: Capture) -> None:
    asked = {"flops": "1e20", "unique_tokens": "1e9", name: "1e400"}
    assert f"{name} is inf; give a finite number" in refused(capsys, **asked)


@pytest.mark.parametrize(("unique", "flops"), [(1, 1), (1e9, 1e300), (1e-9, 1e20), (1e300, 1e20)])
def test_extreme_questions_are_answered_without_numbers(
    unique: float, flops: float, tmp_path: Path, capsys: Capture
) -> None:
    law = write(tmp_path / "law.json", "isoflop", {"ours": ISOFLOP})
    found = plan(capsys, unique_tokens=unique, flops=flops, laws=law)
    for each in found["recommendations"]:
        numbers = {name: advice["value"] for name, advice in each["numbers"].items()}
        assert all(advice["decades"] <= 5 for advice in each["numbers"].values())
        for count in ("parameters", "tokens", "batch_tokens", "steps"):
            assert numbers.get(count, 1) >= 1
        if flops == 1 or (flops == 1e300 and each["objective"] in ("ar", "ours")):
            assert numbers == {}
            assert any("decades from what was measured" in note for note in each["notes"])
