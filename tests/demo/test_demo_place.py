"""Where the demo works: its own directories only; an interrupted one goes on, an ended one begins
anew."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "demo", raising=False)
    return importlib.import_module("demo")


@pytest.fixture
def make(tool, tmp_path):
    def make(*overrides: str):
        demo = tool.Demo(tmp_path / "out", list(overrides))
        demo.output.mkdir(exist_ok=True)
        return demo
    return make


def test_an_interrupted_demo_goes_on_and_an_ended_one_begins_anew(tool, make):
    demo = make()
    assert not tool.make_room(demo)
    (demo.output / "dense").mkdir()
    assert tool.make_room(make()) and (demo.output / "dense").exists()
    assert not tool.make_room(make("seed=5")) and not (demo.output / "dense").exists()
    (demo.output / "dense").mkdir()
    (demo.output / tool.TABLES).write_text("ended")
    assert not tool.make_room(make("seed=5")) and not (demo.output / "dense").exists()


def test_no_other_directory_is_emptied(tool, make, tmp_path, capsys):
    (make().output / "thesis.txt").write_text("mine")
    assert tool.main(["--output", str(tmp_path / "out")]) == 2
    assert "such as thesis.txt; remove it, or give another --output" in capsys.readouterr().err
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(("word", "said"), [("optimizer.zzz=1", "unknown key optimizer.zzz"),
                                            ("parallel.tensor=3", "parallel.tensor=3")])
def test_a_wrong_override_is_refused_first(tool, tmp_path, capsys, word, said):
    assert tool.main(["--output", str(tmp_path / "new"), word]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_two_demos_do_not_work_in_one_directory(tool, make, capsys):
    demo = make()
    with tool.locked(demo.output / tool.LOCK, wait=False):
        assert tool.main(["--output", str(demo.output)]) == 2
    assert "another demo is at work" in capsys.readouterr().err


def test_it_says_first_what_it_will_do(tool, make):
    demo = make()
    text = tool.introduction([demo.data()], demo.pretraining(), demo.fine_tuning(), demo.page())
    assert "the first table" in text and "two tensor-parallel ranks" in text
    seconds = [int(line.split(" s ")[0]) for line in text.splitlines() if " s  " in line]
    assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=3)
    assert seconds[0] + seconds[1] <= 120 and seconds[-1] <= 240  # what is promised
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
