"""The written pages: every link leads somewhere, every generated page is the generated one, every command exists."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_distill.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
NAMES = re.compile(r"^::: (\S+)$", re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as they are derived on a forge and on the site alike."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Files of relative links exist, and so do the headings that anchors name."""
    broken = []
    for match in LINK.finditer(prose(page)):
        target, _, anchor = (match[1] or match[2]).partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(match[0])
    assert broken == []


def test_pages_of_the_site_link_within_it() -> None:
    """The site holds docs/ alone: a page there that names a file elsewhere would have a dead link."""
    docs = ROOT / "docs"
    for page in docs.rglob("*.md"):
        for match in LINK.finditer(prose(page)):
            target = (match[1] or match[2]).partition("#")[0]
            if target and "://" not in target:
                assert (page.parent / target).resolve().is_relative_to(docs), (page.name, match[0])


def test_every_page_is_in_the_menu() -> None:
    """A page that no menu names is found by nobody."""

    class Loader(yaml.SafeLoader):
        """Reads the site's settings; what they name of Python is not needed here."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)

    def files(entry: object) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        values = entry.values() if isinstance(entry, dict) else entry
        return set().union(*(files(value) for value in values))

    written = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert files(settings["nav"]) == written


def test_documented_functions_exist_and_are_explained() -> None:
    """Every name of the page of functions can be imported and has a docstring."""
    import pkgutil

    names = NAMES.findall((ROOT / "docs" / "api.md").read_text())
    assert len(names) >= 25
    for name in names:
        assert pkgutil.resolve_name(name).__doc__, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    """Every ``megatron-distill COMMAND`` of a page is one."""
    assert set(re.findall(r"^megatron-distill +([a-z][a-z-]*)", page.read_text(), re.MULTILINE)) <= set(COMMANDS)
