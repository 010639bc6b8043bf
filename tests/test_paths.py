"""Paths: resolved before they are judged, whatever way they are spelled, wherever they enter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_spdf.command_line import make_parser, path_text
from megatron_spdf.paths import expand_home, named_by, same_file
from megatron_spdf.recipe.finetune import Finetune
from megatron_spdf.recipe.load import load_recipe, make_recipe
from megatron_spdf.reports.runs import read_all

LAYOUT = ["v[1]/a.jsonl", "v[1]/b.jsonl", "v1/c.jsonl", "v2/d.jsonl", "v2/e[0].jsonl",
          "v2/e0.jsonl", "x/v[1]/f.jsonl", "y/v1/g.jsonl", "*/h.jsonl", ".hidden/i.jsonl"]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    for name in LAYOUT:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("pattern", "names"), [
    ("v[1]/*.jsonl", ["v[1]/a.jsonl", "v[1]/b.jsonl"]),  # and not those of v1
    ("v[1]/a.jsonl", ["v[1]/a.jsonl"]),
    ("v[12]/?.jsonl", ["v1/c.jsonl", "v2/d.jsonl"]),
    ("v2/e[0].jsonl", ["v2/e[0].jsonl"]),
    ("v2/e[01].jsonl", ["v2/e0.jsonl"]),
    ("[xy]/v[1]/*.jsonl", ["x/v[1]/f.jsonl", "y/v1/g.jsonl"]),  # in each as it is there
    ("*/h.jsonl", ["*/h.jsonl"]),
    ("**/g.jsonl", ["y/v1/g.jsonl"]),
    ("./v1/*", ["v1/c.jsonl"]),
    ("v1/../v2/d.jsonl", ["v1/../v2/d.jsonl"]),
    ("v3/*.jsonl", []),
    ("v1/c.jsonl/*", []),
    ("nothing", []),
])
@pytest.mark.parametrize("absolute", [False, True])
def test_what_exists_is_taken_before_a_pattern(tree, pattern, names, absolute):
    start = f"{tree}/" if absolute else ""
    assert named_by(start + pattern) == [start + name for name in names]


def test_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    roots = os.path.expanduser("~root")
    for path, meant in (("~", "/home/me"), ("~/a", "/home/me/a"), ("a/~", "a/~"),
                        ("./~/a", "./~/a"), ("a~", "a~"), ("~root/x", f"{roots}/x")):
        assert expand_home(path) == meant
    with pytest.raises(ValueError, match="there is no user 'nobody-such'.*write ./~nobody-such/a"):
        expand_home("~nobody-such/a")


def test_a_name_that_no_file_system_takes():
    for path in ("n" * 255, "a/" + "é" * 127 + "/b", "[" + "ab" * 200 + "]*.jsonl", "a/" * 500):
        assert expand_home(path) == path
    for path in ("n" * 256, "a/" + "é" * 128 + "/b"):
        with pytest.raises(ValueError, match="a name of 256 bytes.*shorten it"):
            expand_home(path)


def test_the_address_of_something_in_a_network_is_no_path():
    for path in ("s3://bucket/run", "https://example.com/a.jsonl", "file:///tmp/x"):
        with pytest.raises(ValueError, match="is an address, and only files of this machine"):
            expand_home(path)
        assert expand_home(f"./{path}") == f"./{path}"
    assert expand_home("a:b//c") == "a:b//c"


def test_links_in_a_circle_are_refused_where_a_recipe_or_a_run_is_named(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for path in (tmp_path / "a", tmp_path / "a/r.yaml"):
        with pytest.raises(ValueError, match="there is no recipe"):
            load_recipe(path)
        with pytest.raises(ValueError, match="is no run"):
            read_all([path])


def fields_of_paths(kind, place: str = ""):
    """Keys of a recipe that hold paths, by their description or name."""
    for name, field in kind.model_fields.items():
        words = f"{name} {field.description or ''}".lower()
        if hasattr(field.annotation, "model_fields"):
            yield from fields_of_paths(field.annotation, f"{place}{name}.")
        elif any(word in words for word in ("directory", "file", "prefix")) and "str" in str(
                field.annotation):
            yield f"{place}{name}"


@pytest.mark.parametrize("key", ["output", "data.train", "data.valid", "data.tokenizer",
                                 "data.index_cache", "deepspeed",
                                 "distill.teacher"])
def test_every_path_of_a_recipe_may_begin_with_it(recipe, monkeypatch, key):
    from megatron_spdf.recipe.recipe import Recipe

    monkeypatch.setenv("HOME", "/home/me")
    assert set(fields_of_paths(Recipe)) == {
        "output", "data.train", "data.valid", "data.tokenizer", "data.index_cache", "deepspeed",
        "distill.teacher"}
    values = recipe(engine="deepspeed").model_dump(exclude={"mup_base"})
    found = make_recipe(values, [f"{key}=~/x"], "r.yaml", rules=lambda _: [])
    for name in key.split("."):
        found = getattr(found, name)
    assert found in ("/home/me/x", ["/home/me/x"])
    with pytest.raises(ValueError, match=f"{key}.*no user 'nobody-such'"):
        make_recipe(values, [f"{key}=~nobody-such/x"], "r.yaml", rules=lambda _: [])


def test_and_of_a_blend_of_fine_tuning_and_of_the_recipe_that_is_extended(
        recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = recipe(data={"blend": [{"path": "~/pile/*", "weight": 1.0}]})
    assert made.data.blend[0].path == f"{tmp_path}/pile/*"
    (tmp_path / "base.yaml").write_text(
        "checkpoint: ~/start\noutput: ~/run\ndata: {task: e2e, path: ~/e2e}\n"
        "train: {global_batch: 8, micro_batch: 8}\noptimizer: {lr: 1e-4}\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/r.yaml").write_text("extends: ~/base.yaml\n")
    tuned = load_recipe("~/more/r.yaml", kind=Finetune, rules=lambda _: [])
    assert [tuned.checkpoint, tuned.output, tuned.data.path] == [
        f"{tmp_path}/{name}" for name in ("start", "run", "e2e")]


@pytest.fixture
def parser():
    parser = make_parser("")
    parser.add_argument("place", nargs="?", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--prefix", type=path_text)
    parser.add_argument("--input", nargs="+", default=["none"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--set", nargs="?", const="all")
    parser.add_argument("--rank", action="append")
    parser.add_argument("--json", action="store_true")
    return parser


def test_options_that_are_given_again(parser, capsys):
    assert parser.parse_args(["--input", "a", "--json", "--input", "b", "c"]).input == ["a", "b",
                                                                                         "c"]
    assert parser.parse_args(["--workers", "4", "--workers", "8", "--json"]).workers == [4, 8]
    assert parser.parse_args([]).input == ["none"]
    assert parser.parse_args(["--json", "--json", "--rank", "1", "--rank", "2"]).rank == ["1", "2"]
    assert parser.parse_intermixed_args(["--prefix", "x", "place", "--json"]).prefix == "x"
    assert parser.parse_args(["--prefix", "y"]).prefix == "y"  # of another command line
    for words in (["--output", "a", "-o", "a"], ["--prefix", "a", "--prefix", "b"],
                  ["--set", "--set", "x"], ["--set=", "--set=b"]):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(words)
        assert ended.value.code == 2 and "is given twice; give it once" in capsys.readouterr().err


def test_paths_of_options(parser, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    found = parser.parse_args(["~/a", "--output=~/b", "--prefix=~/c/"])
    assert (found.place, found.output, found.prefix) == (Path("/home/me/a"), Path("/home/me/b"),
                                                         "/home/me/c/")
    for words in (["~nobody-such"], ["--prefix=~nobody-such"]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert "there is no user 'nobody-such'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[""], ["x", "--output="], ["x", "--prefix", ""]], ids=str)
def test_an_empty_path_is_refused(parser, capsys, words):
    """As where a variable of a shell is not set: it would be the working directory."""
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words)
    assert ended.value.code == 2 and "a path is empty; name a file or" in capsys.readouterr().err


def test_links_in_a_circle_are_walked_once(tree):
    """Two of them make more ways than anyone walks."""
    for place, to in {"v1/round": ".", "v1/up": "..", "v2/other": "../v1", ".dark": "v1"}.items():
        (tree / place).symlink_to(to)
    (tree / "v1/deep").mkdir()
    (tree / "v1/deep/z.jsonl").touch()
    found = named_by("v1/**/*.jsonl")
    assert {"v1/c.jsonl", "v1/deep/z.jsonl"} <= set(found)
    assert len({os.path.realpath(name) for name in found}) == len(found)
    assert not any("round/" in name or "dark" in name for name in found)
    assert {"v2/d.jsonl", "v2/other/c.jsonl"} <= set(named_by("v2/**/*.jsonl"))
    assert "v1/deep/z.jsonl" in named_by("v1/**") and "v1/deep" in named_by("**/deep")


def test_a_path_has_no_control_character():
    """It would cut the lines of the logs that name it."""
    for path in ("runs/a\nb", "a\x1b[2J", "\r"):
        with pytest.raises(ValueError, match="has the control character .*; rename what it names"):
            expand_home(path)
    assert expand_home("runs/ü \u2028b") == "runs/ü \u2028b"


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_one_file_under_two_names(tree, link):
    link(tree / "v1/c.jsonl", tree / "c.jsonl")
    paths = [tree / name for name in ("v2/d.jsonl", "v1/c.jsonl", "c.jsonl")]
    assert same_file(paths) == (paths[1], paths[2]) and same_file(paths[:2]) is None
