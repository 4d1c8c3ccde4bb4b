"""Builds the site of the documentation, strictly: a dead link or anchor ends it.

    python docs/site/build.py build/site              # with pictures of what commands write: some minutes
    python docs/site/build.py build/site --without-examples

The pages are those of docs/, with README.md as the first one. Links to files outside of docs/ lead to the repository.
docs/llms.txt is published with them, and the Markdown of each page.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dora_mm

ROOT = Path(__file__).resolve().parents[2]
DOCS, SITE = ROOT / "docs", ROOT / "docs" / "site"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}  # outside of docs/
REPOSITORY = "https://github.com/{}/blob/main/"
LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)
EXAMPLES = {  # what commands write, with the embedded models: title, text, the file, and the commands before it
    "A contact sheet": (
        "The prompts of a training, without and with its adapter.",
        "runs/demo/001/sheet.png",
        ["train configs/sdxl/demo.yaml"],
    ),
    "The page of a training": (
        "What it generates, step by step, while it trains.",
        "runs/demo/001/gallery/index.html",
        [],
    ),
    "A gallery": (
        "The images of runs, to filter, sort and compare.",
        "runs/eval_demo/001/gallery/index.html",
        ["eval configs/sdxl/eval_demo.yaml", "gallery runs/eval_demo/001"],
    ),
    "Answers": (
        "The answers to held-out questions, with their scores.",
        "runs/eval_demo_vl/001/examples.html",
        ["train configs/vl_bart/demo.yaml", "eval configs/vl_bart/eval_demo.yaml --set adapter=runs/demo_vl/001"],
    ),
}


def main() -> None:
    """Prepares the pages, and builds the site from them."""
    parser = argparse.ArgumentParser(description="Build the site of the documentation.")
    parser.add_argument("folder", type=Path, help="what is built, and its pages")
    parser.add_argument("--without-examples", action="store_true", help="leave out what commands write")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    pages = folder / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    repository = REPOSITORY.format(os.environ.get("GITHUB_REPOSITORY", "OWNER/dora_mm"))
    for source, name in sources():
        text = source.read_text(encoding="utf-8")
        write(pages / name, with_links(text, source, Path(name), repository))
        for file in pictures_in(text, source):
            copy(file, pages / "pictures" / file.relative_to(ROOT))
    write(pages / "api.md", api())
    write(pages / "examples.md", "# Examples\n\n" if arguments.without_examples else examples(folder, pages))
    shutil.copy(SITE / "extra.css", pages)
    shutil.copy(SITE / "mkdocs.yml", folder)
    zensical = Path(sys.executable).with_name("zensical")
    subprocess.run([zensical, "build", "--clean", "--strict", "-f", folder / "mkdocs.yml"], check=True, cwd=folder)
    publish_texts(pages, folder / "public", repository)
    print(f"site  {folder / 'public' / 'index.html'}")


def sources() -> Iterator[tuple[Path, str]]:
    """The pages in the repository, with their names on the site."""
    yield from ((ROOT / name, page) for name, page in PAGES.items())
    for path in sorted(DOCS.rglob("*.md")):
        yield path, path.relative_to(DOCS).as_posix()


def publish_texts(pages: Path, public: Path, repository: str) -> None:
    """Puts llms.txt into the root of the site, and beside each page its Markdown, to which that leads."""
    index = DOCS / "llms.txt"
    write(public / index.name, with_links(index.read_text(encoding="utf-8"), index, Path(index.name), repository))
    for page in pages.rglob("*.md"):
        copy(page, public / page.relative_to(pages))


def with_links(text: str, source: Path, name: Path, repository: str) -> str:
    """A page whose links lead to pages of the site, or to the repository.

    Args:
        text: The page.
        source: Its file in the repository.
        name: Its name on the site.
        repository: Where the files of the repository are shown, with a slash at the end.
    """
    parts = FENCE.split(text)  # code has no links
    return "".join(
        part if number % 2 else LINK.sub(lambda found: link(found, source, name, repository), part)
        for number, part in enumerate(parts)
    )


def link(found: re.Match[str], source: Path, name: Path, repository: str) -> str:
    """One link of a page, rewritten."""
    mark, text, target = found.groups()
    if target.startswith(("http:", "https:", "mailto:", "#")):
        return found[0]
    path, hash_, anchor = target.partition("#")
    file = Path(os.path.normpath(source.parent / path))
    if mark:
        there = Path("pictures") / file.relative_to(ROOT)
    elif file.suffix == ".md" and file.is_relative_to(DOCS):
        there = file.relative_to(DOCS)
    elif file.parent == ROOT and file.name in PAGES:
        there = Path(PAGES[file.name])
    else:
        return f"{mark}[{text}]({repository}{file.relative_to(ROOT).as_posix()}{hash_}{anchor})"
    relative = os.path.relpath(there, name.parent).replace(os.sep, "/")
    return f"{mark}[{text}]({relative}{hash_}{anchor})"


def api() -> str:
    """The page of the public functions and classes, from their docstrings."""
    names = sorted(name for name in dora_mm.__all__ if not name.startswith("__"))
    listed = "\n".join(f"::: dora_mm.{name}\n" for name in names)
    return f"# Python API\n\nWhat `import dora_mm` offers. The [layer](layer.md) explains it.\n\n{listed}"


def examples(folder: Path, pages: Path) -> str:
    """The page of what commands write, which are run in a folder beside the site."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    for name in ("samples", "configs"):
        if not (work / name).exists():
            (work / name).symlink_to(ROOT / name)
    text = "# Examples\n\nWritten by these commands, with the small models of `samples/`.\n"
    for title, (about, file, commands) in EXAMPLES.items():
        if not (work / file).exists():
            for command in commands:
                subprocess.run([sys.executable, "-m", "dora_mm", *command.split()], check=True, cwd=work)
        there = Path("examples") / title.lower().replace(" ", "-")
        shown = f"![{title}]({there.as_posix()}/{Path(file).name})"
        if file.endswith(".html"):
            shutil.copytree((work / file).parent, pages / there, dirs_exist_ok=True)
            page = f"{there.as_posix()}/{Path(file).name}"
            shown = f'<iframe class="example" src="{page}" title="{title}"></iframe>'
            shown += f'\n\n<a href="{page}">Open it alone</a>'
        else:
            copy(work / file, pages / there / Path(file).name)
        typed = "\n".join(f"dora-mm {command}" for command in commands)
        text += f"\n## {title}\n\n{about}\n\n{shown}\n" + (f"\n```\n{typed}\n```\n" if typed else "")
    return text


def pictures_in(text: str, source: Path) -> list[Path]:
    """The files of a page's pictures."""
    shown = (target for part in FENCE.split(text)[::2] for mark, _, target in LINK.findall(part) if mark)
    return [Path(os.path.normpath(source.parent / target)) for target in shown if "://" not in target]


def copy(file: Path, path: Path) -> None:
    """Copies a file into a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, path)


def write(path: Path, text: str) -> None:
    """Writes a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
