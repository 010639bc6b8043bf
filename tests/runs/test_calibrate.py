"""Reading runs, and calibrating by one."""

from __future__ import annotations

import json

import pytest
import yaml

from megatron_spdf.planning.hardware import GPUS
from megatron_spdf.planning.step_time import step_time
from megatron_spdf.runs.calibrate import calibrate, measured_step
from megatron_spdf.runs.measured import read_run
from megatron_spdf.sparsity.plan import Plan

GPU = GPUS["h100"]


@pytest.fixture
def write(recipe, tmp_path):
    """Writes a run's directory whose steps took so many seconds each; returns (recipe,
    directory)."""
    def write(seconds, choices: str | None = "device NVIDIA H100 80GB HBM3; attention torch",
              tail: str = ""):
        model = {"layers": 12, "hidden": 1024, "heads": 16, "vocab_size": 50257,
                 "max_positions": 1024}
        train = {"global_batch": 64, "micro_batch": 8, "sequence_length": 1024, "tokens": 10**7}
        r = recipe(model=model, train=train, sparsity=0.75)
        records = [{"kind": "bytes", "step": 1, "parameters": 1,
                    **({"choices": choices} if choices else {})}]
        records += [{"kind": "train", "step": i, "tokens": i, "loss": 1.0, "step_seconds": s}
                    for i, s in enumerate(seconds, 1)]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(r.model_dump()))
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records) + tail)
        return r, tmp_path
    return write


@pytest.mark.parametrize("efficiency", [0.05, 0.45, 0.9])
def test_efficiency_is_recovered_from_the_time_it_gives(write, recipe, efficiency):
    r, _ = write([1.0])
    seconds = step_time(r, Plan.of(r), GPU, efficiency).total
    _, directory = write([10.0, 5.0] + [seconds] * 8)  # warm-up is not measured
    assert measured_step(read_run(directory)) == seconds
    assert calibrate(read_run(directory), GPU) == pytest.approx(efficiency, rel=1e-6)


def test_a_run_on_another_device_does_not_calibrate(write):
    _, directory = write([1.0], choices="device NVIDIA A100-SXM4-80GB; attention torch")
    with pytest.raises(ValueError, match="ran on NVIDIA A100-SXM4-80GB, not on H100"):
        calibrate(read_run(directory), GPU)


@pytest.mark.parametrize(("seconds", "said"),
                         [(1e-4, "less than the .* s that a H100 needs"), (500.0, "under 1%")])
def test_times_that_no_efficiency_explains(write, seconds, said):
    _, directory = write([seconds], choices=None)
    with pytest.raises(ValueError, match=said):
        calibrate(read_run(directory), GPU)


def test_a_line_that_is_still_being_written_is_left_out(write):
    _, directory = write([1.0, 2.0], tail='{"kind": "train", "st')
    run = read_run(directory)
    assert [r["step"] for r in run.train] == [1, 2] and not run.finished


def test_a_damaged_line_is_named(write):
    _, directory = write([1.0], tail='{"kind": oops\n{"kind": "valid", "step": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match="line 3: not JSON"):
        read_run(directory)


@pytest.mark.parametrize(("file", "content", "said"), [
    ("log.jsonl", None, "it has no log.jsonl"), ("recipe.yaml", None, "it has no recipe.yaml"),
    ("log.jsonl", "", "holds no training step yet"), ("recipe.yaml", "a: [", "line 1: not YAML"),
    ("recipe.yaml", "a: 1", "cannot be read as a pre-training recipe"),
    ("recipe.yaml", "- 1", "recipe.yaml, line 1: it=.1.: input should be a mapping of keys"),
])
def test_directories_that_are_no_runs(write, file, content, said):
    _, directory = write([1.0])
    (directory / file).unlink()
    if content is not None:
        (directory / file).write_text(content)
    with pytest.raises(ValueError, match=said):
        read_run(directory)


def test_the_median_is_of_all_but_the_first_fifth(write):
    for seconds, median in (([9.0, 1.0, 2.0, 3.0], 2.5), ([9.0, 1.0, 2.0, 3.0, 8.0], 2.5),
                            ([9.0] * 2 + [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 4.5),
                            ([9.0], 9.0)):
        _, directory = write(seconds)
        assert measured_step(read_run(directory)) == median


@pytest.mark.parametrize(("efficiency", "fits"), [(0.0101, True), (0.0099, False), (0.999, True),
                                                  (1.01, False)])
def test_efficiencies_from_a_hundredth_to_all(write, efficiency, fits):
    r, _ = write([1.0])
    _, directory = write([step_time(r, Plan.of(r), GPU, efficiency).total])
    if fits:
        assert calibrate(read_run(directory), GPU) == pytest.approx(efficiency, rel=1e-6)
    else:
        with pytest.raises(ValueError, match="under 1% of H100" if efficiency < 1 else "less than"):
            calibrate(read_run(directory), GPU)


def test_a_log_without_times_of_steps_does_not_calibrate(write):
    _, directory = write([1.0])
    log = directory / "log.jsonl"
    log.write_text(log.read_text().replace('"step_seconds"', '"seconds"'))
    with pytest.raises(ValueError, match="has no step_seconds"):
        calibrate(read_run(directory), GPU)


def test_a_micro_batch_left_to_the_run_is_the_one_it_chose_last(write):
    _, directory = write([1.0])
    values = yaml.safe_load((directory / "recipe.yaml").read_text())
    values["train"]["micro_batch"] = "auto"
    (directory / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="train.micro_batch=auto and no micro_batch.json"):
        read_run(directory)
    (directory / "micro_batch.json").write_text('[{"micro_batch": 4}, {"micro_batch": 2}]')
    assert read_run(directory).recipe.train.micro_batch == 2
    values["train"]["micro_batch"] = 8
    (directory / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert read_run(directory).recipe.train.micro_batch == 8


def test_a_run_is_finished_from_its_last_step_on(write):
    r, directory = write([1.0] * 3)
    assert r.steps > 3 and not read_run(directory).finished
    log = directory / "log.jsonl"
    for step, finished in ((r.steps - 1, False), (r.steps, True), (r.steps + 1, True)):
        log.write_text(json.dumps({"kind": "train", "step": step, "tokens": 1, "loss": 1.0}) + "\n")
        assert read_run(directory).finished == finished
