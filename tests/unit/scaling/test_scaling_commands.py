"""`scaling fit`, `recommend` and `flops` as a user runs them, from a tidy table to a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scaling_command import Capture, refused, scaling
from scaling_tables import chinchilla, reports, size_study, write_table

from megatron_dlm import cli
from megatron_dlm.scaling.advice import Question
from megatron_dlm.scaling.law_file import read_law
from megatron_dlm.scaling.published import BATCH_TOKENS, LEARNING_RATE
from megatron_dlm.scaling.recommend_fitted import read_laws, recommend_fitted
from megatron_dlm.scaling.recommend_tuning import tuned


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("tables") / "sizes.csv", size_study())


def test_isoflop_to_a_plan(sizes: Path, tmp_path: Path, capsys: Capture) -> None:
    law = tmp_path / "laws" / "isoflop.json"
    flags: dict[str, Any] = {"by": "objective", "resamples": 200, "output": law}
    assert scaling("fit", results=sizes, law="isoflop", **flags) == 0
    shown = capsys.readouterr().out
    assert "flops_per_token_exponent" in shown
    assert shown.splitlines()[-1] == str(law)
    file = read_law(law)
    assert [fit.label for fit in file.fits] == ["ar", "masked"]
    assert file.source.studies == ("made_up",)
    assert file.source.commits == ("abc1234",)
    for fit in file.fits:
        # Of L = E + A / N^0.34 + B / D^0.28 the best size grows as compute^(0.28 / 0.62).
        exponent = fit.numbers["flops_per_token_exponent"]
        assert exponent.low < 0.28 / 0.62 + 0.06
        assert exponent.high > 0.28 / 0.62 - 0.06
        assert fit["flops_per_token_exponent"] + fit["tokens_exponent"] == pytest.approx(1)
        # A token costs 6.6 FLOPs per parameter in these tables.
        assert fit["parameters_exponent"] == pytest.approx(exponent.value, rel=1e-6)
        assert fit.flops_per_token == pytest.approx((6.6, 1.0))
        assert fit.ranges["parameters"] == pytest.approx((1e7, 1e9))
    capsys.readouterr()
    answer = tmp_path / "plan.json"
    asked: dict[str, Any] = {"unique_tokens": 1e12, "flops": 1e19, "laws": law}
    assert scaling("recommend", **asked, noise_type="masked", output=answer) == 0
    shown = capsys.readouterr().out
    assert "objective: ar" in shown
    assert "isoflop.json" in shown
    found = json.loads(answer.read_text())
    ours = {each["objective"]: each for each in found["recommendations"]}
    assert set(ours) == {"ar", "masked"}
    numbers = ours["ar"]["numbers"]
    assert numbers["flops_per_token"]["value"] * numbers["tokens"]["value"] == pytest.approx(1e19)
    best = min(chinchilla(n, 1e19 / (6.6 * n), 1) for n in np.geomspace(1e7, 1e10, 500))
    assert numbers["loss"]["value"] == pytest.approx(best, rel=0.01)
    assert numbers["loss"]["low"] < numbers["loss"]["value"] < numbers["loss"]["high"]
    assert numbers["batch_tokens"]["law"].startswith("SBD")
    # Own laws: AR is below a bound only, which proves nothing. Published: the data are fresh.
    assert [choice["objective"] for choice in found["choices"]] == [None, "ar"]


def data_study(loss: Callable[..., float]) -> list[dict[str, Any]]:
    rows = []
    random = np.random.default_rng(0)
    for place in range(40):
        parameters, unique = 10 ** random.uniform(6, 9), 10 ** random.uniform(7, 9)
        tokens = unique * 10 ** random.uniform(0.2, 2.6)
        rows += reports(
            f"run_{place}",
            **{"parameters": float(parameters), "unique_tokens": float(unique)},
            tokens=float(tokens),
            loss=loss,
            noise=0.001,
            seed=place,
            num_reports=4,
        )
    return rows


def overfitting(parameters: float, unique_tokens: float, epochs: float) -> float:
    harm = epochs * parameters**0.5 / (3e3 * unique_tokens**0.4)
    worth = unique_tokens * (1 + 15 * (1 - np.exp(-(epochs - 1) / 15)))
    return chinchilla(parameters, worth, 1) + float(harm) ** 1.5


def test_a_law_that_turns_up_again_spends_less(tmp_path: Path, capsys: Capture) -> None:
    table = write_table(tmp_path / "data.csv", data_study(overfitting))
    law = tmp_path / "law.json"
    assert scaling("fit", results=table, law="overfitted", output=law, resamples=100) == 0
    fit = read_law(law).fits[0]
    assert fit.goodness["median_relative_error"] < 0.003
    question = Question(1e8, 1e20, "six_p_and_attention", 2048)
    (found,) = recommend_fitted(question, read_laws([str(law)], question))
    numbers = {name: advice.value for name, advice in found.numbers.items()}
    used = numbers["flops_per_token"] * numbers["tokens"]
    assert used < 1e20
    assert any("the loss rises again" in note for note in found.notes)
    # No other plan within the FLOPs is better by the truth that made the runs.
    grid = [
        overfitting(n, 1e8, e)
        for n in np.geomspace(1e6, 1e10, 60)
        for e in np.geomspace(1, min(1e20 / (6.6 * n * 1e8), 1e5), 60)
    ]
    true = overfitting(numbers["parameters"], 1e8, numbers["epochs"])
    assert true < min(grid) * 1.01
    assert numbers["loss"] == pytest.approx(min(grid), rel=0.02)
    capsys.readouterr()
    assert scaling("recommend", unique_tokens=1e8, flops=1e20, laws=law, json="true") == 0
    shown = json.loads(capsys.readouterr().out)["recommendations"][0]["numbers"]
    assert shown["loss"]["value"] == numbers["loss"]


def grid_study() -> list[dict[str, Any]]:
    """Losses with their best learning rate and batch size where SBD has them."""
    rows = []
    for batch in 2.0 ** np.arange(14, 21):
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
            rate = float(LEARNING_RATE(batch) * factor)

            def loss(
                _: float, unique: float, epochs: float, *, b: float = batch, f: float = factor
            ) -> float:
                tokens = unique * epochs
                gap = np.log(b / BATCH_TOKENS(tokens)) ** 2 + 2 * np.log(f) ** 2
                return float(2 + (tokens * np.exp(-0.03 * gap) / 1e8) ** -0.2)

            rows += reports(
                f"b{batch:.0f}_f{factor}",
                **{"parameters": 1e8, "unique_tokens": 1e12, "tokens": 2e10},
                loss=loss,
                noise=0.0005,
                seed=int(batch * factor),
                num_reports=60,
                batch_tokens=float(batch),
                **{"optimizer.lr": rate},
            )
    return rows


def test_batch_and_rate_of_a_grid(tmp_path: Path, sizes: Path, capsys: Capture) -> None:
    table = write_table(tmp_path / "grid.csv", grid_study())
    batch, rate, size = (tmp_path / f"{name}.json" for name in ("batch", "rate", "size"))
    assert scaling("fit", results=table, law="batch", output=batch) == 0
    assert scaling("fit", results=table, law="learning_rate", output=rate) == 0
    assert scaling("fit", results=sizes, law="isoflop", output=size, resamples=100, **AR) == 0
    assert read_law(batch).source.settings["num_levels"] == 5
    assert read_law(batch).fits[0]["exponent"] == pytest.approx(BATCH_TOKENS.exponent, abs=0.1)
    fit = read_law(rate).fits[0]
    assert fit["exponent"] == pytest.approx(LEARNING_RATE.exponent, abs=0.02)
    interval = fit.numbers["exponent"]
    assert interval.low < LEARNING_RATE.exponent + 0.01
    assert interval.high > LEARNING_RATE.exponent - 0.01
    question = Question(1e12, 1e19, "six_p_and_attention", 2048)
    laws = read_laws([str(size), str(batch), str(rate)], question)
    (sizes_only,) = recommend_fitted(question, laws)
    found = tuned(sizes_only, laws)
    tokens, best = found.numbers["tokens"].value, found.numbers["batch_tokens"].value
    assert best == pytest.approx(BATCH_TOKENS(tokens), rel=0.3)
    assert found.numbers["steps"].value == pytest.approx(tokens / best)
    assert found.numbers["learning_rate"].value == pytest.approx(LEARNING_RATE(best), rel=0.05)
    assert found.numbers["learning_rate"].low is not None
    capsys.readouterr()


AR = {"only.objective": "ar"}


def test_only_runs_with_uncommitted_changes(tmp_path: Path) -> None:
    rows = [dict(row, uncommitted_changes=row["objective"] == "ar") for row in size_study()]
    table, law = write_table(tmp_path / "table.csv", rows), tmp_path / "law.json"
    flags: dict[str, Any] = {"results": table, "law": "power", "x": "num_parameters"}
    only = {"only.uncommitted_changes": "true"}
    assert scaling("fit", **flags, output=law, resamples=100, **only) == 0
    file = read_law(law)
    assert file.fits[0].num_runs == 7
    assert file.source.settings["uncommitted_changes"] is True


def test_power_law_and_tables_together(sizes: Path, tmp_path: Path) -> None:
    rows = [
        dict(row, study="second", run=f"{row['run']}_again", nelbo=row["nelbo"] * 1.001)
        for row in size_study()
    ]
    second, law = write_table(tmp_path / "second.csv", rows), tmp_path / "law.json"
    flags: dict[str, Any] = {"results": [sizes, second], "x": "num_parameters", "y": "tokens"}
    assert scaling("fit", law="power", output=law, **flags, **AR) == 0
    fit = read_law(law).fits[0]
    assert fit.num_runs == 14
    # Every run has the same compute.
    assert fit["exponent"] == pytest.approx(-1, abs=1e-3)
    assert read_law(law).source.studies == ("made_up", "second")
    flags = {"unique_tokens": 1e9, "flops": 1e20, "laws": law}
    assert scaling("recommend", **flags) == 2


def test_what_a_fit_refuses(sizes: Path, tmp_path: Path, capsys: Capture) -> None:
    law = tmp_path / "law.json"

    def message(**flags: object) -> str:
        own = {} if "by" in flags else AR
        chosen = {"results": sizes, "law": "chinchilla", "output": law, **own, **flags}
        return refused(capsys, "fit", **chosen)

    assert "no.csv does not exist; make it with" in message(results=tmp_path / "no.csv")
    assert "law is kaplan" in message(law="kaplan").replace('"', "")
    assert "law.txt; a law is a file .json" in message(output=tmp_path / "law.txt")
    assert "no row has a value of noise" in message(by="noise")
    assert "no row has a value of accuracy" in message(metric="accuracy")
    assert "only.objective is block, which no run has; have: ar, m" in message(
        **{"only.objective": "block"}
    )
    assert "objective ar: 7 runs cannot fix the 10 numbers" in message(
        law="overfitted", by="objective"
    )
    assert "law repeated; fit chinchilla" in message(law="repeated", results=fresh(tmp_path))
    assert "has no optimizer.lr; the study needs an axis" in message(law="learning_rate")
    assert "power needs x" in message(law="power")
    assert "budgets has -1; a budget must be greater" in message(law="isoflop", budgets=-1)
    both = {"results": sizes, "law": "isoflop", "output": law}
    assert "runs are of objective ar and masked, which share no law of the loss" in refused(
        capsys, "fit", **both
    )
    assert "x is tokens, but the law chinchilla does not use it" in message(x="tokens")
    assert "resamples is 10; an interval needs 100 or more" in message(resamples=10)
    assert "weighting is precision, but the law chinch" in message(weighting="precision")
    assert "num_levels is 7, but the law chinchilla does not use it; only b" in message(
        num_levels=7
    )
    assert "num_budgets is 3, but the law chinchilla does not use" in message(num_budgets=3)
    assert "num_budgets is 3, but budgets names them" in message(
        law="isoflop", num_budgets=3, budgets=[1e18, 1e19]
    )
    assert not law.exists()


def test_a_label_without_a_law_does_not_cost_the_others_theirs(
    tmp_path: Path, capsys: Capture
) -> None:
    rows = size_study()
    kept = dict.fromkeys(row["run"] for row in rows if row["objective"] == "masked")
    few = [row for row in rows if row["objective"] == "ar" or row["run"] in list(kept)[:2]]
    table, law = write_table(tmp_path / "few.csv", few), tmp_path / "law.json"
    flags: dict[str, Any] = {"results": table, "law": "isoflop", "budgets": [1e18, 3e18]}
    line = refused(capsys, "fit", **flags, by="objective", resamples=100, output=law)
    assert "law.json holds the others and no law of objective masked: " in line
    file = read_law(law)
    assert [fit.label for fit in file.fits] == ["ar"]
    assert line.endswith(f"masked: {file.without_law['masked']}")
    answer = tmp_path / "plan.json"
    asked: dict[str, Any] = {"unique_tokens": 1e12, "flops": 1e19, "laws": law, "output": answer}
    assert scaling("recommend", **asked) == 0
    assert f"masked: no law in {law}" in " ".join(capsys.readouterr().out.split())
    (missing,) = json.loads(answer.read_text())["without_law"]
    assert missing == f"masked: no law in {law} ({file.without_law['masked']})"


def fresh(folder: Path) -> Path:
    rows = [dict(row, unique_tokens=int(1e15)) for row in size_study()]
    return write_table(folder / "fresh.csv", rows)


def test_columns_that_an_old_table_lacks(tmp_path: Path, capsys: Capture) -> None:
    lacking = ("num_parameters_without_embeddings", "flops_per_token_six_p_and_attention")
    rows = [{k: v for k, v in row.items() if k not in lacking} for row in size_study()]
    table, law = write_table(tmp_path / "old.csv", rows), tmp_path / "law.json"
    flags: dict[str, Any] = {"results": table, "law": "isoflop", "output": law, "resamples": 100}
    flags |= AR
    assert "or fit with --convention fine" in refused(capsys, "fit", **flags)
    flags["convention"] = "fine"
    assert "or fit with --parameters all" in refused(capsys, "fit", **flags)
    assert scaling("fit", **flags, parameters="all") == 0
    asked: dict[str, Any] = {"unique_tokens": 1e12, "flops": 1e20, "laws": law}
    line = refused(capsys, "recommend", **asked)
    assert "law.json counts FLOPs as fine, and --flops as six_p_and_attention; give --conv" in line
    assert scaling("recommend", **asked, convention="fine") == 0
    shown = capsys.readouterr().out
    assert "Chinchilla" not in shown.partition("Assumed")[0]


def test_runs_that_fix_nothing_say_so(sizes: Path, tmp_path: Path, capsys: Capture) -> None:
    """All runs of one compute: size and tokens move together, and the law may even turn round."""
    law = tmp_path / "law.json"
    flags: dict[str, Any] = {"results": sizes, "output": law, "resamples": 200, **AR}
    assert scaling("fit", law="chinchilla", **flags) == 0
    assert "vary parameters and tokens apart" in capsys.readouterr().out
    content = json.loads(law.read_text())
    content["fits"][0]["numbers"]["alpha"].update(value=-0.1, low=-1)
    law.write_text(json.dumps(content))
    line = refused(capsys, "recommend", unique_tokens=1e12, flops=1e20, laws=law)
    assert "does not fall with size and data" in line


def test_what_a_recommendation_refuses(capsys: Capture) -> None:
    def message(**flags: object) -> str:
        return refused(capsys, "recommend", **{"unique_tokens": 1e9, "flops": 1e20, **flags})

    assert "flops is 0; it must be greater than 0" in message(flops=0)
    assert "unique_tokens is -1; it must be greater" in message(unique_tokens=-1)
    assert "no published law counts FLOPs as fine does" in message(convention="fine")
    assert "cannot read the law" in message(laws="nothing.json")
    assert "expected" in message(noise_type="pink")


def test_flops_of_a_run(tmp_path: Path, capsys: Capture) -> None:
    report = tmp_path / "flops.json"
    words = ["scaling", "flops", "--config", "preset:sdl_1b", "--objective.kind", "masked"]
    words += ["--train.tokens", "96000000000", "--gpu_watts", "1000", "--output", str(report)]
    words += ["--new_tokens", "16", "4096", "--num_steps", "64"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "4,708" in shown
    found = json.loads(report.read_text())
    per_token, run = found["training_flops_per_token"], found["training"]
    for name in ("six_n", "six_p_and_attention", "fine"):
        assert run["flops"][name] == per_token[name] * run["tokens"]
    assert run["gpu_hours"] == pytest.approx(run["flops"]["fine"] / (989e12 * 0.4 * 3600))
    assert run["kilowatt_hours"] == pytest.approx(run["gpu_hours"])
    ratios = {
        (each["new_tokens"], each["num_steps"]): each["ratio"] for each in found["generation"]
    }
    assert ratios[16, 16] == pytest.approx(16, rel=0.02)
    assert ratios[4096, 4096] == pytest.approx(4700, rel=0.02)
    assert ratios[4096, 64] == pytest.approx(ratios[4096, 4096] / 64)
    words = ["scaling", "flops", "--config", "preset:sdl_1b", "--train.steps", "null"]
    assert cli.main(words) == 0
    assert "length unknown" in capsys.readouterr().out
    assert "new_tokens has 0" in refused(capsys, "flops", config="preset:sdl_1b", new_tokens=0)


@pytest.mark.parametrize("command", ["fit", "recommend", "flops"])
def test_help(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["scaling", command, "--help"])
    assert f"megatron-dlm scaling {command}" in capsys.readouterr().out
