"""The site of the documentation: built strictly, with every page in its contents, and opened in a browser."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import yaml

from tests.shared import browser
from tests.test_docs import ROOT

BUILD = [sys.executable, "docs/site/build.py"]


def build(folder, cwd=ROOT):
    environment = {**os.environ, "GITHUB_REPOSITORY": "someone/dora_mm"}
    command = [*BUILD, str(folder), "--without-examples"]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "public"


def test_every_page_is_in_the_contents():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [file for each in (entry.values() if isinstance(entry, dict) else entry) for file in files(each)]

    listed = files(yaml.safe_load((ROOT / "docs/site/mkdocs.yml").read_text())["nav"])
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted([*pages, "index.md", "contributing.md", "changes.md", "api.md", "examples.md"])


def test_links_out_of_the_pages_lead_to_the_repository(site):
    text = (site / "developing.html").read_text()
    found = re.findall(r'href="(https://github.com/someone/dora_mm/blob/main/[^"#]+)', text)
    assert found
    assert all((ROOT / each.partition("/main/")[2]).exists() for each in found)
    assert 'href="install.html#which-torch"' in (site / "index.html").read_text()


def test_the_api_is_the_public_surface(site):
    import dora_mm

    named = set(re.findall(r'id="dora_mm\.(\w+)"', (site / "api.html").read_text()))
    assert named == {name for name in dora_mm.__all__ if not name.startswith("__")}


def test_the_index_for_language_models_is_in_its_root_and_leads_to_markdown(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert "index.md" in links
    assert "https://github.com/someone/dora_mm/blob/main/AGENTS.md" in links
    assert [each for each in links if "://" not in each and not (site / each).exists()] == []


def test_nothing_is_loaded_from_another_host(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe|link rel="stylesheet")[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert not loaded, page


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium")
def test_the_start_page_opens_and_its_search_finds_pages(site, tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            """Nothing is logged."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with browser.opened(tmp_path) as page:
            for width in (1400, 390):
                page.open(f"http://127.0.0.1:{server.server_port}/index.html", width, 900)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                page.click("h1")
            page.evaluate("document.querySelector('.md-search__button').click()")
            page.wait_for("document.activeElement.shadowRoot?.activeElement?.tagName == 'INPUT'")
            page.press(*"magnitude")
            page.wait_for("document.activeElement.shadowRoot.textContent.includes('The layer')")
            assert page.problems == []
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("link", "problem"), [("layer.md#no-such-heading", "anchor does not exist"), ("no.md", "page does not exist")]
)
def test_a_dead_link_ends_the_build(link, problem, tmp_path):
    for name in ("docs", "dora_mm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("samples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    page = tmp_path / "docs" / "sdxl.md"
    page.write_text(f"{page.read_text()}\n[dead]({link})\n")
    done = build(tmp_path / "site", cwd=tmp_path)
    assert done.returncode != 0
    assert problem in done.stdout + done.stderr
