"""Links and names of all pages lead somewhere, the index has every page, and the pictures are those
that their script draws."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from pages import PAGES, ROOT, name

from megatron_spdf.recipe.finetune import Finetune
from megatron_spdf.recipe.load import load_recipe

sys.path.insert(0, str(ROOT / "docs/figures"))
import draw  # noqa: E402

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)|(?:src|srcset)=\"([^\"]+)\"")
COMING = (ROOT / "docs/coming_from.md").read_text()


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target, anchor, source in LINK.findall(page.read_text()):
        there = page.parent / (target or source) if target or source else page
        assert there.exists(), f"{name(page)} links to {target or source}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{name(page)} links to {target}#{anchor}"


def test_the_index_has_every_page():
    index = (ROOT / "docs/README.md").read_text()
    pages = [page for page in PAGES if page.is_relative_to(ROOT / "docs")]
    missing = [name(page) for page in pages if page.name != "README.md"
               and f"({page.relative_to(ROOT / 'docs')})" not in index]
    assert not missing


def test_the_readme_links_every_page_of_the_manual():
    readme = (ROOT / "README.md").read_text()
    missing = [page.name for page in ROOT.glob("docs/*.md")
               if page.name != "README.md" and f"(docs/{page.name}" not in readme]
    assert not missing


def test_pictures_are_those_that_the_script_draws():
    for file, content in draw.files().items():
        assert (ROOT / "docs/figures" / file).read_text() == content, "run docs/figures/draw.py"


def test_the_picture_of_the_parts_names_the_files_of_the_page():
    page = (ROOT / "docs/how_it_works.md").read_text()
    rows = re.findall(r"^\| (\w+) \| `(megatron_spdf/\S+)` \|", page, re.M)
    picture = (ROOT / "docs/figures/parts.svg").read_text()
    assert len(rows) == 7
    for part, file in rows:
        assert (ROOT / file).exists() and f">{part}<" in picture
        assert f">{file.removeprefix('megatron_spdf/')}<" in picture


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_folders_that_pages_name_exist(page):
    named = re.findall(r"`((?:megatron_spdf|tests|tools|launch|docs|docker)/[\w/]*/)`",
                       page.read_text())
    assert not (missing := [folder for folder in named if not (ROOT / folder).is_dir()]), missing


def known_keys() -> set[str]:
    """Every `section.key` of recipes, those of Llama, RigL and fine-tuning too."""
    llama = load_recipe(ROOT / "configs/pretrain/llama_tiny.yaml")
    moving = load_recipe(ROOT / "configs/pretrain/gpt2_small_s75_rigl.yaml")

    def keys(value, above: str = "") -> set[str]:
        found = set()
        for key in type(value).model_fields if hasattr(type(value), "model_fields") else ():
            found |= {above + key, *keys(getattr(value, key), f"{above}{key}.")}
        return found

    return {*keys(llama), *keys(moving), *Finetune.model_fields}


def test_names_of_this_project_are_keys_of_a_recipe():
    ours = {cell for row in re.findall(r"^\|[^|]*\|(.*)\|$", COMING, re.M)
            for cell in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)(?:=\S*)?`", row)
            if not cell.endswith(".py")}
    assert not (ours - known_keys()), ours - known_keys()
    assert len(ours) > 40


def test_commands_of_this_project_exist():
    for script in re.findall(r"\|[^|]*`((?:tools/)?\w+\.py)\b", "\n".join(
            row.split("|", 2)[2] for row in COMING.splitlines() if row.startswith("| "))):
        assert (ROOT / script).exists(), script
