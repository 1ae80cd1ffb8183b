"""Links lead somewhere, every page is in the navigation, and the YAML of the guides is accepted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from example_folders import make_example_folders

from gradmerge.cli import main
from gradmerge.cli.main import learn

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *PAGES]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS, ids=relative)
def test_links_lead_somewhere(page):
    lost = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose(page)):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        generated = anchor.startswith("gradmerge.")  # of a docstring; `scripts/docs.sh` checks it
        if not path.exists() or (anchor and not generated and anchor not in anchors(path)):
            lost.append(f"{target}#{anchor}")
    assert not lost


def test_pages_link_only_to_pages_and_images():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", prose(page)):
            if "://" not in target:
                assert (page.parent / target).resolve().is_relative_to(DOCS), (page, target)


def entries(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for inner in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(inner)


def test_every_page_is_in_the_navigation_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(entries(nav)) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


@pytest.mark.parametrize("page", TEXTS, ids=relative)
def test_named_files_exist(page):
    pattern = r"\b(?:configs|scripts|docs)/[\w/-]+\.(?:yaml|sh|py|md)|\bbenchmarks/[\w/]+\.py"
    lost = [path for path in re.findall(pattern, page.read_text()) if not (ROOT / path).is_file()]
    assert not lost


def examples() -> Iterator[Any]:
    """YAML files that the guides show whole: their first line is a comment with a name."""
    for page in PAGES:
        for block in re.findall(r"^( *)```yaml\n(.*?)^\1```", page.read_text(), re.M | re.S):
            text = re.sub(rf"^{block[0]}", "", block[1], flags=re.MULTILINE)
            named = re.match(r"# ([\w-]+\.yaml)\n", text)
            if named:
                yield pytest.param(named[1], text, id=f"{page.stem}-{named[1]}")


@pytest.mark.parametrize(("name", "text"), examples())
def test_yaml_of_the_guides_is_accepted(name, text, tmp_path, monkeypatch):
    make_example_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    found = yaml.safe_load(text)
    if "recipe" in found:
        assert main(["merge", "--config", name, "--output", "merged"]) == 0
        return
    files = [name]
    if "model" not in found:  # a file to add to learn.yaml
        (whole,) = (p.values[1] for p in examples() if p.id == "learn-learn.yaml")
        Path("learn.yaml").write_text(whole)
        files = ["learn.yaml", name]
    built = learn([argument for file in files for argument in ("--config", file)], run=False)
    assert (built.job if "driver" in found else built.model) is not None
