"""The page of a study in a headless Chromium: its figures show, and it asks for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import NAMES, Browser, chromium, watched
from study_runs import CROSSOVER, LINES, write_runs, write_study

from megatron_dlm.config.study_commands import StudyReportConfig
from megatron_dlm.launch.study_report.command import report_study
from megatron_dlm.training.status import write_status

pytestmark = pytest.mark.skipif(
    chromium() is None, reason=f"no browser to look with: none of {', '.join(NAMES)} is installed"
)

HOSTILE = "<img src=x onerror=hacked=1>"
IMAGES = "[...document.querySelectorAll('.figure img')]"


@pytest.fixture(scope="module", name="page")
def _page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study & page")
    text = LINES.replace("Where do", f"Where {HOSTILE} do") + CROSSOVER
    text += "  curves: {kind: curves, lines: objective, panels: unique}\n"
    path = write_study(folder, text)
    write_runs(path, folder / "out")
    write_status(folder / "out" / "runs" / "ar_u1_s1", "failed", 3, HOSTILE)
    report_study(StudyReportConfig(study=str(path), output_dir=str(folder / "out")))
    return folder / "out" / "index.html"


@pytest.fixture(scope="module", name="browser")
def _browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(name="opened")
def _opened(browser: Browser, page: Path) -> Iterator[Browser]:
    with watched(browser, page) as opened:
        yield opened


def test_the_figures_show(opened: Browser) -> None:
    shown = opened.value(
        f"{IMAGES}.map((one) => [one.complete, one.naturalWidth, one.clientWidth])"
    )
    assert len(shown) == 2
    for is_complete, natural_width, width in shown:
        assert is_complete
        assert natural_width > 400
        assert width > 400
    assert opened.value("document.querySelectorAll('.runs tbody tr').length") == 8
    assert "1,800 to 2,200" in opened.value("document.querySelector('table').textContent")


def test_hostile_texts_are_texts(opened: Browser) -> None:
    assert opened.value("typeof hacked") == "undefined"
    assert opened.value("document.querySelectorAll('img').length") == 2
    assert HOSTILE in opened.value("document.querySelector('.question').textContent")
    assert HOSTILE in opened.value("document.querySelector('.state-failed').textContent")


def test_links_lead_to_files(opened: Browser) -> None:
    links = opened.value("[...document.querySelectorAll('a')].map((one) => one.href)")
    assert len(links) == 6 + 8
    for link in links:
        assert link.startswith("file:///")
        assert Path(unquote(link.removeprefix("file://"))).exists(), link


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_hangs_out_of_the_page(opened: Browser, page: Path, width: int) -> None:
    opened.open(page, width=width)
    assert opened.value("document.scrollingElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_are_on_white_in_both_schemes(opened: Browser, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.send("Emulation.setEmulatedMedia", features=features)
    paper = opened.value("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
    for background in opened.value(f"{IMAGES}.map((one) => getComputedStyle(one).backgroundColor)"):
        assert background == "rgb(255, 255, 255)"


def test_print_keeps_figures_and_tables(opened: Browser) -> None:
    opened.send("Emulation.setEmulatedMedia", media="print")
    assert opened.value("document.querySelector('.files').offsetHeight") == 0
    assert opened.value(f"{IMAGES}.every((one) => one.offsetHeight > 100)")
    assert opened.value("document.querySelector('.runs').offsetHeight") > 0
