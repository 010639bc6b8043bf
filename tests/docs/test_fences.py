"""Every code block of every page is run or checked by a test that it names, or says why not; the
words of every command are those that the project has."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from pages import ALL, MEASURED, PAGES, ROOT, STARTS, Block, commands, name, spans

from megatron_spdf.recipe.finetune import load_finetune
from megatron_spdf.recipe.load import make_recipe, recipe_values
from megatron_spdf.records.yaml_reader import parse_yaml

BASE, TASK = ROOT / "configs/pretrain/gpt2_small_s75.yaml", ROOT / "configs/finetune/jsonl.yaml"
MADE_BY_USERS = "launch/site.sh"
KEY = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
# Words of other tools in a chain, and values that stand for a reader's own.
STANDS_FOR = re.compile(r"^(preprocess|score|finetune|distill)\.|\$|=[A-Z]+$|=my_")
LLAMA = "configs/pretrain/llama_tiny.yaml"
ROOMS = {"pretrain.py": "megatron_spdf/training/job.py",
         "finetune.py": "megatron_spdf/training/job.py"}  # whose options are in the package
RECIPES = re.compile(r"plan|coord_check|benchmark|pretrain")
TASKS = re.compile(r"sweep|finetune")


def numbered(found: list[Block]):
    return pytest.mark.parametrize("block", found, ids=str)


@numbered([block for block in ALL if not block.page.startswith(MEASURED)
           and not (block.language == "yaml" and not block.mark)])
def test_a_block_is_run_or_says_why_not(block):
    assert block.mark, f"{block}: put a mark above it, see tests/docs/pages.py"
    assert block.language != "bash" or block.mark in ("run", "same"), f"{block}: sh is not run"
    if block.mark in ("run", "checked"):
        path = re.match(r"tests/[\w/]+\.py", block.said)[0]
        assert Path(block.page).name in (ROOT / path).read_text(), f"{path} does not name the page"
    elif block.mark == "same":
        run = [words for other in ALL if other.page == block.said and other.mark == "run"
               for words in commands(other.text)]
        assert commands(block.text) and all(words in run for words in commands(block.text)), block
    elif block.mark == "not run":
        assert len(block.said.split()) >= 3, f"{block}: say why it is not run"
    else:
        assert not any(STARTS.match(line.strip()) for line in block.text.splitlines()), block


@numbered([block for block in ALL if block.language == "yaml" and block.mark != "not run"])
def test_yaml_is_of_a_recipe(block):
    values = parse_yaml(block.text.replace(", ...", ""), name=str(block))
    values.pop("extends", None)
    values.pop("distill", None)  # its teacher has to be there
    base = recipe_values(ROOT / LLAMA if "architecture" in block.text else BASE)
    merged = {key: {**base[key], **value} if isinstance(value, dict) and isinstance(
        base.get(key), dict) else value for key, value in values.items()}
    made = {**base, "parallel": {}, **merged}
    if "stages" in made:
        del made["sparsity"]
    if "blend" in made["data"]:
        made["data"].pop("train")
    make_recipe(made, (), str(block))


@numbered([block for block in ALL if block.language in ("", "sh", "bash")])
def test_the_words_of_commands_are_there(block):
    for words in commands(block.text):
        check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_words_of_commands_in_running_text_are_there(page):
    for span in spans(page):
        for words in commands(span):
            check_command(words)


def check_command(words: list[str]) -> None:
    """Asserts that a command's script, options, recipe and keys exist.

    Args:
        words: as a shell splits them.
    """
    script = next((word for word in words if re.search(r"(^|/)\w+\.(py|sh)$", word)), None)
    if script == MADE_BY_USERS:
        return
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
        assert {word for word in words[1:] if "=" not in word} <= targets, words
        return
    if script is None or not (ROOT / script).exists():
        ours = ("tools/", "launch/", "docs/", "tests/")
        assert script is None or "/" in script and not script.startswith(ours), words
        return  # of another project
    given = words[words.index(script) + 1:]
    if script.endswith(".py"):
        known = options_of(script)
        missing = {word.split("=")[0] for word in given if word.startswith("--")} - known
        assert not missing, f"{script} has no {missing}"
    check_keys(script, given)


@cache
def options_of(script: str) -> set[str]:
    """Options that a script's source names."""
    text = "".join((ROOT / path).read_text() for path in (script, ROOMS.get(script, script)))
    return {"--help", *re.findall(r"--[a-z][a-z-]*", text)}


def check_keys(script: str, given: list[str]) -> None:
    """Asserts that recipes of a command exist and that its overrides make a valid one of them."""
    files = [word for word in given if word.endswith(".yaml")]
    for file in files:
        shipped = file.startswith("configs/") and "$" not in file
        assert not shipped or (ROOT / file).exists(), file
    own = next((ROOT / file for file in files if (ROOT / file).exists()), None)
    if script.startswith("launch/finetune"):
        own = own or ROOT / f"configs/finetune/{given[0]}.yaml"
    keys = [word for word in given if KEY.match(word) and not STANDS_FOR.search(word)]
    if script.startswith("launch/"):
        keys = ["parallel.data=auto", *keys]
    if TASKS.search(script) and "spdf" not in script:
        load_finetune(own or TASK, [word for word in keys if not word.startswith("checkpoint=")]
                      + ["checkpoint=runs/mine"], 8)
    elif RECIPES.search(script) or "convert" in script:
        values = recipe_values(own or BASE)
        values.pop("distill", None)  # its teacher has to be there
        make_recipe(values, keys, str(own or BASE), 16)
