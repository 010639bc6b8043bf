"""The package as it is installed: all that it needs at run time is in the wheel; extras, pins and
versions agree."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import megatron_spdf

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
# What a user of the installed library does first.
USE = """
import megatron_spdf, torch
from megatron_spdf import densify, sparsify
model = sparsify(torch.nn.Linear(64, 64), 0.75)
x = torch.ones(1, 64)
before = model(x)
densify(model)
assert torch.equal(model(x), before)
print(megatron_spdf.__version__, megatron_spdf.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by the backend that is installed, in a copy of what it reads."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    shutil.copytree(ROOT / "megatron_spdf", place / "megatron_spdf",
                    ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index",
                    "--no-build-isolation", "--wheel-dir", place / "dist", place],
                   check=True, capture_output=True, timeout=300)
    (built,) = (place / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_spdf").rglob("*")
             if path.is_file() and path.suffix != ".pyc"}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == there and any(name.endswith(".css") for name in held)


@pytest.mark.slow
def test_the_wheel_says_what_the_project_says(wheel):
    archive = zipfile.ZipFile(wheel)
    (file,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    said = email.message_from_bytes(archive.read(file))
    assert (said["Name"], said["Version"]) == ("megatron_spdf", megatron_spdf.__version__)
    assert (said["License-Expression"] or said["License"]) == "Apache-2.0"
    wanted = said.get_all("Requires-Dist")
    assert all(any(line.startswith(name) for line in wanted) for name in
               ("torch==", "megatron-core==", "deepspeed==", "pydantic=="))
    assert set(said.get_all("Provides-Extra")) == set(EXTRAS)


@pytest.mark.slow
def test_what_is_installed_works_away_from_the_repository(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
                    "--target", tmp_path / "site", wheel], check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", USE], cwd=tmp_path, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
                          capture_output=True, check=False)
    assert not done.returncode, done.stderr
    version, file = done.stdout.split()
    assert version == megatron_spdf.__version__
    assert Path(file) == tmp_path / "site/megatron_spdf/__init__.py"


def pins(name: str) -> dict[str, str]:
    """Package -> version of a requirements file."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;#]+)", (ROOT / name).read_text(), re.M))


def test_extras_are_pinned_as_in_the_requirements():
    both = {**pins("requirements.txt"), **pins("requirements-dev.txt")}
    for extra, lines in EXTRAS.items():
        for line in lines:
            name, version = line.split("==")
            assert both.get(name, version) == version, f"{extra}: {line} and {name}=={both[name]}"
            assert name not in pins("requirements.txt"), f"{name} is no extra: all need it"
    assert pins("requirements-dev.txt")["pyarrow"]  # or its tests would all be skipped


def test_the_version_stands_in_one_place_and_is_the_newest_of_the_changelog():
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "megatron_spdf.version.__version__"}
    released = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == megatron_spdf.__version__
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == megatron_spdf.__version__


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog") and "keepachangelog.com/en/1.1.0" in text
    assert re.findall(r"^## (.+)$", text, re.M)[0] == "[Unreleased]"
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_has_what_its_schema_asks_for():
    """As `cffconvert --validate` of version 1.2.0 of the format, of which these are the rules."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"authors", "cff-version", "message", "title"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert cited["license"] == PROJECT["project"]["license"]
    for reference in [cited, *cited["references"]]:
        assert reference["authors"] and reference["title"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")),
                         ids=lambda path: path.name)
def test_templates_are_forms_of_github(path):
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= form.keys()
    assert all(part["type"] in ("markdown", "input", "textarea", "dropdown", "checkboxes")
               for part in form["body"])
    named = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(set(named)) == len(named)
    assert all(part["attributes"].get("label") for part in form["body"] if "id" in part)
