"""Writers beside log.jsonl: Weights & Biases by a stub of its API, and a writer from outside."""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
from pydantic import Field

from megatron_spdf.recipe.recipe import LOG_WRITERS, Recipe, WithTenants
from megatron_spdf.runs import run_log
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.runs.run_log import RunLog
from megatron_spdf.runs.writers.base import Writer, check_writers, chosen
from megatron_spdf.runs.writers.wandb import WeightsAndBiases
from megatron_spdf.version import __version__


class Stub(ModuleType):
    """What wandb 0.31 offers of that which we call; notes the calls."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="stub")
        self.started, self.said, self.finished, self.broken = [], [], 0, set()
        self.torn_down = False
        self.Settings = lambda **settings: SimpleNamespace(**settings)

    def init(self, *, project, entity, id, resume, name, dir, config, settings):
        self._fail("init")
        self.started.append(SimpleNamespace(**{k: v for k, v in locals().items() if k != "self"}))
        return self

    def define_metric(self, name, step_metric=None):
        self.started[-1].axes = {**getattr(self.started[-1], "axes", {}), name: step_metric}

    def log(self, figures):
        self._fail("log")
        self.said.append(figures)

    def finish(self):
        self._fail("finish")
        self.finished += 1

    def teardown(self):
        self.torn_down = True

    def _fail(self, call: str) -> None:
        if call in self.broken:
            raise RuntimeError(f"{call}: no network")


@pytest.fixture
def wandb(monkeypatch) -> Stub:
    monkeypatch.setitem(sys.modules, "wandb", stub := Stub())
    for name in ("WANDB_RUN_ID", "WANDB_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return stub


@pytest.fixture
def run(recipe) -> RunDir:
    run = RunDir(recipe(log={"wandb": "sparse", "tensorboard": False}))
    run.create()
    return run


def opened(run: RunDir, step: int = 0, active: bool = True) -> RunLog:
    return RunLog(run, step, 10, chosen(run.recipe.log), active)


def test_figures_and_recipe_go_to_the_project(run, wandb):
    log = opened(run)
    log.record("train", 3, loss=2.5, part={"of": 1}, note="text", bad=float("nan"))
    log.record("valid", 3, loss=2.0)
    log.close()
    assert wandb.said == [{"step": 3, "train/loss": 2.5, "train/part/of": 1},
                          {"step": 3, "valid/loss": 2.0}]
    (started,) = wandb.started
    assert (started.project, started.entity, started.name) == ("sparse", None, run.root.name)
    assert started.dir == str(run.root)  # invariant 8
    assert os.environ["WANDB_CACHE_DIR"] == str(run.root / "wandb/cache")
    assert started.config == {**run.recipe.model_dump(), "megatron_spdf": __version__}
    assert started.axes == {"step": None, "*": "step"}
    assert wandb.finished == 1


def test_a_team_stands_before_the_project(recipe, wandb):
    run = RunDir(recipe(log={"wandb": "team/sparse"}))
    run.create()
    opened(run).close()
    assert (wandb.started[0].entity, wandb.started[0].project) == ("team", "sparse")


def test_a_run_that_goes_on_is_the_same_run_there(run, wandb, recipe, tmp_path):
    for step in (0, 4):
        log = opened(run, step)
        log.record("train", step + 1, loss=1.0)
        log.close()
    assert len({started.id for started in wandb.started}) == 1
    assert {started.resume for started in wandb.started} == {"allow"}
    assert json.loads((run.root / "wandb.json").read_text()) == {"id": wandb.started[0].id}
    assert [figures["step"] for figures in wandb.said] == [1, 5]
    other = RunDir(recipe(output=str(tmp_path / "other"), log={"wandb": "sparse"}))
    other.create()
    opened(other).close()
    assert wandb.started[2].id != wandb.started[0].id


def test_an_id_of_the_environment_is_that_of_the_run(run, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "of_an_agent")
    opened(run).close()
    monkeypatch.delenv("WANDB_RUN_ID")
    opened(run).close()
    assert [started.id for started in wandb.started] == ["of_an_agent"] * 2


def test_ranks_that_do_not_log_start_nothing(run, wandb):
    log = opened(run, active=False)
    log.record("train", 1, loss=1.0)
    log.close()
    assert not wandb.started and not (run.root / "wandb.json").exists()


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_its_failure_ends_nothing_and_it_is_begun_again(run, wandb, monkeypatch, capsys, broken):
    monkeypatch.setattr(run_log, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(run_log, "AGAIN_TIMES", 0)
    wandb.broken = {broken}
    log = opened(run)
    for step in (1, 2):
        log.record("train", step, loss=1.0)
    wandb.broken = wandb.broken & {"finish"}
    log.record("train", 3, loss=1.0)
    log.close()
    assert len(run.log.read_text().splitlines()) == 3
    assert wandb.said[-1] == {"step": 3, "train/loss": 1.0}
    said = capsys.readouterr().out.count("could NOT write to Weights & Biases: "
                                         f"{broken}: no network")
    assert said == (broken != "finish")
    assert wandb.torn_down == (broken == "finish")  # so that a dead service is not asked again
    assert len({started.id for started in wandb.started}) == 1


def test_a_service_that_lets_wait_is_asked_again_rarely(run, wandb, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: clock[0])
    tried = []

    def slow(**_):
        tried.append(clock[0])
        clock[0] += 30.0
        raise TimeoutError

    monkeypatch.setattr(wandb, "init", slow)
    log = opened(run)
    for step in range(1, 80):
        clock[0] += 60.0
        log.record("train", step, loss=1.0)
    log.close()
    assert tried == [1000.0, 4030.0]  # 30 s of 3,000


def test_asked_for_and_missing_it_is_refused_before_the_start(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda *_: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="log.wandb=sparse needs .* pip install wandb"):
        check_writers(recipe(log={"wandb": "sparse"}).log)
    check_writers(recipe().log)


def test_the_directory_that_wandb_leaves_is_not_the_package(recipe, monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="pip install wandb"):
        WeightsAndBiases.check("sparse")


@pytest.mark.parametrize("project", ["", " ", "a/b/c", "a b/c", "a#b", "x" * 129, True, 3])
def test_what_is_no_name_of_a_project_is_refused(recipe, project):
    with pytest.raises(ValueError, match="log.wandb"):
        recipe(log={"wandb": project})


def test_a_writer_from_outside_brings_its_key(recipe, monkeypatch, tmp_path):
    """The seam: one class, registered under a name, is a key of the recipe and gets all figures."""
    class Notes(Writer):
        name, type, title = "notes", str | None, "Notes"
        field = Field(None, description="file of notes")

        def __init__(self, value, run, step):
            self.file = run.root / value

        def write(self, step, figures):
            with self.file.open("a") as file:
                file.write(f"{step} {figures}\n")

        def close(self):
            pass

    monkeypatch.setattr(LOG_WRITERS, "_tenants", {**LOG_WRITERS._tenants, "notes": Notes})
    marks = [mark for mark in Recipe.model_fields["log"].metadata if isinstance(mark, WithTenants)]
    section = WithTenants(LOG_WRITERS, marks[0].base, lambda w: (w.type, w.field)).section()
    made = section(notes="n.txt", tensorboard=False)
    run = RunDir(recipe())
    run.create()
    log = RunLog(run, 0, 2, chosen(made), active=True)
    log.record("train", 1, loss=2.0)
    log.close()
    assert (run.root / "n.txt").read_text() == "1 {'train/loss': 2.0}\n"
    assert not run.tensorboard.exists()
