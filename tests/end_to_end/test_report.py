"""`megatron-dlm report` without a browser: what it reads, what it refuses, what it writes."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_runs import write_run

from megatron_dlm.config.parse import parse
from megatron_dlm.config.report_command import ReportConfig
from megatron_dlm.launch.report.command import report
from megatron_dlm.launch.report.curves import read_tables, thinned
from megatron_dlm.launch.report.run_files import read_runs
from megatron_dlm.launch.report.summary import differences, facts_table

HOSTILE = "<script>alert('a')<!-- & \"]]>"


class Page(HTMLParser):
    """Tags, texts and the data of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self._open: list[tuple[str, dict]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action")]
        self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1][1].get("id") == "data":
            self.data = json.loads(data)
        self.texts.append(data)


def made(tmp_path: Path, *runs: Path, **settings) -> Page:
    output = tmp_path / "out" / "report.html"
    report(ReportConfig(run=[str(run) for run in runs], output=str(output), **settings))
    return Page(output)


def test_the_page_holds_the_curves_and_asks_for_nothing(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    page = made(tmp_path, run)
    assert page.links == []
    assert page.tags.count("script") == 2
    (content,) = page.data
    train, layers, valid = content["tables"]
    assert (train["split"], valid["split"]) == ("train", "valid")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = [line for line in lines if line["split"] == "train"]
    assert train["axes"]["step"] == [line["step"] for line in wanted]
    assert train["axes"]["tokens"] == [line["tokens"] for line in wanted]
    assert train["columns"]["loss"] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)
    assert layers["axes"]["step"] == list(range(50, 401, 50))
    assert "nll_at_noise_0.0-0.1" in valid["columns"]
    assert [event["kind"] for event in content["events"]][:2] == ["start", "save"]
    assert content["events"][1]["text"] == "seconds 0.1235"
    assert "seconds 0.1235" in page.texts
    assert f"report of run: {tmp_path}/out/report.html" in capsys.readouterr().out


def test_nothing_in_the_assets_leaves_the_page():
    import megatron_dlm.launch.report.page as page

    assets = sorted((Path(page.__file__).parent / "assets").iterdir())
    names = ["chart.js", "page.css", "page.js", "scales.js", "study.css"]
    assert [path.name for path in assets] == names
    for path in assets:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|fetch\(|XMLHttp|import\(|@import|innerHTML|eval\(", text)
        assert "</" not in text  # it would end the element that it is in


def test_default_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    report(ReportConfig(run=runs[:1]))
    assert (tmp_path / "a" / "report.html").is_file()
    report(ReportConfig(run=runs))
    assert (tmp_path / "report.html").is_file()


def test_only_what_differs_is_listed(tmp_path):
    shared = {"data": {"train": {"data/x": 1.0}}}
    first = write_run(tmp_path / "a" / "run", lr=1e-3, **shared)
    second = write_run(tmp_path / "b" / "run", lr=2e-3, objective={"kind": "block"}, **shared)
    runs = read_runs([str(first), str(second)])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert differences(runs) == [
        ("objective.kind", ["masked", "block"]),
        ("optimizer.lr", ["0.001", "0.002"]),
    ]
    (first / "config.yaml").write_text('{"optimizer": {"lr": 0.002}, "fp8": {"margin": 3}}')
    shown = dict(differences(read_runs([str(first), str(second)])))
    assert shown["fp8.margin"] == ["3", "—"]
    assert shown["data.train.data/x"] == ["—", "1.0"]
    assert "optimizer.lr" not in shown


def test_facts_of_a_run(tmp_path):
    facts = dict(facts_table(read_runs([str(write_run(tmp_path / "run"))])))
    assert facts["state"] == ["finished: reached the last step"]
    assert facts["state written"] == ["2030-01-02T11:10:00+00:00"]
    assert facts["step"] == ["400 of 400"]
    assert facts["parameters"] == ["1.235M"]
    assert facts["commit"] == ["0123456789ab with uncommitted changes"]
    assert facts["peak memory of rank 0"] == ["0.28 GiB"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    valid = [entry for line in lines if (entry := json.loads(line))["split"] == "valid"]
    best = min(valid, key=lambda entry: entry["nelbo"])
    assert facts["validation NELBO, best"] == [f"{best['nelbo']:.4f} at step {best['step']}"]
    assert facts["last event"] == ["2030-01-02 11:10:00 UTC"]


def test_missing_files_are_told(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    for name in ("run.json", "status.json", "events.jsonl", "metrics.jsonl"):
        (run / name).unlink()
    page = made(tmp_path, run)
    told = capsys.readouterr().out
    assert "warning: run: there is no run.json" in told
    assert "warning: run: there is no metrics.jsonl: the run has reported nothing yet" in told
    assert any("there is no run.json" in text for text in page.texts)
    assert page.data[0]["tables"] == []


def test_damage_is_left_out_and_told(tmp_path, capsys):
    run = write_run(tmp_path / "run", num_steps=20)
    lines = (run / "metrics.jsonl").read_text()
    junk = [
        "what",
        "[1]",
        '{"step":null,"split":"train"}',
        '{"step":1}',
        '{"step":"1","split":"x"}',
    ]
    half = '{"step":30,"split":"tra'
    values = '{"step":25,"split":"train","loss":null,"text":"x","list":[1]}\n'
    (run / "metrics.jsonl").write_text(lines + "\n".join(junk) + "\n" + values + half)
    with (run / "events.jsonl").open("a") as file:
        file.write('{"kind":"x"}\n{"time":"yesterday","kind":"x"}\n{"time":"20')
    (run / "run.json").write_text("{")
    (run / "status.json").write_text("[]")
    page = made(tmp_path, run)
    told = capsys.readouterr().out
    assert "5 lines of metrics.jsonl are no entries" in told
    assert "2 lines of events.jsonl are no events" in told
    assert "run.json is not valid JSON" in told
    loss, others = page.data[0]["tables"]
    assert loss["axes"]["step"] == [10, 20, 25]
    assert loss["columns"]["loss"][2] is None
    assert others["axes"]["step"] == [10, 20]
    assert not {"text", "list"} & (loss["columns"].keys() | others["columns"].keys())
    assert len(page.data[0]["events"]) == 7


def test_not_a_number_is_a_hole(tmp_path):
    run = write_run(tmp_path / "run", num_steps=20)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "split": "odd", "loss": None, "lr": 0.5}) + "\n")
    tables = made(tmp_path, run).data[0]["tables"]
    assert tables[-1]["columns"] == {"loss": [None], "lr": [0.5]}
    assert tables[-1]["axes"] == {"step": [30], "tokens": [None], "epoch": [None]}


def test_hostile_text_stays_text(tmp_path):
    run = write_run(tmp_path / f"run {HOSTILE}", data={HOSTILE: HOSTILE})
    (run / "status.json").write_text(json.dumps({"state": HOSTILE, "reason": "</td>"}))
    for name in ("metrics", "events"):
        with (run / f"{name}.jsonl").open("a") as file:
            event = {"time": "2030-01-01T00:00:00+00:00", "kind": HOSTILE, "why": HOSTILE}
            entry = {"step": 1, "split": "</script>" + HOSTILE, "</script>" + HOSTILE: 1.5}
            file.write(json.dumps(event if name == "events" else entry) + "\n")
    page = made(tmp_path, run, write_run(tmp_path / "other"))
    assert page.tags.count("script") == 2
    assert page.links == []
    assert page.data[0]["name"] == run.name
    assert page.data[0]["tables"][-1]["split"] == "</script>" + HOSTILE
    assert any(HOSTILE in text for text in page.texts)


def test_a_name_that_is_no_unicode(tmp_path):
    name = b"run \xff".decode(errors="surrogateescape")
    assert made(tmp_path, write_run(tmp_path / name)).data[0]["name"].startswith("run ")


def write_long(path: Path, num_lines: int) -> None:
    values = '"loss":2.5,"nelbo":2.5,"masked_nll":3.25,"masked_share":0.5,"lr":0.001'
    with path.open("w") as file:
        for step in range(1, num_lines + 1):
            norm = 99.5 if step == 7777 else 1.25
            file.write(
                f'{{"step":{step},"split":"train",{values},"grad_norm":{norm},'
                f'"tokens":{step * 512},"epoch":{step / 1000}}}\n'
            )


def check_long(tmp_path: Path, num_lines: int) -> None:
    run = write_run(tmp_path / "long")
    write_long(run / "metrics.jsonl", num_lines)
    page = made(tmp_path, run, max_points=1000)
    (table,) = page.data[0]["tables"]
    steps = table["axes"]["step"]
    assert len(steps) <= 1001
    assert (steps[0], steps[-1]) == (1, num_lines)
    assert np.diff(steps).max() < num_lines / 150
    assert table["columns"]["grad_norm"][steps.index(7777)] == 99.5  # the peak stays
    assert (tmp_path / "out" / "report.html").stat().st_size < 300_000


def test_a_long_run_is_thinned(tmp_path):
    check_long(tmp_path, 20_000)


@pytest.mark.slow
def test_a_million_lines(tmp_path):
    started = time.monotonic()
    check_long(tmp_path, 1_000_000)
    assert time.monotonic() - started < 120


def test_thinning_keeps_what_is_short(tmp_path):
    run = write_run(tmp_path / "run")
    tables, num_bad = read_tables(run / "metrics.jsonl")
    assert num_bad == 0
    assert all(thinned(table, 100) is table for table in tables)


def test_steps_that_were_taken_again_come_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5), (3, 3.5)]
    path.write_text(
        "".join(f'{{"step":{step},"split":"train","loss":{loss}}}\n' for step, loss in steps)
    )
    (table,), _ = read_tables(path)
    assert table.axes["step"].tolist() == [1, 2, 2, 3, 3]
    assert table.columns["loss"].tolist() == [1.0, 2.0, 2.5, 3.0, 3.5]


def test_what_is_no_run_is_refused(tmp_path):
    run = str(write_run(tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"run .*nowhere is no directory; name the train"):
        report(ReportConfig(run=[run, str(tmp_path / "nowhere")]))
    with pytest.raises(ValueError, match=r"run .*empty holds no run \(none of config\.yaml"):
        report(ReportConfig(run=[str(tmp_path / "empty")]))
    with pytest.raises(ValueError, match=r"output .* is a directory; name a file"):
        report(ReportConfig(run=[run], output=str(tmp_path)))
    with pytest.raises(ValueError, match="more than once"):
        report(ReportConfig(run=[run, run + "/"]))
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run"], "name at least one run directory"),
        (["--run", "a", "a"], "more than once"),
        (["--run", "a", "--max_points", "3"], "max_points is 3; it must be at least 100"),
    ],
)
def test_bad_settings(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(ReportConfig, flags, "megatron-dlm report")
