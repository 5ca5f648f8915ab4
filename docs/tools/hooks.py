"""Hooks of mkdocs: pages that are made from other files, and links between them.

README, CHANGELOG, CONTRIBUTING and SECURITY become pages. Results become files of the site. The references of settings
and commands are generated. Links of the repository are rewritten for the site.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ROOMS = ("pipelines", "rewards", "scripts")
PACKAGE = ROOT / "build" / "package"
"""Folder with the package as it is installed, for mkdocstrings: rooms of the root lie in `diffalign`."""
ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"\[([^\]\[]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_startup(**_: Any) -> None:
    """Copy the sources for mkdocstrings, in the layout of the installed package."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    for room in ("diffalign", *ROOMS):
        target = PACKAGE / "diffalign" / ("" if room == "diffalign" else room)
        for source in sorted((ROOT / room).rglob("*.py")):
            copy = target / source.relative_to(ROOT / room)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def on_files(files: Files, config: Any) -> Files:
    """Add generated pages and the committed results."""
    from mkdocs.structure.files import File

    from docs.tools import commands, settings

    for source, page in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "settings.md", content=settings.page()))
    files.append(File.generated(config, "commands.md", content=commands.page()))
    for result in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        name = f"results/{result.name}"
        files.append(File.generated(config, name, abs_src_path=str(result)))
    return files


def site_target(target: str, page: str) -> str | None:
    """Return where a link of the repository leads on the site; None if it leads out of the site.

    Args:
        target: path in the link, without an anchor.
        page: path of the page in the site.
    """
    if re.match(r"[a-z]+:", target):
        return target
    names = {name: source for source, name in ROOT_PAGES.items()}
    folder = ROOT if page in names else (ROOT / "docs" / page).parent
    path = (folder / target).resolve()
    if not path.is_relative_to(ROOT):
        return None
    source = path.relative_to(ROOT).as_posix()
    if source in ROOT_PAGES:
        place = ROOT_PAGES[source]
    elif source.startswith("docs/"):
        place = source.removeprefix("docs/")
    elif source.startswith("benchmarks/results/") and source.endswith(".json"):
        place = source.removeprefix("benchmarks/")
    else:
        return None
    return "../" * page.count("/") + place


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links; a link that leads out of the site becomes its text."""

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match.groups(default="")
        place = site_target(target, page.file.src_uri)
        return f"[{text}]({place}{anchor})" if place else text

    text = re.sub(r"<!-- (?:table: [a-z0-9-]+|end) -->\n", "", markdown)
    return LINK.sub(rewritten, text)
