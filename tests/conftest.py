import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not Path("/dev/nvidiactl").exists():
    # before anything imports triton: its kernels run on the CPU then
    os.environ["TRITON_INTERPRET"] = "1"

TINY = {
    "model": {"layers": 4, "hidden": 64, "heads": 4, "vocab_size": 256, "max_positions": 32},
    "train": {"tokens": 2560, "global_batch": 8, "micro_batch": 2},
    "optimizer": {"lr": 1e-3},
}


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, default=0, metavar="N",
                     help="of a test of many cases run so many, evenly spread; 0: all of them")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    """Slurm's tests wait more than they compute: first, so that they run beside the others. Files
    that take seconds come last, so that all workers end together."""
    if count := config.getoption("cases"):
        kept = set(some_cases(items, count))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: ("slurm" not in item.path.parts, item.path not in long))


def some_cases(items, count):
    """Of the cases of every test at most `count`, the first and the last among them."""
    tests = {}
    for item in items:
        tests.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    for cases in tests.values():
        step = max(1.0, (len(cases) - 1) / max(1, count - 1))
        yield from {cases[round(step * i)] for i in range(min(count, len(cases)))}


def pytest_collection_finish(session):
    """Begins to import the engines for ranks and commands, if tests are selected that start any."""
    if any({"ranks", "start"} & set(item.fixturenames) for item in session.items
           if hasattr(item, "fixturenames")) and not session.config.option.collectonly:
        sys.path.insert(0, str(Path(__file__).parent / "distributed"))
        from harness import forks

        forks()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Slurm's files go to one worker, which waits for the one cluster while the others compute."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneCluster(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope = super()._split_scope(nodeid)
            return "tests/slurm" if scope.startswith("tests/slurm/") else scope

    return OneCluster(config, log)


@pytest.fixture(autouse=True)
def same_environment():
    """What a test sets in the environment, as ranks do, goes with it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def same_draws():
    """A test that draws without a seed of its own draws the same numbers in every run."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(1)


@pytest.fixture
def recipe(tmp_path):
    """Builds a tiny Recipe; keywords change its sections."""
    from megatron_spdf.recipe.recipe import Recipe

    def build(**sections):
        values = {"output": str(tmp_path / "run"), **TINY}
        for name, change in sections.items():
            values[name] = {**values.get(name, {}),
                            **change} if isinstance(change, dict) else change
        return Recipe.model_validate(values)
    return build
