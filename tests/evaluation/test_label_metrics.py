"""Scores of labels, similarities, short answers and news summaries against figures by hand, of
scikit-learn and of the official scripts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from megatron_spdf.data.finetuning.task import TASKS
from megatron_spdf.evaluation.metrics.answers import normalized
from megatron_spdf.evaluation.references import References
from megatron_spdf.evaluation.scores import score


def scored(task: str, outputs: list[str], references: list, groups=None) -> dict[str, float]:
    texts = tuple((r,) if isinstance(r, str) else tuple(r) for r in references)
    found = score(task, outputs, References(texts, tuple(groups or [""] * len(texts))))
    assert not found.missing, found.missing
    return found.values if groups else found.values["all"]


def test_accuracy_and_f1_by_hand():
    gold = ["equivalent"] * 4 + ["not_equivalent"] * 2
    outputs = ["equivalent", "equivalent", "not_equivalent", "Equivalent", "equivalent",
               "not_equivalent"]
    found = scored("mrpc", outputs, gold)
    assert found["accuracy"] == pytest.approx(3 / 6) and found["no_label"] == 1.0
    # 2 true positives, 1 false positive, 2 false negatives, one of which is no label
    assert found["F1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))


@pytest.mark.parametrize(("outputs", "f1"), [
    (["not_duplicate"] * 3, 0.0), (["?", "?", "duplicate"], 0.5), (["duplicate"] * 3, 0.5)])
def test_f1_at_its_edges(outputs, f1):
    """0 where there is nothing of the second label; what is no label is the wrong one."""
    gold = ["not_duplicate", "not_duplicate", "duplicate"]
    assert scored("qqp", outputs, gold)["F1"] == pytest.approx(f1)
    assert scored("qqp", ["not_duplicate"] * 3, ["not_duplicate"] * 3)["F1"] == 0.0


def test_matthews_is_scikit_learns():
    """The example of sklearn.metrics.matthews_corrcoef: [1, 1, 1, -1], [1, -1, 1, 1] -> -0.33."""
    names = {1: "acceptable", -1: "unacceptable"}
    gold, outputs = ([names[i] for i in row] for row in ([1, 1, 1, -1], [1, -1, 1, 1]))
    assert scored("cola", outputs, gold)["matthews"] == pytest.approx(-1 / 3)
    # 3 of 4 positives and 5 of 6 negatives: (3 5 - 1 1) / sqrt(4 4 6 6)
    gold = ["acceptable"] * 4 + ["unacceptable"] * 6
    outputs = [*gold[:3], "unacceptable", "acceptable", *gold[5:]]
    assert scored("cola", outputs, gold)["matthews"] == pytest.approx(14 / 24)
    assert scored("cola", ["acceptable"] * 10, gold)["matthews"] == 0.0  # as scikit-learn has it


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.2, 0.6), (0.9, 0.7)])
def test_two_labels_score_as_numpys_correlation_and_the_definition_of_f1(shares):
    """Matthews' is Pearson's of zeros and ones."""
    random = np.random.default_rng(4)
    gold, found = (random.random(50) < share for share in shares)
    for task, figure in (("cola", "matthews"), ("mrpc", "F1"), ("qqp", "F1")):
        names = TASKS.get(task).labels
        value = scored(task, [names[int(i)] for i in found], [names[int(i)] for i in gold])[figure]
        assert value == pytest.approx(np.corrcoef(gold, found)[0, 1] if figure == "matthews" else
                                      2 * (gold & found).sum() / (gold.sum() + found.sum()))


def test_three_labels_and_the_parts_of_a_test_set():
    found = scored("mnli", ["neutral", "contradiction", "entails", "entailment"],
                   ["neutral", "neutral", "entailment", "entailment"], ["a", "a", "b", "b"])
    assert found == {"a": {"accuracy": 0.5, "no_label": 0.0},
                     "b": {"accuracy": 0.5, "no_label": 1.0},
                     "all": {"accuracy": 0.5, "no_label": 1.0}}


def test_a_reference_that_is_no_label_is_said():
    found = score("sst2", ["1"], References((("1",),), ("",)))
    assert found.values == {"all": {}}
    assert "the reference '1' is none of the labels negative, positive" in found.missing["accuracy"]


def test_correlations_by_hand():
    gold, outputs = ["1.0", "2.0", "3.0", "4.0"], ["2.0", "1.0", "4.0", "5.0"]
    found = scored("stsb", outputs, gold)
    # deviations (-1.5, -.5, .5, 1.5) and (-1, -2, 1, 2); ranks (1, 2, 3, 4) and (2, 1, 3, 4)
    assert found["pearson"] == pytest.approx(6 / math.sqrt(5 * 10))
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15)) and found["no_number"] == 0
    found = scored("stsb", ["alike", "1.0", "4.0", "5.0"], gold)  # the first counts as -1
    assert found["no_number"] == 1 and found["spearman"] == pytest.approx(1.0)
    with pytest.raises(AssertionError, match="it is nan"):
        scored("stsb", ["3.0"] * 4, gold)


@pytest.mark.parametrize(("answer", "text"), [
    ("The  U.S. Army!", "us army"), ("a/the-an", "athean"), ("an a the", ""),
    ("Another theory", "another theory"),
    ("\u201cThe\u201d end\u2019s", "\u201c \u201d end\u2019s"),
    ("ÉCOLE\u00a0the école", "école école"), ("1,000,000", "1000000"), ("its-a\tme", "itsa me"),
])
def test_answers_are_normalized_as_by_the_official_script(answer, text):
    """Punctuation goes first, ASCII's alone, then articles that are words, then blanks."""
    assert normalized(answer) == text


@pytest.mark.parametrize(("output", "references", "exact", "f1"), [
    ("the Denver Broncos.", ["Denver Broncos", "Broncos"], 100.0, 100.0),
    ("Denver", ["Denver Broncos", "Broncos of Denver city"], 0.0, 200 / 3),  # the best, by F1
    ("Broncos Broncos win", ["the Broncos"], 0.0, 50.0),  # a word counts as often as both have it
    ("Panthers", ["Denver Broncos"], 0.0, 0.0),
    ("", ["Denver Broncos"], 0.0, 0.0),
    ("The", ["a", "Denver"], 100.0, 0.0),  # nothing is left of either: equal, without a word shared
])
def test_squad_scores_by_hand(output, references, exact, f1):
    found = scored("squad", [output], [references])
    assert found == {"exact_match": exact, "F1": pytest.approx(f1)}
    mean = scored("squad", [output, "x"], [references, ["x"]])
    assert mean["exact_match"] == (exact + 100) / 2


def test_a_summary_s_rouge_l_is_over_sentences():
    """By hand of two sentences in the other order: every word is found; in one sequence of words
    the longest common one is of four of the six."""
    said, wanted = "one two . three four five six . ", "three four five six . one two . "
    found = scored("cnn_dailymail", [said.strip()], [wanted.strip()])
    assert found["ROUGE-1"] == 1.0 and found["ROUGE-Lsum"] == 1.0
    assert found["ROUGE-L"] == pytest.approx(4 / 6)
    scorer = RougeScorer(["rougeLsum"], use_stemmer=True)
    texts = ["He runs fast . She sleeps . ", "She slept . He was running fast . "]
    official = scorer.score(*(text.replace(" . ", " .\n") for text in texts))["rougeLsum"].fmeasure
    found = scored("cnn_dailymail", [texts[1].strip()], [texts[0].strip()])
    assert found["ROUGE-Lsum"] == pytest.approx(official) and 0 < official < 1
