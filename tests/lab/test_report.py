"""The page: complete without a network, right in what it says, and drawn by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from rankwise.lab.compare import run_compare
from rankwise.lab.figures import figures
from rankwise.lab.plots import Palette, broken, dodged, log_ticks, running_mean
from rankwise.lab.report import page
from tests.lab.tiny_task import TinyTask

RECIPES = ["lora(rank=2)", "rslora(rank=2) + sgd(momentum=0.9)", "full"]
PLOTS = {"ranking", "curves", "size", "rates", "costs", "retention", "spectra"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "out"
    command = "rankwise compare --recipes '<b>not bold</b>'"
    return run_compare(TinyTask(), RECIPES, steps=16, seeds=3, rates=3, out=out, command=command, quiet=True)


def test_the_page_says_what_the_result_says(found) -> None:
    text = page(found)
    assert "&lt;b&gt;not bold&lt;/b&gt;" in text
    assert "<b>not bold" not in text
    for recipe in RECIPES:
        assert recipe in text
    for sentence in found.statements[1:]:
        words = sentence.split(": ", 1)[1] if sentence.startswith(("NOT resolved", "Resolved")) else sentence
        assert words.replace("'", "&#x27;") in text
    assert found.about["torch"] in text
    assert "connect-src" not in text
    assert "default-src 'none'" in text


def test_nothing_in_the_page_points_outside(found) -> None:
    own = re.sub(r"<script>.*?</script>", "", page(found), flags=re.S)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", own)
    assert "@import" not in own
    assert "url(" not in own


def test_figures_are_valid_plotly_and_hold_the_numbers(found) -> None:
    from plotly.graph_objects import Figure

    drawn = figures(found, Palette(RECIPES))
    assert set(drawn) == PLOTS
    for figure in drawn.values():
        Figure({"data": figure["data"], "layout": figure["layout"]})  # raises on a property that plotly does not know
        json.dumps(figure, allow_nan=False)
    best = found.ranked()[0]
    assert best.metric is not None
    means = [trace["x"][0] for trace in drawn["ranking"]["data"] if len(trace["x"]) == 1]
    assert best.metric.mean in means
    last = drawn["spectra"]["data"][0]
    assert last["meta"] == found.winner
    assert last["visible"] is True


def test_a_page_without_any_result_is_still_a_page(tmp_path: Path) -> None:
    task = TinyTask(poisoned_from=1)
    found = run_compare(task, ["lora(rank=2)"], steps=8, seeds=1, rates=2, out=tmp_path / "out", quiet=True)
    text = page(found)
    assert "every learning rate diverged" in text
    assert "No recipe finished a run" in text


def test_names_do_not_overlap_and_keep_their_order() -> None:
    placed = dodged([1.0, 1.01, 5.0, 0.99], 0.5)
    assert sorted(range(4), key=lambda index: placed[index]) == [3, 0, 1, 2]
    ordered = sorted(placed)
    assert all(above - below >= 0.5 - 1e-12 for below, above in pairwise(ordered))
    assert broken("lora") == "lora"
    assert broken("dora(rank=4) + reflora + bar").count("<br>") == 1
    assert running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
    assert "1e-4" in log_ticks(-4.2, -1)["ticktext"]
    assert "200 k" in log_ticks(5, 6)["ticktext"]


OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--window-size=1200,900", "--dump-dom")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
ITS_OWN = {"update.googleapis.com", "accounts.google.com", "clients2.google.com", "optimizationguide-pa.googleapis.com"}
ITS_OWN |= {"android.clients.google.com", "mtalk.google.com", "safebrowsing.googleapis.com", "redirector.gvt1.com"}


def browse(page_file: Path, tmp_path: Path) -> tuple[str, str, set[str]]:
    """The opening tag after all scripts ran with the whole page, the browser's console, and hosts it asked for."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine; apt-get install chromium")
    log = tmp_path / "net.json"
    places = (f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr")
    command = [browser, *OPTIONS, *QUIET, *places, page_file.as_uri()]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-2000:]
    console = "\n".join(line for line in finished.stderr.splitlines() if "CONSOLE" in line)
    hosts = set(re.findall(r'"url":"(?:https?|wss?|ftp)://([^/":]*)', log.read_text(errors="replace")))
    return finished.stdout, console, hosts - ITS_OWN  # a browser asks for its own updates


@pytest.mark.slow
def test_a_browser_draws_every_plot_without_network_and_errors(found, tmp_path: Path) -> None:
    text, console, hosts = browse(found.report, tmp_path)
    head = re.search(r"<html[^>]*>", text)
    assert head is not None
    assert 'data-errors="0"' in head[0]
    assert 'data-requests="0"' in head[0]
    assert f'data-drawn="{len(PLOTS)}"' in head[0]
    for name in PLOTS:
        section = text.split(f'id="plot-{name}"', 1)[1].split("</section>", 1)[0]
        assert "main-svg" in section, f"{name} was not drawn"
        assert re.search(r'class="(point|heatmaplayer|trace|js-line)', section), f"{name} has no marks"
    assert not console
    assert not hosts


@pytest.mark.slow
def test_the_check_above_bites(found, tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled.html"
    beacon = '<img src="https://example.invalid/beacon.png"><script>undefinedFunction()</script></body>'
    spoiled.write_text(found.report.read_text().replace("</body>", beacon))
    text, console, _ = browse(spoiled, tmp_path)
    assert 'data-errors="0"' not in text[:600]
    assert "Content Security Policy" in console
    assert "undefinedFunction is not defined" in console
