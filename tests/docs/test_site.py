"""The documentation as a site: it builds without a warning, has every page, and asks this machine alone."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import chromium
from tests.docs.commands import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
NAMED = re.compile(r"docs/(\w+\.md)")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site on a server of this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def test_every_page_is_there(site: Path) -> None:
    assert {path.stem for path in PAGES} <= {path.stem for path in site.glob("*.html")}
    assert not list(site.glob("hooks*"))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_pages_that_are_named_exist(page: Path) -> None:
    missing = {name for name in NAMED.findall(page.read_text()) if not (ROOT / "docs" / name).is_file()}
    assert not missing


def test_names_of_pages_are_links(site: Path) -> None:
    assert '<a href="data.html">docs/data.md</a>' in (site / "tutorial.html").read_text()


def test_nothing_comes_from_elsewhere(site: Path, address: str, browser) -> None:
    asked: list[str] = []
    said: list[str] = []
    page = browser.new_page()
    page.set_default_timeout(20_000)
    page.on("request", lambda sent: asked.append(sent.url))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    for path in sorted(site.glob("*.html")):
        if path.name != "404.html":
            page.goto(f"{address}/{path.name}")
    page.goto(f"{address}/index.html")
    page.locator("input.md-search__input").click()
    page.locator("input.md-search__input").type("checkpoint")
    page.wait_for_selector(".md-search-result__item")
    page.close()
    assert len(asked) > len(PAGES)
    foreign = {url for url in asked if not url.startswith((address, "data:", "blob:"))}
    assert not foreign, foreign
    assert not said, said
