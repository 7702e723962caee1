"""The report in a headless Chromium: it draws, it answers to the mouse, it asks for nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import NAMES, Browser, chromium, watched
from report_runs import write_run

from megatron_dlm.config.report_command import ReportConfig
from megatron_dlm.launch.report.command import report

pytestmark = pytest.mark.skipif(
    chromium() is None, reason=f"no browser to look with: none of {', '.join(NAMES)} is installed"
)

HOSTILE = "<img src=x onerror=hacked=1>"
LOSS = "figure:first-of-type svg"
LINES = f"document.querySelectorAll('{LOSS} path').length"


@pytest.fixture(scope="module", name="browser")
def _browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module", name="page")
def _page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    first = write_run(directory / "plain", lr=1e-3)
    second = write_run(directory / HOSTILE, lr=2e-4, objective={"kind": HOSTILE})
    output = directory / "report.html"
    report(ReportConfig(run=[str(first), str(second)], output=str(output)))
    return output


@pytest.fixture(name="opened")
def _opened(browser: Browser, page: Path) -> Iterator[Browser]:
    with watched(browser, page) as opened:
        yield opened


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.value(
        f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent)"
    )


def choose(browser: Browser, label: str, value: object) -> None:
    """Set the control with this label, as a user does."""
    browser.value(
        f"""(() => {{
          const label = [...document.querySelectorAll(".controls label, figcaption label")]
            .find((one) => one.textContent.trim().startsWith({json.dumps(label)}));
          const control = label.querySelector("input, select");
          if (control.type === "checkbox") control.click();
          else {{
            control.value = {json.dumps(value)};
            control.dispatchEvent(new Event(control.type === "range" ? "input" : "change"));
          }}
        }})()"""
    )


def test_all_figures_are_drawn(opened):
    titles = texts(opened, "figcaption h2")
    assert titles[0] == "Loss [nats per token]"
    assert {"Gradient norm", "Learning rate", "Tokens per second", "Norms by layer"} < set(titles)
    assert {"Validation loss by noise level [nats]", "Any metric", "Events in time"} < set(titles)
    assert "nothing to show" not in texts(opened, "svg text")
    assert opened.value(LINES) == 4  # two runs, training and validation
    assert "NaN" not in opened.value("document.getElementById('charts').innerHTML")


def test_hostile_names_are_text(opened):
    assert opened.value("typeof hacked") == "undefined"
    assert opened.value("document.querySelectorAll('img').length") == 0
    assert HOSTILE in texts(opened, "thead th")
    assert any(HOSTILE in text for text in texts(opened, ".legend label"))


def test_the_policy_forbids_requests(browser, page):
    browser.open(page)
    outcome = browser.send(
        "Runtime.evaluate",
        expression="fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => String(error))",
        awaitPromise=True,
        returnByValue=True,
    )
    assert "Failed to fetch" in outcome["result"]["value"]
    entries = [event for event in browser.events if event.get("method") == "Log.entryAdded"]
    assert any("Content Security Policy" in json.dumps(entry) for entry in entries)


def test_a_run_can_be_hidden(opened):
    opened.click(".legend label input")
    assert opened.value(LINES) == 2
    opened.click(".legend label input")
    assert opened.value(LINES) == 4


def test_the_axis_can_be_chosen(opened):
    assert "step (updates)" in texts(opened, f"{LOSS} .label")
    assert "400" in texts(opened, f"{LOSS} .ticks text")
    choose(opened, "x axis", "tokens")
    assert "tokens, repeats included" in texts(opened, f"{LOSS} .label")
    assert "1.6M" in texts(opened, f"{LOSS} .ticks text")
    choose(opened, "x axis", "epoch")
    assert {"2", "8"} < set(texts(opened, f"{LOSS} .ticks text"))


def test_logarithmic_axes(opened):
    choose(opened, "log x", True)
    assert {"20", "50", "100", "200"} < set(texts(opened, f"{LOSS} .ticks text"))
    choose(opened, "log y", True)
    linear = texts(opened, "figure:nth-of-type(3) .ticks text")
    assert {"20", "50", "100", "200", "5e-4", "0.001"} <= set(linear)
    assert {"0.5", "1", "2", "5", "10", "20"} < set(
        texts(opened, "figure:nth-of-type(2) .ticks text")
    )


def test_smoothing_keeps_the_raw_curve(opened):
    choose(opened, "smoothing", "0.9")
    assert opened.value(LINES) == 6
    assert opened.value(f"document.querySelectorAll('{LOSS} path.faint').length") == 2
    # A learning rate is what it is.
    assert opened.value("document.querySelectorAll('figure:nth-of-type(3) .faint').length") == 0


def test_another_metric(opened):
    before = opened.value(f"document.querySelector('{LOSS} path').getAttribute('d')")
    choose(opened, "metric", "loss")
    assert opened.value(LINES) == 2  # validation reports the bound only
    assert opened.value(f"document.querySelector('{LOSS} path').getAttribute('d')") != before


def test_the_pointer_reads_values(opened, page):
    x, y = opened.middle(LOSS)
    opened.mouse("mouseMoved", x, y)
    rows = texts(opened, "figure:first-of-type .reading:not([hidden]) div")
    lines = (page.parent / "plain" / "metrics.jsonl").read_text().splitlines()
    entries = {(entry["step"], entry["split"]): entry for entry in map(json.loads, lines)}
    # The middle of the axis lies a little beyond step 200.
    (train,) = [row for row in rows if row.startswith("plain train")]
    step = int(train.rpartition(" at ")[2])
    assert step in (200, 210, 220)
    assert f"{entries[step, 'train']['nelbo']:.5g}" in train
    opened.mouse("mouseMoved", 2, 2)
    assert texts(opened, "figure:first-of-type .reading:not([hidden]) div") == []


def test_a_stretch_can_be_zoomed(opened):
    x, y = opened.middle(LOSS)
    opened.mouse("mouseMoved", x, y)
    opened.mouse("mousePressed", x, y)
    opened.mouse("mouseMoved", x + 200, y)
    opened.mouse("mouseReleased", x + 200, y)
    zoomed = texts(opened, f"{LOSS} .ticks text")
    assert "100" not in zoomed
    assert "240" in zoomed
    # All figures over the same axis go along.
    assert "100" not in texts(opened, "figure:nth-of-type(2) .ticks text")
    opened.value("document.querySelector('.controls button').click()")
    assert "100" in texts(opened, f"{LOSS} .ticks text")


def test_the_profile_over_noise_levels_follows_its_moment(opened):
    figure = (
        "[...document.querySelectorAll('figure')].find((one) => one.textContent.includes('noise'))"
    )
    assert opened.value(f"{figure}.querySelectorAll('circle').length") == 20
    before = texts(opened, ".ticks text")
    choose(opened, "moment", "10")
    assert texts(opened, ".ticks text") != before


def test_events_are_marked(opened):
    marks = f"document.querySelectorAll('{LOSS} .mark').length"
    assert opened.value(marks) == 4  # two steps of either run
    assert set(texts(opened, f"{LOSS} .mark-text")) == {"signal, resume", "rollback"}
    told = texts(opened, "svg circle.event title")
    assert "plain: rollback at step 250, 2030-01-02 10:50:00 to_step 200, reason loss spike" in told
    choose(opened, "events", False)
    assert opened.value(marks) == 0


def luminance(color: str) -> float:
    """Of #rrggbb, as WCAG 2 defines it."""
    parts = [int(color.strip()[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out(opened, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.send("Emulation.setEmulatedMedia", features=features)

    def color(name: str) -> float:
        style = "getComputedStyle(document.documentElement)"
        return luminance(opened.value(f"{style}.getPropertyValue('--{name}')"))

    paper = color("paper")
    assert (paper > 0.5) == (scheme == "light")
    wanted = {f"run-{number}": 3.0 for number in range(1, 7)} | {"ink": 7.0, "quiet": 4.5}
    for name, contrast in wanted.items():
        light, dark = sorted((paper, color(name)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= contrast, name


def test_a_theme_can_be_chosen(opened):
    background = "getComputedStyle(document.body).backgroundColor"
    before = opened.value(background)
    choose(opened, "colours", "dark")
    assert opened.value(background) == "rgb(20, 23, 26)" != before


def test_print_is_light_and_without_controls(opened):
    choose(opened, "colours", "dark")
    opened.send("Emulation.setEmulatedMedia", media="print")
    assert opened.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = "getComputedStyle(document.querySelector('.controls select').closest('div')).display"
    assert opened.value(hidden) == "none"
    assert opened.value("document.querySelector('.legend').offsetHeight") > 0


@pytest.mark.parametrize("width", [360, 900, 1280])
def test_nothing_hangs_out_of_the_page(browser, page, width):
    browser.open(page, width=width)
    assert browser.value("document.scrollingElement.scrollWidth") <= width
    narrow = browser.value(
        "Math.min(...[...document.querySelectorAll('.plot svg')].map((one) => one.clientWidth))"
    )
    assert narrow > (0.8 * width if width <= 900 else 0.4 * width)


def test_a_run_without_reports_has_a_page(browser, tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl"):
        (run / name).unlink()
    report(ReportConfig(run=[str(run)], output=str(tmp_path / "page.html")))
    browser.open(tmp_path / "page.html")
    assert not [
        event for event in browser.events if event.get("method") == "Runtime.exceptionThrown"
    ]
    assert "1.235M" in texts(browser, "td")


def test_every_number_can_be_drawn(browser, tmp_path):
    """Constant up to rounding, zero, negative, tiny, huge, with holes."""
    run = write_run(tmp_path / "run")
    series = {
        "rounding": [0.002, 0.002 * (1 + 1e-15), 0.002],
        "zero": [0, 0, 0],
        "negative": [-5, -1, -3],
        "tiny": [1e-300, 3e-300, 2e-300],
        "huge": [1e300, 1e308, 2e300],
        "holes": [None, 1, None],
        "nothing": [None, None, None],
        "far": [1e15, 1e15 + 1, 1e15 + 2],
    }
    lines = [
        {"step": step, "split": "train", **{name: row[place] for name, row in series.items()}}
        for place, step in enumerate((10**9, 10**9 + 1, 10**9 + 2))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(ReportConfig(run=[str(run)], output=str(tmp_path / "page.html")))
    browser.open(tmp_path / "page.html")
    for name in series:
        for _ in range(2):
            choose(browser, "metric", name)
            choose(browser, "log y", True)
    choose(browser, "smoothing", "0.9")
    choose(browser, "log x", True)
    thrown = [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]
    assert thrown == []
    assert not browser.value("/NaN|Infinity/.test(document.getElementById('charts').innerHTML)")


def test_one_point_is_enough(browser, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step":5,"split":"valid","nelbo":2.5,"zero":0}\n')
    report(ReportConfig(run=[str(run)], output=str(tmp_path / "page.html")))
    browser.open(tmp_path / "page.html")
    assert not [
        event for event in browser.events if event.get("method") == "Runtime.exceptionThrown"
    ]
    assert browser.value(f"document.querySelectorAll('{LOSS} circle').length") == 1
    choose(browser, "log x", True)
    assert browser.value(f"document.querySelectorAll('{LOSS} circle').length") == 1
