"""docs/llms.txt, an index of the pages for language models (llmstxt.org); `python -m tests.documented.llms` writes it.

From the contents of the site, the title of each page and the first sentence of its text.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
INDEX = DOCS / "llms.txt"
OUTSIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}
MADE = {"api.md", "examples.md"}  # with the site
OPTIONAL = "Checked"  # the chapter of pages that an answer seldom needs: figures and how they were measured
FENCE = re.compile(r"^```.*?^```\n?", re.MULTILINE | re.DOTALL)
SENTENCE = re.compile(r"(.+?)(?::$|[.!?](?=\s+[A-Z\d\"*`(\[]|$))", re.DOTALL)
CHAPTERS = re.compile(r"\[[^\]]*\]\(#")  # the links to chapters that a long page begins with
LINKED = re.compile(r"\[((?:[^\]\[]|\[[^\]]*\])*)\]\([^)\s]+\)")
ABOUT = """\
`pip install` names, commands and Python calls are those of the pages below. `dora-mm --help` lists the commands,
`dora-mm schema` prints the keys of every config as JSON Schema, and `dora-mm check` says what a machine can train.
Whoever changes the code reads [AGENTS.md](../AGENTS.md) first.
"""


def index() -> str:
    """The index: a section for each chapter of the contents, a line for each page."""
    site = yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8"))
    start, *chapters = [each for each in chapters_of(site["nav"]) if each[1]]
    chapters.sort(key=lambda chapter: chapter[0] == OPTIONAL)
    head = f"# {site['site_name']}\n\n> {summary(start[1][0])}\n\n{ABOUT}"
    sections = (section("Optional" if name == OPTIONAL else name, pages) for name, pages in [start, *chapters])
    return head + "".join(sections)


def chapters_of(contents: list[dict[str, Any]]) -> Iterator[tuple[str, list[Path]]]:
    """The chapters with those of their pages that are files here."""
    for entry in contents:
        for name, pages in entry.items():
            listed = pages if isinstance(pages, list) else [pages]
            yield (
                name,
                [ROOT / OUTSIDE[each] if each in OUTSIDE else DOCS / each for each in listed if each not in MADE],
            )


def section(name: str, pages: list[Path]) -> str:
    return f"\n## {name}\n\n" + "".join(line(page) for page in pages)


def line(page: Path) -> str:
    """The link to a page, and what it is about."""
    path = page.relative_to(DOCS) if page.is_relative_to(DOCS) else Path("..") / page.relative_to(ROOT)
    title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    return f"- [{title}]({path.as_posix()}): {summary(page)}\n"


def summary(page: Path) -> str:
    """The first sentence of a page's text, without its links."""
    text = FENCE.sub("", page.read_text(encoding="utf-8")).partition("\n")[2]
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(LINKED.sub(r"\1", paragraph).split())
        is_prose = words and words[0] not in "#|!<>" and not CHAPTERS.match(paragraph)
        if is_prose and (found := SENTENCE.match(words)):
            return f"{found[1][0].upper()}{found[1][1:]}."
    raise ValueError(f"{page}: no sentence was found in its text.")


if __name__ == "__main__":
    INDEX.write_text(index(), encoding="utf-8")
