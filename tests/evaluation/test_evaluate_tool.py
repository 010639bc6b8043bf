"""tools/evaluate.py on a checkpoint: what can be refused is refused before decoding, and what was
decoded is written whatever becomes of the scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_models import write_gpt2

from megatron_spdf.data.finetuning.task import Example
from megatron_spdf.evaluation import evaluate as evaluation
from megatron_spdf.evaluation import harness, text_perplexity
from megatron_spdf.evaluation.decoding import DecodingSettings
from megatron_spdf.evaluation.harness import HarnessSettings
from megatron_spdf.evaluation.metrics.metric import METRICS, Metric
from megatron_spdf.evaluation.references import read_predictions
from megatron_spdf.evaluation.scores import Scores
from megatron_spdf.evaluation.text_perplexity import Texts
from megatron_spdf.resilience.world import Ranks

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = '{"context": "red cat"}\n'
WITH = '{"context": "blue dog", "completion": "the dog"}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from small_models import make_tokenizer

    directory = write_gpt2(tmp_path_factory.mktemp("gpt2") / "model")
    for name, content in zip(("vocab.json", "merges.txt"), make_tokenizer(0)._files, strict=True):
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Evaluates lines of JSON; returns the exit code, what was printed, and the output."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    import evaluate

    def run(lines: str, *words: str, task: str = "jsonl"):
        data, output = tmp_path / ("data.jsonl" if task == "jsonl" else "data.csv"), tmp_path / "o"
        data.write_text(lines)
        options = {"--task": task, "--data": str(data), "--beams": "1", "--max-new-tokens": "3",
                   "--output": str(output)} | dict(zip(words[::2], words[1::2], strict=True))
        code = evaluate.main([str(model), *(word for pair in options.items() for word in pair)])
        return code, capsys.readouterr(), output
    return run


@pytest.fixture
def no_decoding(monkeypatch):
    monkeypatch.setattr(evaluation, "in_memory", lambda source: pytest.fail("the model was made"))


def test_inputs_without_a_reference_are_decoded_and_not_scored(run):
    code, said, output = run(WITHOUT + WITH)
    assert code == 0 and "1 input without a reference, not scored" in said.out
    scores = json.loads((output / "scores.json").read_text())
    assert scores["without_reference"] == 1 and "BLEU" in scores["scores"]["all"]
    assert len(read_predictions(output / "predictions.txt")) == 2


@pytest.mark.parametrize(("task", "lines"), [
    ("jsonl", WITHOUT * 2), ("e2e", "MR\nname[Zizzi]\nname[The Vaults]\n")])
def test_a_test_set_without_references_is_decoded(run, task, lines):
    code, said, output = run(lines, task=task)
    assert code == 0 and "BLEU: missing (no input has a reference)" in said.out
    assert "perplexity: missing (no input has a reference)" in said.out
    assert json.loads((output / "scores.json").read_text())["scores"] == {"all": {}}
    assert len(read_predictions(output / "predictions.txt")) == 2


def test_a_metric_that_fails_leaves_the_others(run, monkeypatch):
    def fail(outputs, references):
        raise KeyError("a word")

    monkeypatch.setattr(METRICS, "get", lambda name, get=METRICS.get: (
        Metric(("ROUGE-1",), fail) if name == "rouge" else get(name)))
    code, said, output = run(WITH)
    assert code == 0 and "ROUGE-1: missing (KeyError: 'a word')" in said.out
    assert "BLEU" in json.loads((output / "scores.json").read_text())["scores"]["all"]


def test_what_was_decoded_is_on_disk_before_it_is_scored(run, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(WITH)
    assert len(read_predictions(tmp_path / "o" / "predictions.txt")) == 1


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize(("lines", "words", "said"), [
    ('{"context": "a", "completion": "b \\ud83d c"}\n', (), "half of a surrogate pair"),
    (WITH, ("--max-new-tokens", "1000"), "leaves no room for a prompt"),
    (WITH, ("--output", "FILE"), "is a file; choose another --output"),
    (WITH, ("--output", "FILE/below"), "is a file; choose another --output"),
    (WITH, ("--length-penalty", "nan"), "must be a finite number"),
    (WITH, ("--no-repeat-ngram", "-1"), "must be"), (WITH, ("--beams", "0"), "must be"),
])
def test_what_can_be_refused_is_refused_before_decoding(run, tmp_path, capsys, lines, words, said):
    (tmp_path / "file").write_text("mine")
    words = [word.replace("FILE", str(tmp_path / "file")) for word in words]
    try:
        code, printed, _ = run(lines, *words)
        error = printed.err
    except SystemExit as ended:  # of the parser
        code, error = ended.code, capsys.readouterr().err
    assert code == 2 and said in error
    assert (tmp_path / "file").read_text() == "mine"


def test_lines_end_at_lf_or_cr_lf_and_nowhere_else(tmp_path):
    (tmp_path / "a.txt").write_bytes("a\x0bb\r\nc\u2028d\re\n\n f \n".encode())
    assert read_predictions(tmp_path / "a.txt") == ["a\x0bb", "c\u2028d\re", "", "f"]


@pytest.mark.parametrize("text, refused", [
    ('{"prediction": "a"}\n{"prediction": "b"}\n', True), ('{"a": 1}\n\n', True),
    ('{"a": 1}\nb\n', False), ("{a}\n{b}\n", False), ("[1]\n", False), ("\n\n", False)])
def test_records_of_json_are_no_predictions(tmp_path, text, refused):
    (tmp_path / "a").write_text(text)
    if refused:
        with pytest.raises(ValueError, match="holds JSON objects, and predictions are text"):
            read_predictions(tmp_path / "a")
    else:
        assert read_predictions(tmp_path / "a") == text.split("\n")[:-1]


def test_a_test_set_of_glue_is_decoded_and_gets_a_submission(run):
    """By the task's own settings of decoding, where none are asked for."""
    code, said, output = run("index\tsentence\n0\tred \"cat\n1\tblue dog\n", task="sst2")
    assert code == 0 and "accuracy: missing (no input has a reference)" in said.out
    assert len(read_predictions(output / "predictions.txt")) == 2
    lines = (output / "SST-2.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line[:2] for line in lines[1:]] == ["0\t", "1\t"]
    assert json.loads((output / "scores.json").read_text())["decoding"]["no_repeat_ngram"] == 0


def test_answers_of_squad_are_scored_and_written_by_their_ids(run):
    lines = json.dumps({"data": [{"paragraphs": [{"context": "red cat", "qas": [
        {"id": "56d", "question": "who", "answers": [{"text": "cat"}, {"text": "red cat"}]}]}]}]})
    code, said, output = run(lines, task="squad")
    assert code == 0 and "exact_match" in said.out
    scores = json.loads((output / "scores.json").read_text())["scores"]["all"]
    assert set(scores) == {"exact_match", "F1", "perplexity"}
    answer = read_predictions(output / "predictions.txt")[0]
    assert json.loads((output / "predictions.json").read_text()) == {"56d": answer}


def test_an_article_that_is_too_long_loses_its_end(run, monkeypatch):
    """In decoding and in perplexity."""
    asked = []

    def watch(do):
        def watched(*words, **named):
            asked.append(named.get("loses", words[-1]))
            return do(*words, **named)
        return watched

    for name in ("decode", "likelihood"):
        monkeypatch.setattr(evaluation, name, watch(getattr(evaluation, name)))
    article = "red cat " * 60
    code, said, output = run(f"id,article,highlights\n1,{article},a cat .\n", task="cnn_dailymail")
    assert code == 0 and asked == ["end", "end"] and "1 prompt truncated" in said.out
    assert "ROUGE-Lsum" in json.loads((output / "scores.json").read_text())["scores"]["all"]


@pytest.fixture
def tool(monkeypatch):
    """The tool on a rank that has no scores to write, and what the works are given."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    import evaluate

    given = []
    for module, name in ((evaluation, "evaluate"), (harness, "evaluate_harness"),
                         (text_perplexity, "evaluate_text")):
        monkeypatch.setattr(module, name, lambda source, *words: given.append(words))

    def run(*words) -> tuple:
        assert evaluate.main([str(word) for word in words]) == 0
        return given.pop()
    return run


ONE = Ranks(0, 1, 0, "python")


@pytest.mark.parametrize(("task", "words", "settings"), [
    ("jsonl", (), DecodingSettings()),
    ("jsonl", ("--beams", 3, "--length-penalty", 0.5, "--no-repeat-ngram", 2, "--max-new-tokens", 5,
               "--batch-size", 7), DecodingSettings(3, 0.5, 2, 5, 7)),
    ("sst2", ("--beams", 2), DecodingSettings(2, 0.8, 0, 16)),
    ("sst2", ("--no-repeat-ngram", 3), DecodingSettings(1, 0.8, 3, 16))])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_options_of_decoding_are_its_settings(tool, model, tmp_path, task, words, settings, split):
    if task == "jsonl":
        (tmp_path / f"{split}.jsonl").write_text(WITH)
    else:
        file = {"validation": "dev.tsv", "test": "test.tsv"}[split]
        (tmp_path / file).write_text("sentence\tlabel\nblue dog\t1\n")
    asked = tool(model, "--task", task, "--data", tmp_path, "--split", split, "--output",
                 tmp_path / "o", *words)
    examples = [Example("blue dog", ("the dog",)) if task == "jsonl" else
                Example("sst2 sentence: blue dog", ("positive",))]
    assert asked == (task, examples, settings, asked[3]) and asked[3].world == 1


@pytest.mark.parametrize(("words", "settings", "include"), [
    ((), HarnessSettings(None, None, None, 32), None),
    (("--examples", 2, "--limit", 5, "--window", 8, "--batch-size", 3, "--include", "mine"),
     HarnessSettings(2, 5, 8, 3), Path("mine"))])
def test_options_of_the_harness_are_its_settings(tool, model, tmp_path, monkeypatch, words,
                                                 settings, include):
    loaded = []
    monkeypatch.setattr(harness, "require_harness", lambda: None)
    monkeypatch.setattr(harness, "load_harness_tasks", lambda *given: loaded.append(given) or "it")
    asked = tool(model, "--harness", "a,b", "c", "--output", tmp_path / "o", *words)
    assert asked == ("it", settings, asked[2]) and asked[2].world == 1
    assert loaded == [(["a", "b", "c"], include, asked[2], settings)]


@pytest.mark.parametrize("limit", [None, 5])
def test_lm_eval_is_asked_with_the_settings(monkeypatch, limit):
    """A model of the window and the batch, the tasks that were loaded, and so many documents."""
    asked, made = [], []
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", SimpleNamespace(
        evaluate=lambda **given: asked.append(given)))
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "megatron_spdf.evaluation.harness_model", SimpleNamespace(
        HarnessModel=lambda *given: made.append(given) or "model"))
    monkeypatch.setattr(harness, "in_memory", lambda source: SimpleNamespace(
        to=lambda device: (source, str(device))))
    monkeypatch.setattr(harness, "tokenizer_of", lambda source: "tokenizer")
    monkeypatch.setattr(harness, "init_gloo", lambda ranks: "cpu")
    source = SimpleNamespace(model=SimpleNamespace(max_positions=10))
    for window in (None, 8):
        settings = HarnessSettings(2, limit, window, 3)
        assert harness.evaluate_harness(source, {"tasks": 1}, settings, ONE) is None
        assert made[-1] == ((source, "cpu"), "tokenizer", window or 10, 3, ONE)
        assert asked[-1] == {"lm": "model", "task_dict": {"tasks": 1}, "limit": limit,
                             "log_samples": False}


def test_results_of_lm_eval_are_scores_with_all_that_is_behind_them(monkeypatch):
    monkeypatch.setattr(harness, "version", lambda package: "0.4")
    found = {"results": {
        "quiz": {"alias": "quiz", "acc,none": 0.5, "acc_stderr,none": 0.125,
                 "exact,strict": 0.25, "exact_stderr,strict": "N/A", "f1,none": float("nan")},
        "all": {"acc,none": 0.75, "acc_stderr,none": float("nan")}},
        "n-samples": {"quiz": {"effective": 5, "original": 1200}}, "n-shot": {"quiz": 2},
        "versions": {"quiz": 1.0}}
    behind = ("lm-eval 0.4, 5 of 1,200 documents, 2 examples in the context, version 1.0 of the "
              "task")
    assert harness._scores(found) == Scores(
        values={"all": {"quiz acc": 0.5, "quiz exact (strict)": 0.25, "all acc": 0.75}},
        signatures={"quiz acc": f"{behind}, standard error 0.125000",
                    "quiz exact (strict)": behind, "all acc": "lm-eval 0.4"},
        missing={"quiz f1": "lm-eval says nan"})


@pytest.mark.parametrize(("words", "key", "on_error", "window"), [
    ((), "text", "stop", 10),
    (("--text-key", "body", "--on-error", "skip", "--window", 8), "body", "skip", 8)])
def test_options_of_text_are_its_settings(tool, model, tmp_path, words, key, on_error, window):
    (tmp_path / "a.jsonl").write_text(json.dumps({key: "red cat"}) + "\n")
    asked = tool(model, "--text", tmp_path / "a.jsonl", "--output", tmp_path / "o", *words)
    assert asked == (Texts([tmp_path / "a.jsonl"], key, on_error), window, asked[2])


@pytest.mark.parametrize(("words", "split"), [((), "test"), (("--split", "validation"),
                                                             "validation")])
def test_predictions_are_scored_against_the_split_that_is_named(tool, tmp_path, words, split):
    """Of a directory of splits; and what is written says of what the scores are."""
    for name in ("test", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(
            f'{{"context": "a", "completion": "the {name} of the pub"}}\n')
    (tmp_path / "said.txt").write_text(f"the {split} of the pub\n")
    import evaluate

    assert evaluate.main(["--task", "jsonl", "--predictions", str(tmp_path / "said.txt"),
                          "--references", str(tmp_path), "--output", str(tmp_path / "o"),
                          *words]) == 0
    found = json.loads((tmp_path / "o/scores.json").read_text())
    scores = found["scores"]["all"]
    assert scores == pytest.approx(dict.fromkeys(["BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L"], 1.0))
    assert {key: found[key] for key in ("task", "split", "predictions", "references",
                                        "inputs")} == {
        "task": "jsonl", "split": split, "predictions": str(tmp_path / "said.txt"),
        "references": [str(tmp_path)], "inputs": 1}
