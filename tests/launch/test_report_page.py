"""The page of launch.report in a browser: drawn without a word on the console, without a request, on any screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.arguments import guarded
from launch.report import report
from tests.browser import chromium
from tests.launch import report_kit as kit


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Reports of one run, of two, of a curriculum."""
    folder = tmp_path_factory.mktemp("runs")
    kit.write_run(folder / "one", 1000)
    kit.write_run(folder / "two", 800, lr=2e-3)
    kit.write_curriculum(folder / "journey")
    found = {}
    for name, of in {"one": ["one"], "both": ["one", "two"], "journey": ["journey"]}.items():
        found[name] = folder / f"{name}.html"
        assert guarded(report, [*(str(folder / each) for each in of), f"out={found[name]}"]) == 0
    return found


@pytest.fixture
def opened(browser, pages):
    """Opens a report; at the end, nothing may have been said or asked for."""
    contexts, said = [], []

    def open_page(name: str = "one", width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda sent: said.append(sent.url) if not sent.url.startswith(("file:", "data:")) else None)
        page.goto(pages[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said


@pytest.mark.parametrize("name", ["one", "both", "journey"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_figure_is_drawn_and_nothing_is_wider_than_the_screen(opened, name, width, scheme):
    page = opened(name, width, scheme)
    figures = page.locator("figure.chart")
    assert figures.count() > 15
    for place in range(figures.count()):
        figure = figures.nth(place)
        assert figure.locator("path.line, path.area, circle").count() > 0, figure.inner_text()
        assert "NaN" not in figure.inner_html() and "undefined" not in figure.inner_html()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")


def test_labels_of_axes_do_not_overlap(opened):
    """No two texts of a chart lie on one another, and none leaves it."""
    for name, width in (("one", 1280), ("journey", 1280), ("one", 390)):
        found = opened(name, width).evaluate(
            """[...document.querySelectorAll("svg.plot")].flatMap((plot) => {
                const edge = plot.getBoundingClientRect();
                const texts = [...plot.querySelectorAll("text")];
                const boxes = texts.map((text) => [text.getBoundingClientRect(), text.textContent]);
                const out = boxes.filter(([box]) => box.left < edge.left - 1 || box.right > edge.right + 1);
                const over = boxes.filter(([a], at) => boxes.slice(at + 1).some(([b]) =>
                  a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3));
                return [...out, ...over].map(([, text]) => `${plot.ariaLabel}: ${text}`);
            })"""
        )
        assert found == []


def chart(page, title: str):
    found = page.locator("figure.chart", has=page.locator("figcaption", has_text=title)).first
    found.scroll_into_view_if_needed()
    return found


def test_values_under_the_pointer(opened):
    page = opened()
    figure = chart(page, "Loss by media")
    box = figure.locator("svg.plot").bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 100)
    lines = figure.locator(".tip").inner_text().split("\n")
    assert lines[0].startswith("step ") and {"text", "audio", "audio+image", "video"} <= set(lines)
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 400)
    assert figure.locator(".tip").is_hidden()


def test_an_event_is_told_under_the_pointer(opened):
    page = opened()
    figure = chart(page, "Training loss")
    mark = figure.locator("path.flag").nth(1).bounding_box()
    plot = figure.locator("svg.plot").bounding_box()
    page.mouse.move(mark["x"] + 4, plot["y"] + 100)
    assert "gradient is not finite on rank 3" in figure.locator(".tip").inner_text()


def test_the_legend_hides_and_shows(opened):
    page = opened()
    figure = chart(page, "Loss by media")
    assert figure.locator("path.line").count() == 4
    figure.get_by_role("button", name="audio", exact=True).click()
    assert figure.locator("path.line").count() == 3
    figure.get_by_role("button", name="video", exact=True).click(modifiers=["Shift"])
    assert figure.locator("path.line").count() == 1


def test_log_and_smooth_redraw(opened):
    page = opened()
    figure = chart(page, "Training loss")
    before = figure.locator("path.line").get_attribute("d")
    figure.get_by_role("button", name="log").click()
    logarithmic = figure.locator("path.line").get_attribute("d")
    page.locator("#smoothing input").fill("0.9")
    assert before != logarithmic and figure.locator("path.line").count() == 2
    assert figure.locator("path.line").first.get_attribute("d") == logarithmic


def test_the_heatmap_follows_its_slider(opened):
    page = opened()
    figure = page.locator("figure.heat").first
    assert figure.locator("canvas[role=img]").count() == 5

    def pixel() -> str:
        return figure.locator("canvas[role=img]").first.evaluate("canvas => canvas.toDataURL()")

    last = pixel()
    figure.get_by_role("slider").fill("0")
    assert pixel() != last and "step 50" in figure.inner_text()
    figure.locator("canvas[role=img]").nth(4).scroll_into_view_if_needed()
    box = figure.locator("canvas[role=img]").nth(4).bounding_box()
    page.mouse.move(box["x"] + 3.5 / 16 * box["width"], box["y"] + 1.5 / 4 * box["height"])
    assert figure.locator(".tip").inner_text().split("\n") == ["no token", "layer 1, expert 3, video"]


def test_sounds_play_and_pictures_show(opened):
    page = opened()
    states = page.evaluate(
        """Promise.all([...document.querySelectorAll("audio")].map((audio) => new Promise((done) => {
            audio.oncanplaythrough = () => done([audio.readyState, audio.duration]);
            audio.onerror = () => done(audio.error.message);
            audio.preload = "auto"; audio.load();
        })))"""
    )
    assert states == [[4, 0.5]] * 9
    widths = page.evaluate("[...document.querySelectorAll('article img')].map((image) => image.naturalWidth)")
    assert widths == [320] * 3


def test_it_prints(opened):
    page = opened(scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden() and len(page.pdf()) > 50_000
