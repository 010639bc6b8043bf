"""tools/evaluate.py on a checkpoint: what can be refused is refused before decoding, and what was
decoded is written whatever becomes of the scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from small_models import write_gpt2

from megatron_spdf.evaluation import evaluate as evaluation
from megatron_spdf.evaluation.metrics.metric import METRICS, Metric
from megatron_spdf.evaluation.references import read_predictions

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
    assert code == 0 and "1 inputs have no reference and are not scored" in said.out
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
    assert code == 0 and asked == ["end", "end"] and "1 prompts truncated" in said.out
    assert "ROUGE-Lsum" in json.loads((output / "scores.json").read_text())["scores"]["all"]
