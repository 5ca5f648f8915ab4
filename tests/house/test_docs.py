"""The documentation: links, navigation, generated pages and tables of results."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import yaml

from diffalign.config import load, recipes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

from docs.tools import commands, hooks, settings, tables  # noqa: E402

PAGES = sorted({*ROOT.glob("*.md"), *tables.pages()})
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")
GENERATED = {*hooks.ROOT_PAGES.values(), "settings.md", "commands.md"}


class Loader(yaml.SafeLoader):
    """Reader of mkdocs.yml, which names a Python function."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *_: None)


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)


def slugs(page):
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    names = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", name).replace("`", "") for name in names]
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", name.lower()).strip()) for name in plain}


def nav_pages(entries):
    for entry in entries:
        for value in entry.values():
            yield from nav_pages(value) if isinstance(value, list) else (value,)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        made = place.parent == DOCS and place.name in GENERATED
        assert made or place.exists(), target
        if anchor and not made:
            assert anchor in slugs(place), target


def test_navigation_names_every_page():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    named = list(nav_pages(config["nav"]))
    there = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}
    assert len(named) == len(set(named))
    assert set(named) == there | GENERATED


@pytest.mark.parametrize(
    ("target", "page", "place"),
    [
        ("docs/awm.md", "index.md", "awm.md"),
        ("CONTRIBUTING.md", "index.md", "contributing.md"),
        ("../awm.md", "tutorials/awm.md", "../awm.md"),
        ("../../CONTRIBUTING.md", "guides/own-reward.md", "../contributing.md"),
        ("../benchmarks/results/awm.json", "papers.md", "results/awm.json"),
        ("tests/parity", "index.md", None),
        ("https://arxiv.org/abs/2509.25050", "papers.md", "https://arxiv.org/abs/2509.25050"),
    ],
)
def test_links_are_rewritten_for_the_site(target, page, place):
    assert hooks.site_target(target, page) == place


def keys_of(config, prefix=""):
    """Full names of the settings of a configuration."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from keys_of(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


@pytest.mark.parametrize("recipe", recipes())
def test_every_setting_is_in_the_reference(recipe):
    headings = set(re.findall(r"^### `(.+)`$", settings.page(), re.M))
    assert set(keys_of(load(recipe))) <= headings


def test_every_command_is_in_the_reference():
    page = commands.page()
    for verb in ("train", "generate", "evaluate fid", "evaluate wins", "qsched", "serve-rewards"):
        assert f"## `diffalign {verb}`" in page
    assert "--output_dir DIR" in page


def test_every_setting_has_a_text():
    assert [name for name, setting in settings.settings().items() if not setting.text] == []


def test_reference_shows_defaults_and_flags():
    entries = settings.settings()
    assert entries["algorithm.kl_beta"].defaults["flow_grpo"] == "0.04"
    assert "inversion_dpo" not in entries["algorithm.kl_beta"].defaults
    assert "learning_rate" in settings.flags()["optimizer.learning_rate"]
    assert "Largest decay of the averaged weights" in entries["training.ema_max"].text


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "<!-- table: " in p.read_text()], ids=lambda p: p.name
)
def test_tables_show_the_committed_results(page):
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "write it anew: python docs/tools/tables.py"


def test_results_hold_what_the_readme_says():
    for file in sorted(tables.RESULTS.glob("*.json")):
        result = tables.result(file.stem)
        assert "command" in result or "commands" in result
        assert "versions" in result


def test_citation_and_templates_are_valid():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["references"]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert "body" in content or "blank_issues_enabled" in content


def test_examples_are_short():
    for example in (ROOT / "examples").glob("*.py"):
        assert len(example.read_text(encoding="utf-8").splitlines()) <= 40, example.name
