"""tools/plan.py as a user meets it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from megatron_spdf.runs.loss_table import LossRow, write_table
from megatron_spdf.scaling_law.law import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs/pretrain/demo.yaml")


@pytest.fixture(scope="module")
def plan():
    sys.path.insert(0, str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("plan", ROOT / "tools/plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_text(plan, capsys):
    assert plan([DEMO, "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert (
        "2 x H100" in out
        and "the recipe's own layout (tensor 2" in out
        and "What sparsity buys" in out
    )


def test_a_micro_batch_left_to_the_run_is_one_sequence(plan, capsys):
    assert plan([DEMO, "train.micro_batch=auto", "--gpu", "h100"]) == 0
    assert "micro-batch 1, recompute none) fits" in capsys.readouterr().out


def test_json_and_price(plan, capsys):
    assert plan([DEMO, "sparsity=0.5", "--gpu", "a100", "--gpus", "4", "--price", "2",
                 "--efficiency", "0.5",
                 "--top", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["request"]["gpus"] == 4 and facts["request"]["efficiency_from"] == "given"
    assert facts["model"]["sparsity"] == pytest.approx(0.5, abs=1e-4) and len(facts["layouts"]) <= 3
    assert facts["layouts"][0]["cost"] == pytest.approx(2 * facts["layouts"][0]["gpu_hours"])


def test_rates_and_spreads_of_groups_are_shown_where_they_differ(plan, capsys):
    words = ["optimizer.lr=1e-3", "sparsity=0.75", "parametrization=density",
             "optimizer.norm_lr=3e-3",
             "optimizer.embedding_lr=8e-3", "model.embedding_std=0.05", "model.init_std=0.02"]
    assert plan([DEMO, *words, "--gpu", "h100"]) == 0
    table = [line.split() for line in capsys.readouterr().out.partition(
        "parametrization density, base density 1\n")[2].splitlines()]
    (qkv,) = (row for row in table if row and row[0].endswith("linear_qkv.weight"))
    assert qkv[-5:] == ["3", "0.2500", "0.04", "4", "0.004"]  # layers, 0.02 / sqrt(1 / 4), x 4
    (norms,) = (row for row in table if row[:1] == ["norms"])
    assert norms[-2:] == ["1", "0.003"]
    assert plan([DEMO, *words, "--gpu", "h100", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert {row["peak_learning_rate"] for row in groups} == {4e-3, 8e-3, 3e-3}
    assert {row["initial_std"] for row in groups if "embedding" in row["weight"]} == {0.05}
    same = str(ROOT / "configs/pretrain/gpt_tiny.yaml")
    assert plan([same, "--gpu", "h100"]) == 0 and "parametrization" not in capsys.readouterr().out


def test_html(plan, capsys, tmp_path):
    assert plan([DEMO, "--gpu", "h100", "--html", str(tmp_path / "plan.html")]) == 0
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<svg") == 2 and "<script" not in page and "What sparsity buys" in page


def test_law(plan, capsys, tmp_path):
    plot = tmp_path / "law.png"
    assert plan(["law", "--fit", "vit", "--nonzero", "100M", "--compute", "1e20", "--plot",
                 str(plot)]) == 0
    assert capsys.readouterr().out.startswith("CAUTION") and plot.exists()
    assert plan(["law", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "static random masks" in facts["caution"] and facts["optimal_sparsity"] == pytest.approx(
        0.714, abs=1e-3
    )


def test_fit(plan, capsys, tmp_path):
    """Runs of three sparsities, sizes and lengths whose losses follow the published law."""
    runs, law = [], PUBLISHED["t5"]
    for level in (0.0, 0.5, 0.75):
        for hidden in (64, 128, 256):
            for tokens in (2**17, 2**19, 2**21):
                directory = tmp_path / f"{level}-{hidden}-{tokens}"
                directory.mkdir()
                (directory / "recipe.yaml").write_text(yaml.safe_dump({
                    "output": "x", "sparsity": level, "optimizer": {"lr": 1e-3},
                    "model": {"layers": 2, "hidden": hidden, "heads": 4, "vocab_size": 256,
                              "max_positions": 32},
                    "train": {"tokens": tokens, "global_batch": 8, "micro_batch": 8}}))
                nonzero = (1 - level) * 24 * hidden**2
                records = [{"kind": "train", "step": tokens // 256, "tokens": tokens, "loss": 9.9},
                           {"kind": "valid", "step": tokens // 256,
                            "loss": float(law.loss(level, nonzero, tokens))}]
                (directory / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
                runs.append(str(directory))
    assert plan(["fit", *runs, "--starts", "8", "--bootstrap", "2", "--json"]) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert fitted["law"]["b_n"] == pytest.approx(law.b_n, rel=1e-3) and len(fitted["points"]) == 27
    assert plan(["fit", *runs[:4]]) == 2
    captured = capsys.readouterr()
    assert (
        "under-determined by these runs: 4 runs for 7 coefficients" in captured.err
        and runs[0][-8:] in captured.out
    )


@pytest.fixture
def table(tmp_path):
    """Table of losses that follow the published law at sparsities of 0 to 87.5%, static, and a
    moving algorithm at 75% that is as good as 3 times its weights dense; one size is held out."""
    law, rows = PUBLISHED["t5"], []
    for algorithm, level in (("dense", 0.0), ("static", 0.5), ("static", 0.75), ("static", 0.875),
                             ("rigl", 0.75)):
        for size in (20_000, 60_000, 100_000, 200_000):
            for length in (10, 20, 40):
                as_dense = algorithm == "rigl"
                rows.append(LossRow(
                    labels={"size": str(size), "masks": f"{algorithm} {level}",
                            "length": str(length)},
                    algorithm=algorithm, sparsity=level, weights=size / (1 - level),
                    active_weights=size, average_weights=size, tokens=length * size, flops=1e12,
                    seed=1, cell=f"{size} {algorithm} {level}", standard_error=0.01,
                    loss=float(law.loss(0.0 if as_dense else level, size * (3 if as_dense else 1),
                                        length * size)), held_out=size == 100_000))
    write_table(tmp_path / "losses.csv", rows)
    return str(tmp_path / "losses.csv")


@pytest.mark.slow
def test_fit_of_a_table_in_every_form(plan, capsys, table):
    words = ["--starts", "6", "--bootstrap", "4"]
    assert plan(["fit", table, "--form", "all", *words, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    published, average, groups = out["forms"]
    assert [form["form"] for form in out["forms"]] == ["published", "average", "groups"]
    assert len(out["points"]) == 60
    # four of five groups, and all; a quarter of each is held out
    assert [len(form["predictions"]) for form in out["forms"]] == [12, 15, 15]
    assert published["law"]["b_n"] == pytest.approx(PUBLISHED["t5"].b_n, rel=1e-3)
    assert groups["gains"]["rigl 0.75"][0] == pytest.approx(3.0, rel=1e-3)
    assert groups["gains"]["static 0.75"][0] == pytest.approx(2.16, abs=0.01)
    for form in (published, groups):
        assert all(p["predicted"] == pytest.approx(p["measured"], rel=1e-5)
                   for p in form["predictions"])
    assert average["error"] > 100 * groups["error"]  # sparse and dense are not one there
    assert plan(["fit", table, "--algorithm", "rigl", *words]) == 2
    assert "2 different sparsities" in capsys.readouterr().err


def test_runs_are_held_out_by_their_names(plan, capsys, table):
    words = ["--starts", "4", "--bootstrap", "2"]
    assert plan(["fit", table, *words, "--hold-out", "size=20000,masks=dense"]) == 0
    out = capsys.readouterr().out
    assert out.count("size=20000,masks=dense 0.0,length=40,seed=1") == 2  # read, and predicted
    assert " of 15 measured losses are inside" in out and "published, of GMP: 2.16x" in out
    assert plan(["fit", table, "--hold-out", "size=7"]) == 2
    assert "--hold-out size=7: no run has that in its name" in capsys.readouterr().err
    assert plan(["fit", table, "--algorithm", "set"]) == 2
    assert "no run is of it; there are rigl, static" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "said"), [
    ([DEMO], "which GPU? Say --gpu and one of a100"),
    ([DEMO, "--gpu", "v100"], "gpu='v100' is not in the table"),
    ([DEMO, "--gpu", "h100", "--gpus", "7"], "7 GPUs cannot be laid out"),
    ([DEMO, "--gpu", "h100", "--memory", "0.001"], "no layout of 2 x H100 holds this run"),
    ([DEMO, "--gpu", "h100", "model.layer=3"], "did you mean model.layers?"),
    (["nowhere.yaml", "--gpu", "h100"], "there is no recipe"),
    ([DEMO, "--gpu", "h100", "--calibrate", "nowhere"], "nowhere is no run"),
    ([DEMO, "--exact", "--gpus", "8"], "of 2 ranks, not --gpus 8"),
    ([DEMO, "--exact", "--rank", "2"], "rank 2 is not in this layout"),
    ([DEMO, "--exact", "engine=deepspeed"], "engine=deepspeed makes its buffers while it trains"),
    (["fit", "nowhere"], "nowhere is no run"),
])
def test_what_cannot_be_answered_gets_a_sentence(plan, capsys, arguments, said):
    assert plan(arguments) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("error: ")
        and said in captured.err
        and "Traceback" not in captured.err
    )


@pytest.mark.parametrize("option", ["--gpus", "--gpus-per-node", "--top", "--network", "--memory",
                                    "--efficiency", "--price"])
@pytest.mark.parametrize("value", ["0", "-8", "nan", "inf", "1e999", "", "x", "9" * 5000])
def test_arguments_are_numbers_that_a_cluster_can_have(plan, capsys, option, value):
    if (option, value) == ("--price", "0"):
        return  # of a machine of one's own
    with pytest.raises(SystemExit) as ended:
        plan([DEMO, "--gpu", "h100", f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}: " in (said := capsys.readouterr().err) and "must be a" in said
    assert len(said) < 2000


@pytest.mark.parametrize(("option", "value"), [
    ("--nonzero", "0"), ("--nonzero", "-1e6"), ("--nonzero", "inf"), ("--compute", "nan"),
    ("--compute", "0")])
def test_arguments_of_the_law_are_positive(plan, capsys, option, value):
    with pytest.raises(SystemExit) as ended:
        plan(["law", f"{option}={value}"])
    assert ended.value.code == 2 and f"argument {option}: " in capsys.readouterr().err


@pytest.mark.slow
def test_exact(plan, capsys):
    assert plan([DEMO, "--exact", "--rank", "1"]) == 0
    assert "equal to the byte" in capsys.readouterr().out
    assert plan([DEMO, "--exact", "--json"]) == 0
    (first, last) = json.loads(capsys.readouterr().out)
    assert first["counted"] == first["predicted"] and last["rank"] == 1
