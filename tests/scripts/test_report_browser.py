"""The report in a browser: it opens from disk, asks nothing of the network, and its controls change what they should.

Needs `pip install playwright` and a Chromium (`apt-get install chromium`); skipped where either is missing.
"""

import shutil

import pytest
from report_runs import HOSTILE, add_grids, make_run

from scripts.report import page, runs

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """The page of a finished and a failed run."""
    folder = tmp_path_factory.mktemp("report")
    folders = [make_run(folder / "a", rows=40), make_run(folder / "b", rows=40, lr="0.002", ended="")]
    (folders[1] / "log.txt").write_text("device: cpu\nerror: the loss of step 3 is not finite\n")
    shutil.copy(folders[0] / "samples/step_00000005.png", folders[1] / "samples/step_00000007.png")
    add_grids(folders[0])
    add_grids(folders[1], steps=2, scales=())
    read = [runs.read_run(path, path.name, 1000, []) for path in folders]
    return page.write(read, folder / "out", linked=False, reload_seconds=None).as_uri()


@pytest.fixture
def opened(browser, address):
    """opened(width, scheme): the page; at the end of the test it must have reported and requested nothing."""
    contexts, wrong = [], []

    def call(width: int = 1600, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
        tab.goto(address)
        return tab

    yield call
    for context in contexts:
        context.close()
    assert wrong == []


def picture(tab, selector: str) -> str:
    """The pixels of the first canvas there."""
    return tab.evaluate("selector => document.querySelector(selector + ' canvas').toDataURL()", selector)


def says(tab, selector: str) -> str:
    return tab.locator(selector).first.get_attribute("aria-label")


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable(opened, width, scheme):
    """Nothing is wider than the window, and text stands out from what is behind it."""
    tab = opened(width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    contrast = tab.evaluate(
        """() => {
          const numbers = (css) => css.match(/[\\d.]+/g).slice(0, 3).map(Number);
          const luminance = (css) => numbers(css).map((v) => ((v / 255 + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0.05);
          const ground = luminance(getComputedStyle(document.body).backgroundColor);
          return ['body', '.muted', 'a', '.status.finished', '.status.failed', 'th'].map((selector) => {
            const text = luminance(getComputedStyle(document.querySelector(selector)).color);
            return Math.max(text, ground) / Math.min(text, ground);
          });
        }"""
    )
    assert min(contrast) > 4.5


def test_controls_of_curves(opened):
    tab = opened()
    loss = "#panels .panel:first-child .chart"
    before = picture(tab, loss)
    for control in ("#smooth", "#axis", "#log-x", "[id='panel-Loss-log']"):
        if control == "#smooth":
            tab.locator(control).fill("0.9")
        elif control == "#axis":
            tab.select_option(control, "hours")
        else:
            tab.check(control)
        after = picture(tab, loss)
        assert after != before, control
        before = after
    tab.reload()  # what is set outlives it
    assert tab.locator("#smooth").input_value() == "0.9" and tab.locator("#axis").input_value() == "hours"


def test_legend_isolates_a_run(opened):
    tab = opened()
    loss = "#panels .panel:first-child .chart"
    assert "a ends at" in says(tab, loss) and "b ends at" in says(tab, loss)
    tab.locator("#curves .legend button", has_text="b").click()
    assert "a ends at" not in says(tab, loss) and "b ends at" in says(tab, loss)
    assert tab.locator("#previews figure:visible").count() == 1
    tab.locator("#curves .legend button", has_text="b").click()
    assert "a ends at" in says(tab, loss)
    tab.get_by_label("Show b").uncheck()
    assert "b ends at" not in says(tab, loss)
    tab.locator("#show-all").click()
    tab.locator("#filter").fill("failed")
    assert tab.locator("#run-table tbody tr:visible").count() == 1 and "a ends at" not in says(tab, loss)


def test_sorted_table(opened):
    tab = opened()
    names = "#run-table tbody td.name a"
    tab.locator("#run-table th button", has_text="Status").click()
    assert tab.locator(names).all_inner_texts() == ["b", "a"]  # failed, finished
    tab.locator("#run-table th button", has_text="Status").click()
    assert tab.locator(names).all_inner_texts() == ["a", "b"]


def test_preview_slider(opened):
    """Each run shows its preview nearest to the step."""
    tab = opened()
    tab.locator("#preview-step").focus()
    captions = tab.locator("#previews figcaption")
    assert captions.all_inner_texts() == ["a, step 10", "b, step 10"]
    tab.keyboard.press("ArrowLeft")
    assert captions.all_inner_texts() == ["a, step 5", "b, step 7"]
    tab.keyboard.press("Home")
    assert captions.all_inner_texts() == ["a, step 5", "b, step 5"]


def test_trajectory_sliders(opened):
    """By the keyboard; runs of other numbers of steps meet at the same t, and one without guidance stays as it is."""
    tab = opened()
    captions, images = tab.locator("#grids figcaption"), tab.locator("#grids img")
    end = "(run@10, heun, seed 8888)"
    assert captions.all_inner_texts() == [f"a, step 4 of 4, t = 1, guidance scale 1 {end}", f"b, step 2 of 2, t = 1 {end}"]
    sources = [image.get_attribute("src") for image in images.all()]
    tab.locator("#guidance-scale").focus()
    tab.keyboard.press("ArrowRight")
    assert captions.all_inner_texts() == [f"a, step 4 of 4, t = 1, guidance scale 2 {end}", f"b, step 2 of 2, t = 1 {end}"]
    guided = [image.get_attribute("src") for image in images.all()]
    assert guided[0] != sources[0] and guided[1] == sources[1]
    tab.locator("#solver-step").focus()
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#solver-step").get_attribute("aria-valuetext") == "t = 0.5"
    assert captions.all_inner_texts() == [f"a, step 2 of 4, t = 0.5, guidance scale 2 {end}", f"b, step 1 of 2, t = 0.5 {end}"]
    tab.reload()  # what is set outlives it
    assert captions.first.inner_text() == f"a, step 2 of 4, t = 0.5, guidance scale 2 {end}"
    assert HOSTILE in images.first.get_attribute("alt")  # the names of the columns
    tab.locator("#solver-step").focus()
    tab.keyboard.press("Home")  # noise, which is the same at every scale
    noise = images.first.get_attribute("src")
    tab.locator("#guidance-scale").focus()
    tab.keyboard.press("Home")
    assert images.first.get_attribute("src") == noise
    tab.locator("#samples .legend button", has_text="b").click()
    assert tab.locator("#grids figure:visible").count() == 1
    tab.locator("#solver-step").focus()
    tab.keyboard.press("End")
    assert tab.locator("#grids figcaption:visible").all_inner_texts() == [f"b, step 2 of 2, t = 1 {end}"]


def test_unconditional_runs_have_no_guidance_slider(opened, tmp_path):
    run = make_run(tmp_path / "run")
    add_grids(run, scales=())
    out = page.write([runs.read_run(run, "run", 1000, [])], tmp_path / "out", linked=True, reload_seconds=None)
    tab = opened()
    tab.goto(out.as_uri())
    assert tab.locator("#guidance-scale").is_hidden() and tab.locator("#solver-step").is_visible()
    assert tab.locator("output[for='solver-step']").inner_text() == "4 of 4, t = 1"
    assert tab.locator("#grids img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 8


def test_theme(opened):
    tab = opened(scheme="dark")
    color = "getComputedStyle(document.body).backgroundColor"
    dark, drawn = tab.evaluate(color), picture(tab, "#panels .panel:first-child .chart")
    tab.locator("#theme").click()
    assert tab.evaluate(color) != dark and picture(tab, "#panels .panel:first-child .chart") != drawn


def test_quality(opened):
    tab = opened()
    assert "FD-digits" in says(tab, "#quality-chart")
    tab.select_option("#metric", "precision")
    assert "precision" in says(tab, "#quality-chart")
    assert "real (test split), n = 100" not in tab.locator("#quality-lines").inner_text()


def test_keyboard(opened):
    """Every control is reached by the tabulator; the arrow keys move along a curve."""
    tab = opened()
    reached = set()
    for _ in range(120):
        tab.keyboard.press("Tab")
        reached.add(
            tab.evaluate("document.activeElement.id || document.activeElement.className || document.activeElement.tagName")
        )
    assert {
        "theme",
        "filter",
        "smooth",
        "axis",
        "metric",
        "preview-step",
        "solver-step",
        "guidance-scale",
        "chart",
        "sort",
        "shown",
    } <= reached
    tab.locator("#panels .chart").first.focus()
    tab.keyboard.press("ArrowRight")
    tip = tab.locator("#panels .tip").first
    assert tip.is_visible() and "a:" in tip.inner_text()
    tab.keyboard.press("Escape")
    assert tip.is_hidden()


def test_copied_command(opened):
    tab = opened()
    tab.locator("#run-table a").first.click()  # opens the details of the run
    command = tab.locator("#run-0 .command code").first
    tab.locator("#run-0 .copy").first.click()
    tab.locator("#run-0 .copy", has_text="Copied").wait_for()
    tab.locator("#filter").fill("")
    tab.locator("#filter").focus()
    tab.keyboard.press("Control+v")
    assert tab.locator("#filter").input_value() == command.inner_text()
