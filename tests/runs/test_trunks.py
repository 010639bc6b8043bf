"""Runs that differ in their length share a trunk, where they would have begun alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from test_experiment import RECIPE

from megatron_spdf.runs.experiment import cells, load_experiment
from megatron_spdf.runs.trunks import with_trunks

PER_STEP = 8 * 32
WSD = {"decay": "minus_sqrt", "decay_share": 0.2, "warmup_tokens": 2 * PER_STEP, "lr": 1e-3}
RIGL = {"sparsity.level": 0.75, "sparsity.algorithm": "rigl", "sparsity.update.every": 3,
        "sparsity.update.anneal": "constant", "sparsity.update.stop": 0.85}


@pytest.fixture
def write(tmp_path):
    """Writes a grid of lengths in steps; returns its path."""
    def write(name: str = "grid", masks=None, lengths=(10, 20, 40), **recipe) -> Path:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"optimizer": WSD} | recipe))
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({
            "recipe": "recipe.yaml", "output": str(tmp_path / name), "seeds": [1, 2],
            "axes": {"masks": masks or {"rigl": RIGL},
                     "length": {n: {"train.tokens": n * PER_STEP} for n in lengths}},
            "plot": {"x": "length"}}, sort_keys=False))
        return path
    return write


def chains(path: Path) -> list[list]:
    grid = cells(load_experiment(path), path, [])
    return with_trunks((cell.trials[seed], cell.recipes[seed]) for seed in (1, 2)
                       for cell in grid)


def lengths(chain: list) -> list[tuple[int, int]]:
    return [(run.recipe.steps, run.begin) for run in chain]


def test_the_longest_run_of_a_cell_and_a_seed_is_the_trunk_of_the_others(write):
    found = chains(write(masks={"dense": {"sparsity.level": 0}, "rigl": RIGL}))
    assert [lengths(chain) for chain in found] == [[(40, 0), (20, 16), (10, 8)]] * 4
    for chain in found:
        trunk, *branches = chain
        assert trunk.keep == [8, 16] and trunk.words == ["checkpoint.keep_at=[8, 16]"]
        assert all(run.trunk == trunk.trial.output and not run.words for run in branches)
        assert {run.recipe.seed for run in chain} == {trunk.recipe.seed}


def test_a_trunk_keeps_what_its_user_keeps_too(write):
    path = write(masks={"dense": {"sparsity.level": 0}}, lengths=(20, 40))
    grid = cells(load_experiment(path), path, ["checkpoint.keep_at=[5]"])
    (trunk, _), *_ = with_trunks((cell.trials[1], cell.recipes[1]) for cell in grid)
    assert trunk.keep == [16] and trunk.words == ["checkpoint.keep_at=[5, 16]"]


@pytest.mark.parametrize(("masks", "optimizer"), [
    ({"sparsity.level": 0.75}, {"decay_share": 1.0}),
    # the fraction that dies follows the length, as gradual pruning does
    (RIGL | {"sparsity.update.anneal": "cosine"}, {}),
    ({"sparsity.level": 0.75, "sparsity.algorithm": "gmp", "sparsity.update.every": 2}, {}),
    # masks stay from step 7 on in the short run, and move at step 8 in the long one
    (RIGL | {"sparsity.update.stop": 0.65, "sparsity.update.every": 2}, {}),
])
def test_runs_that_would_have_begun_otherwise_go_alone(write, masks, optimizer):
    found = chains(write(masks={"some": masks}, lengths=(10, 40), optimizer=WSD | optimizer))
    assert sorted(lengths(chain) for chain in found) == [[(10, 0)], [(10, 0)], [(40, 0)], [(40, 0)]]
    assert not any(run.words for chain in found for run in chain)


def test_without_a_checkpoint_of_the_trunk_a_run_goes_alone(write):
    trunk, branch, _ = chains(write())[0]
    branch.prepare()
    assert not branch.trial.output.exists()


def test_a_branch_without_a_checkpoint_to_begin_from_goes_alone_and_says_so(write, capsys):
    branch = next(run for chain in chains(write()) for run in chain if run.trunk is not None)
    branch.prepare()
    said = capsys.readouterr().out
    assert said.startswith(f"{branch.trial.output} goes alone, as there is no {branch.trunk}/")
    assert not branch.trial.output.exists()


def test_a_branch_begins_from_the_trunks_checkpoint_there_with_its_own_recipe(write, monkeypatch):
    from megatron_spdf.checkpoint import reader
    from megatron_spdf.convert import reshard

    begun = []
    monkeypatch.setattr(reader, "CheckpointReader", lambda path, **given: (path, given))
    monkeypatch.setattr(reshard, "branch", lambda *given: begun.append(given))
    trunk, *branches = chains(write())[0]
    for run in (trunk, *branches):
        place = trunk.trial.output / f"checkpoints/step_{run.begin:08d}"
        place.mkdir(parents=True)
        assert run.prepare()
        if run is not trunk:  # every byte of it is checked
            assert begun.pop() == ((place, {"checksums": True}), run.recipe, run.trial.output)
        run.trial.output.mkdir(parents=True, exist_ok=True)
        (run.trial.output / "recipe.yaml").touch()
        assert run.prepare() and not begun  # which goes on
