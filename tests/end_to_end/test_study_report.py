"""`study report`: what the page and the files beside it hold, and what is refused."""

from __future__ import annotations

import base64
import csv
import json
import re
from pathlib import Path

import pytest
from study_runs import CROSSOVER, LINES, write_runs, write_study

from megatron_dlm import cli
from megatron_dlm.scaling.figures import kinds
from megatron_dlm.training.status import write_status

TWO_FIGURES = CROSSOVER + "  curves: {kind: curves, lines: objective, panels: unique}\n"


@pytest.fixture(name="study")
def _study(tmp_path: Path) -> Path:
    """A study whose runs are finished; its folder is `out` beside it."""
    path = write_study(tmp_path, LINES + TWO_FIGURES)
    write_runs(path, tmp_path / "out")
    return path


def report(study: Path, *flags: str) -> int:
    place = ["--study", str(study), "--output_dir", str(study.parent / "out")]
    return cli.main(["study", "report", *place, *flags])


def page(study: Path) -> str:
    return (study.parent / "out" / "index.html").read_text(encoding="utf-8")


def test_the_page_and_the_files_beside_it(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = study.parent / "out"
    (out / "runs" / "ar_u1_s1" / "report.html").write_text("its own report")
    assert report(study) == 0
    told = capsys.readouterr().out
    assert "masked below ar: validation loss [nats per token]" in told
    assert "index.html: 2 figures; open it in a browser" in told
    html = page(study)
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    assert [base64.b64decode(picture) for picture in pictures] == [
        (out / f"{name}.svg").read_bytes() for name in ("crossover", "curves")
    ]
    links = re.findall(r'href="([^"]+)"', html)
    assert {"crossover.png", "curves.csv", "runs/ar_u1_s1", "runs/ar_u1_s1/report.html"} < {*links}
    for link in links:
        assert (out / link).exists(), link
    assert "Where do straight lines cross?" in html
    assert "8 of 8 runs have reported, 320 rows" in html
    assert "0123456789ab (8 runs)" in html
    assert f"megatron-dlm study run --study {study} --output_dir {out}\n" in html
    assert "1,800 to 2,200" in html
    assert "warnings" not in html.partition("</style>")[2]
    with (out / "crossover.csv").open(newline="") as file:
        assert [row["outcome"] for row in csv.DictReader(file)] == ["crosses", "not yet"]
    assert not list(out.glob(".*"))


def test_from_the_table_alone(study: Path, tmp_path: Path) -> None:
    """The same figures, wherever the runs are; the page links to none of them."""
    assert report(study) == 0
    elsewhere = tmp_path / "docs" / "lines"
    table = tmp_path / "out" / "results.csv"
    flags = ["--study", str(study), "--output_dir", str(elsewhere), "--results", str(table)]
    assert cli.main(["study", "report", *flags]) == 0
    for name in ("crossover.svg", "crossover.csv", "curves.png", "curves.csv"):
        assert (elsewhere / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    html = (elsewhere / "index.html").read_text(encoding="utf-8")
    assert 'href="runs/' not in html
    assert f"--results {table}" in html
    assert "8 of 8 runs have reported" in html


def test_doubts_are_at_the_top(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = study.parent / "out" / "runs"
    facts = json.loads((runs / "ar_u1_s1" / "run.json").read_text())
    (runs / "ar_u1_s1" / "run.json").write_text(json.dumps({**facts, "uncommitted_changes": True}))
    write_status(runs / "ar_u2_s1", "failed", 40, "<b>out of memory</b>")
    write_status(runs / "ar_u1_s2", "running", 0)  # and no process has the folder
    (runs / "masked_u2_s2" / "metrics.jsonl").unlink()
    (runs / "masked_u1_s1" / "config.yaml").unlink()
    assert report(study) == 0
    html = page(study)
    (warnings,) = re.findall(r'<ul class="warnings" role="note">(.*?)</ul>', html)
    assert re.findall("<li>(.*?)</li>", warnings) == [
        "masked_u1_s1: cannot read config.yaml; its columns are empty",
        "1 of 8 runs have not reported: masked_u2_s2",
        "2 runs are not finished: ar_u1_s2, ar_u2_s1",
        "the runs were made from 2 states of the code (see below)",
    ]
    assert "0123456789ab with uncommitted changes (1 runs)" in html
    assert "failed: &lt;b&gt;out of memory" in html
    assert '<span class="state-failed">killed: it ended without a word' in html
    assert "<b>out" not in html
    told = capsys.readouterr().out
    assert "warning: masked_u1_s1: cannot read config.yaml" in told
    assert "1 of 8 runs have not reported: masked_u2_s2\n" in told
    assert "2 runs are not finished: ar_u1_s2, ar_u2_s1\n" in told


def test_a_figure_that_cannot_be_drawn_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are drawn, and the page says why it is not."""
    path = write_study(tmp_path, LINES + TWO_FIGURES.replace("x: tokens", "metric: entropy"))
    write_runs(path, tmp_path / "out", last_epoch=3)
    assert report(path) == 2
    message = "figure crossover: "
    error = capsys.readouterr().err
    assert f"1 of 2 figures cannot be drawn: {message}" in error
    assert "no row has a value of entropy" in error
    html = page(path)
    assert message in html
    assert html.count("<img ") == 1


def test_a_figure_that_fails_by_our_mistake_does_not_cost_the_page(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec_class, _ = kinds.KINDS["crossover"]

    def draw(*_: object) -> None:
        raise IndexError("no such <place>")

    monkeypatch.setitem(kinds.KINDS, "crossover", (spec_class, draw))
    with pytest.raises(IndexError, match="no such <place>"):
        report(study)
    html = page(study)
    wanted = "figure crossover: an error of this program: IndexError: no such &lt;place&gt;"
    assert wanted in html
    assert html.count("<img ") == 1


def test_a_study_without_figures(tmp_path: Path) -> None:
    path = write_study(tmp_path, LINES)
    write_runs(path, tmp_path / "out", last_epoch=3)
    assert report(path) == 0
    assert "The study declares no <code>figures:</code>, these are the validation" in page(path)
    assert (tmp_path / "out" / "curves.csv").is_file()


def test_more_axes_than_two_draw_nothing_by_themselves(tmp_path: Path) -> None:
    path = write_study(tmp_path, LINES.replace(" seed:", " size:"))
    write_runs(path, tmp_path / "out", last_epoch=3, score=lambda run, epoch: 1 / epoch)
    assert report(path) == 0
    assert "declares no <code>figures:</code>, and has more axes than two" in page(path)
    assert "<img" not in page(path)


def test_a_table_of_other_settings(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(study) == 0
    assert "the study says" not in capsys.readouterr().out
    study.write_text(
        study.read_text().replace("data.unique_tokens: 3200", "data.unique_tokens: 6400")
    )
    assert report(study, "--results", str(study.parent / "out/results.csv")) == 0
    warning = (
        "ar_u2_s1, ar_u2_s2, masked_u2_s1 and 1 more: were trained with data.unique_tokens 3200, "
        "the study says 6400"
    )
    assert f"warning: {warning}" in capsys.readouterr().out
    assert warning in page(study)


def test_a_table_of_another_study(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"
    head = "study,run,objective,unique,seed,step,split,nelbo,tokens\n"
    strange = "lines,block_u1_s1,block,u1,s1,1,valid,2.0,10\n"
    table.write_text(head + strange)
    assert report(study, "--results", str(table)) == 2
    assert (
        f"results {table} has no run of study lines; it holds block_u1_s1 of"
        in capsys.readouterr().err
    )
    known = "".join(
        f"lines,{name}_u1_s1,{name},u1,s1,{step},valid,{step},{step}0\n"
        for name in ("ar", "masked")
        for step in (1, 2)
    )
    table.write_text(head + strange + known)
    assert report(study, "--results", str(table)) == 0
    warning = f"block_u1_s1 of study lines is in {table}, and not in the study; left out"
    assert f"warning: {warning}" in capsys.readouterr().out
    assert warning in page(study)
