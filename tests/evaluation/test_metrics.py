"""The metrics against what the official scripts printed for the same texts, see
official_figures.py."""

from __future__ import annotations

import json
import shutil
import sys
from math import log, log2
from pathlib import Path

import pytest
from official_figures import DART, E2E, GROUPS, OUTPUTS, REFERENCES, WEBNLG
from rouge_score.rouge_scorer import RougeScorer

from megatron_spdf.evaluation.metrics import java
from megatron_spdf.evaluation.metrics.ngrams import bleu_13a, bleu_tokenized
from megatron_spdf.evaluation.metrics.nist import nist
from megatron_spdf.evaluation.metrics.summaries import rouge
from megatron_spdf.evaluation.references import References
from megatron_spdf.evaluation.scores import score

ROOT = Path(__file__).resolve().parents[2]
TEXTS = References(tuple(REFERENCES), tuple(GROUPS))
# What the scripts print: E2E all digits, NIST_mteval four decimals; BLEU of the others two decimals
# of percent.
TOLERANCE = {"e2e": {"NIST": 1e-4, "NIST_mteval": 1e-4},
             "webnlg": {"BLEU": 5e-3, "METEOR": 1e-3, "TER": 1e-3},
             "dart": {"BLEU": 5e-3, "METEOR": 1e-3, "TER": 1e-3}}
NEED_JAVA = ("METEOR", "ROUGE_L", "CIDEr")
CASES = [(task, part, metric) for task,
         parts in (("e2e", {"all": E2E}), ("webnlg", WEBNLG), ("dart", DART))
         for part, figures in parts.items() for metric in figures if (task, metric)
         != ("webnlg", "METEOR")]


@pytest.fixture(scope="module")
def scores():
    """Java reads METEOR's tables for seconds for each figure: once for E2E's, once for a figure of
    the others."""
    one_part = References(TEXTS.texts, ("",) * len(OUTPUTS))
    found = {"e2e": score("e2e", OUTPUTS, one_part), "dart": score("dart", OUTPUTS, one_part)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(java, "meteor", lambda *_: 0.0)
        found["webnlg"] = score("webnlg", OUTPUTS, TEXTS)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("task", "part", "metric"), CASES)
def test_figures_of_the_official_scripts(scores, task, part, metric):
    if metric in NEED_JAVA and not shutil.which("java"):
        pytest.skip("no Java here, which this metric needs")
    official = {"e2e": {"all": E2E}, "webnlg": WEBNLG, "dart": DART}[task][part][metric]
    assert scores[task].values[part][metric] == pytest.approx(official,
                                                              abs=TOLERANCE[task].get(metric, 1e-6))


def test_without_java_what_is_missing_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = score("e2e", OUTPUTS, TEXTS)
    assert set(found.missing) == set(NEED_JAVA) and "no `java` in PATH" in found.missing["METEOR"]
    assert found.values["all"]["BLEU"] == pytest.approx(E2E["BLEU"], abs=1e-6)


def test_without_pycocoevalcap_what_is_missing_is_said(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    found = score("e2e", OUTPUTS, TEXTS)
    assert set(found.missing) == set(NEED_JAVA)
    assert "needs pycocoevalcap" in found.missing["CIDEr"]
    assert found.values["all"]["BLEU"] == pytest.approx(E2E["BLEU"], abs=1e-6)


def test_summaries_have_the_best_f1_of_their_references():
    scorer = RougeScorer(["rouge2"], use_stemmer=True)
    best = [max(scorer.score(text, output)["rouge2"].fmeasure for text in texts)
            for output, texts in zip(OUTPUTS, REFERENCES, strict=True)]
    assert score("scitldr", OUTPUTS,
                 TEXTS).values["all"]["ROUGE-2"] == pytest.approx(sum(best) / len(best))


# What multi-bleu.perl -lc prints for "the pub ..." and "it is ...", all of whose n-grams are in
# references of 8 and 11 tokens, and of 9 and, where there is one, none: its length is the closest.
@pytest.mark.parametrize(("second", "figure"), [((), 41.11), (("",), 100.0)])
def test_an_empty_reference_counts_as_multi_bleu_counts_it(second, figure):
    outputs = ["The pub serves cheap food", "it is by river"]
    first = ["the pub serves cheap food near the river",
             "the pub serves cheap food and it is near the river"][: 1 + len(second)]
    references = [first, ["in fact it is by river and quite cheap"]]
    found = bleu_tokenized(outputs, References(tuple(references), ("", "")))
    assert found["all"]["BLEU"].value == pytest.approx(figure, abs=5e-3)


def test_without_a_common_n_gram_of_four_there_is_no_bleu():
    """The Python port prints 1e-8 here; smoothed it would be 0.2."""
    references = References((["A cheap pub", "The pub has low prices"], ["By the river it is"]),
                            ("", ""))
    for measure in (bleu_13a, bleu_tokenized):
        found = measure(["The pub is cheap", "It is near the river"], references)
        assert found["all"]["BLEU"].value == 0.0


def test_nist_of_outputs_shorter_than_an_n_gram():
    """By hand. In the references a has 3 of 9 places, b and d 2, c and x 1; "a b" comes twice. The
    second output has one word, so that the Python port counts 2 - 1 trigrams, as it prints
    3.664260834727569, and the Perl script 2, with 5 words for 9 / 3 x 2 expected."""
    references = References((["a b c d", "a b x d"], ["a"]), ("", ""))
    found = nist(["a b c d", "a"], references)["all"]
    words = (2 * log2(9 / 3) + 2 * log2(9 / 2) + log2(9 / 1)) / 5
    pairs = (log2(3 / 2) + log2(2 / 1)) / 3
    assert found["NIST"].value == pytest.approx(words + pairs + 1.0)
    brevity = 0.5 ** ((log(5 / 6) / log(2 / 3)) ** 2)
    assert found["NIST_mteval"].value == pytest.approx(brevity * (words + pairs + 1 / 2))


def test_summaries_by_hand():
    """Stems count, the better reference, and the longest common subsequence."""
    references = References((["nothing alike", "dogs run and a cat jumped"],), ("",))
    found = rouge(["a cat jumps and dogs running"], references)["all"]
    # all six stems; of five pairs "a cat", "cat jump", "dog run"; the subsequence "a cat jump"
    assert {name: figure.value for name, figure in found.items()} == pytest.approx(
        {"ROUGE-1": 1.0, "ROUGE-2": 3 / 5, "ROUGE-L": 3 / 6})


def test_a_part_of_the_test_set_is_scored_by_itself():
    alone = [i for i, group in enumerate(GROUPS) if group == "seen"]
    both = score("scitldr", OUTPUTS, TEXTS).values
    assert both["seen"] == pytest.approx(score("scitldr", [OUTPUTS[i] for i in alone], References(
        tuple(REFERENCES[i] for i in alone), ("",) * len(alone))).values["all"])
    assert set(both) == {"all", "seen", "unseen"}


def test_other_counts_are_refused():
    with pytest.raises(ValueError, match="7 predictions for 8 inputs"):
        score("e2e", OUTPUTS[1:], TEXTS)


def test_the_tool_prints_them_and_overwrites_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    import evaluate

    (tmp_path / "out.txt").write_text("".join(f"{text}\n" for text in OUTPUTS))
    (tmp_path / "references.txt").write_text("\n".join("".join(f"{t}\n" for t in texts)
                                                       for texts in REFERENCES))
    words = ["--predictions", str(tmp_path / "out.txt"), "--references",
             str(tmp_path / "references.txt"), "--task",
             "jsonl", "--output", str(tmp_path / "scores")]
    assert evaluate.main(words) == 0
    assert f"{E2E['BLEU']:.6f}" in capsys.readouterr().out
    written = json.loads(next((tmp_path / "scores").rglob("scores.json")).read_text())
    assert "sacrebleu" in json.dumps(written)
    assert evaluate.main(words) == 2
    assert "--force" in capsys.readouterr().err
