"""The report's page in a real browser: it opens, its slider moves, its legend hides, it hovers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scripts.report import command
from tests.train.made_runs import made_run

webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.chrome.options import Options  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

STEPS = np.unique(np.geomspace(1, 3000, 36).astype(int)).tolist()[:30]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,2400",
)
SECONDS = 30


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        made_run(
            folder / (f"{bos}_{seed}" if (bos, seed) != ("none", 1) else "none  1 %{x}"),
            f"packing.bos={bos}",
            f"seed={seed}",
            steps=STEPS,
            onset=STEPS[15 + seed],
            layers=4,
            heads=6,
        )
        for bos, seed in (("pinned", 0), ("pinned", 1), ("pinned", 2), ("none", 0), ("none", 1))
    ]


@pytest.fixture(scope="module")
def browser(runs, tmp_path_factory):
    """The page of five runs of 30 records, opened from disk and drawn."""
    folder = tmp_path_factory.mktemp("page")
    out = folder / "report.html"
    assert command([*map(str, runs), "--out", str(out)]) == 0
    assert out.stat().st_size < 10_000_000
    options = Options()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(SECONDS)
    try:
        driver.get(out.as_uri())
        wait(driver, "return charts().length === 9 && !!charts().every((div) => div._fullLayout)")
        yield driver
    finally:
        driver.quit()


def wait(driver, script: str) -> None:
    WebDriverWait(driver, SECONDS).until(lambda _: driver.execute_script(script), script)


def hover(driver, element, x: float, y: float) -> str:
    """What the hover box says at (x, y) pixels from the element's top left corner."""
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    size = element.size
    where = (round(x - size["width"] / 2), round(y - size["height"] / 2))
    ActionChains(driver).move_to_element_with_offset(element, *where).perform()
    told = "return document.querySelector(`#${arguments[0]} .hoverlayer`)?.textContent ?? ''"
    name = element.get_attribute("id")
    WebDriverWait(driver, SECONDS).until(lambda _: driver.execute_script(told, name))
    return driver.execute_script(told, name)


def pixel(driver, name: str, x: float, y: float) -> tuple[float, float]:
    """Where a point of the first panel of a figure is, from the figure's top left corner."""
    script = """
      const { xaxis, yaxis } = document.getElementById(arguments[0])._fullLayout;
      return [xaxis.d2p(arguments[1]) + xaxis._offset, yaxis.d2p(arguments[2]) + yaxis._offset];
    """
    return tuple(driver.execute_script(script, name, x, y))


def test_it_opens_without_errors_and_asks_nothing_of_a_network(browser):
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in asked
        if message["method"] == "Network.requestWillBeSent"
        # Not what the browser's own first page asks.
        and message["params"]["documentURL"].startswith("file:")
    ]
    assert urls and all(url.startswith(("file:", "data:", "blob:")) for url in urls), urls


def test_the_slider_moves_the_heat_map_and_it_tells_stored_values(browser, runs):
    Select(browser.find_element(By.ID, "run")).select_by_visible_text("pinned_1")
    heads = browser.find_element(By.ID, "head_maps")
    wait(browser, "return !!document.querySelector('#head_maps .slider-grip-rect')")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", heads)
    grip = browser.find_element(By.CSS_SELECTOR, "#head_maps .slider-grip-rect")
    rail = browser.find_element(By.CSS_SELECTOR, "#head_maps .slider-rail-touch-rect")
    ActionChains(browser).click_and_hold(grip).move_to_element(rail).release().perform()
    active = "document.getElementById('head_maps').layout.sliders[0].active"
    wait(browser, f"return {active} > 5 && {active} < 25")
    index = browser.execute_script(f"return {active}")
    table = pd.read_parquet(runs[1] / "sinks")
    for step in (STEPS[index], STEPS[-1]):
        if step == STEPS[-1]:
            grip = browser.find_element(By.CSS_SELECTOR, "#head_maps .slider-grip-rect")
            drag = ActionChains(browser).click_and_hold(grip)
            drag.move_by_offset(rail.size["width"] // 2, 0).release().perform()
            wait(browser, f"return {active} === 29")
        row = table[(table["step"] == step) & (table["layer"] == 2) & (table["head"] == 5)]
        stored = row["alpha"].item()
        shown = f"alpha {stored:.4f}"
        ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
        told = hover(browser, heads, *pixel(browser, "head_maps", 5, 2))
        assert "layer 2, head 5" in told and shown in told, (step, told)
    assert stored > 0.5, "the last step is past the onset"


def test_another_run_keeps_the_step(browser):
    wait(browser, "return !!document.getElementById('head_maps').layout.sliders")
    go = "return goTo(document.getElementById('head_maps'), arguments[0])"
    browser.execute_script(go, STEPS[10])
    Select(browser.find_element(By.ID, "run")).select_by_visible_text("none_0")
    active = "document.getElementById('head_maps').layout.sliders[0].active"
    wait(browser, f"return {active} === 10")


def test_a_click_in_the_legend_shows_a_run_and_its_hovered_value_is_stored(browser, runs):
    name = "pinned_2"
    find = f"charts()[0].data.findIndex((trace) => trace.name === '{name}')"
    assert browser.execute_script(f"return charts()[0].data[{find}].visible") == "legendonly"
    items = browser.find_elements(By.CSS_SELECTOR, "#excess_mass .legend .traces")
    item = next(item for item in items if item.text == name)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", item)
    item.find_element(By.CSS_SELECTOR, ".legendtoggle").click()
    wait(browser, f"return charts()[0].data[{find}].visible === true")
    metrics = pd.read_csv(runs[2] / "metrics.csv").set_index("step")
    # In the middle of this run's rise, where no other line has a point.
    step = STEPS[16]
    stored = metrics.loc[step, "sink/excess"]
    figure = browser.find_element(By.ID, "excess_mass")
    told = hover(browser, figure, *pixel(browser, "excess_mass", step, stored))
    assert name in told and f"{step:,}" in told and f"excess mass {stored:.4f}" in told


def test_an_arm_is_hidden_in_every_figure_and_shown_alone(browser):
    items = browser.find_elements(By.CSS_SELECTOR, "#excess_mass .legend .traces")
    arm = next(item for item in items if "none" in item.text)
    arm.find_element(By.CSS_SELECTOR, ".legendtoggle").click()
    of_arm = (
        "charts().flatMap((div) => div.data).filter((trace) => trace.legendgroup === 'arm 1')"
        ".map((trace) => trace.visible)"
    )
    wait(browser, f"return {of_arm}.length > 8 && {of_arm}.every((v) => v === 'legendonly')")
    browser.execute_script("isolate('arm 1')")
    wait(browser, f"return {of_arm}.every((v) => v === true)")
    assert browser.execute_script("return hidden.has('arm 0')")
    browser.execute_script("isolate('arm 1')")
    assert browser.execute_script("return !hidden.has('arm 0') && hidden.has('run pinned_2')")


def test_the_x_axis_can_be_tokens(browser, runs):
    Select(browser.find_element(By.ID, "axis")).select_by_value("tokens linear")
    wait(browser, "return charts()[0].layout.xaxis.type === 'linear'")
    metrics = pd.read_csv(runs[0] / "metrics.csv")
    script = "return charts()[0].data.find((trace) => trace.name === 'pinned_0').x"
    assert browser.execute_script(script) == metrics["tokens"].tolist()
    Select(browser.find_element(By.ID, "axis")).select_by_value("step log")
    wait(browser, "return charts()[0].layout.xaxis.type === 'log'")
    assert browser.execute_script(script) == STEPS
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_layers_that_were_hidden_stay_so(browser):
    wait(browser, "return document.getElementById('norms_by_layer').data?.length === 16")
    layers = "document.getElementById('norms_by_layer').data.map((trace) => trace.visible)"
    hide = "return Plotly.restyle('norms_by_layer', { visible: 'legendonly' }, [1])"
    browser.execute_script(hide)
    browser.execute_script("toggle('arm 0'); toggle('arm 0')")
    Select(browser.find_element(By.ID, "axis")).select_by_value("tokens linear")
    norms = "document.getElementById('norms_by_layer').layout.xaxis.type"
    wait(browser, f"return {norms} === 'linear'")
    shown = browser.execute_script(f"return {layers}")
    assert shown[1] == "legendonly" and shown.count("legendonly") == 1
    Select(browser.find_element(By.ID, "axis")).select_by_value("step log")
    wait(browser, f"return {norms} === 'log'")
    assert browser.execute_script(f"return {layers}[1]") == "legendonly"
    uniform = "charts().flatMap((div) => div.data).find((t) => t.legendgroup === 'baseline')"
    assert browser.execute_script(f"return {uniform}.visible") is True


def test_a_run_whose_name_has_two_spaces_is_shown(browser):
    run = Select(browser.find_element(By.ID, "run"))
    run.select_by_value("none  1 %{x}")
    title = "document.getElementById('norms_by_layer').layout.title.text"
    wait(browser, f"return {title}.includes('none  1')")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_name_is_told_as_it_is(browser, runs):
    browser.execute_script("if (hidden.has('run none  1 %{x}')) toggle('run none  1 %{x}')")
    metrics = pd.read_csv(runs[4] / "metrics.csv").set_index("step")
    step = STEPS[17]
    stored = metrics.loc[step, "sink/excess"]
    figure = browser.find_element(By.ID, "excess_mass")
    told = hover(browser, figure, *pixel(browser, "excess_mass", step, stored))
    assert "none  1 %{x}" in told.replace("\xa0", " ") and f"excess mass {stored:.4f}" in told
