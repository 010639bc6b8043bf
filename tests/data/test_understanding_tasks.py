"""Tasks of GLUE, SQuAD and CNN/DailyMail, from small files as they are published."""

from __future__ import annotations

import hashlib
import json
import logging

import pytest

from megatron_spdf.data.finetuning.completions import tokenize
from megatron_spdf.data.finetuning.task import TASKS, Example, load_examples
from megatron_spdf.data.tokenizers.tokenizer import train_tokenizer

MNLI = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
        "sentence1_parse", "sentence2_parse", "sentence1", "sentence2"]
STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1",
        "sentence2"]
# task -> file of its training set as GLUE has it, rows by tabs; the example of its last row
TRAINING = {
    "sst2": ([["sentence", "label"], ['a "good film ', "1"]],
             Example('sst2 sentence: a "good film', ("positive",))),
    "cola": ([["gj04", "1", "", "The sailors rode the breeze."],
              ["bc01", "0", "*", 'They "drank the pub.']],
             Example('cola sentence: They "drank the pub.', ("unacceptable",))),
    "mrpc": ([["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
              ["1", "702876", "702977", '"Amrozi accused', 'Referring to "the witness" , ']],
             Example('mrpc sentence1: "Amrozi accused sentence2: Referring to "the witness" ,',
                     ("equivalent",))),
    "qqp": ([["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
             ["7", "1", "2", 'Is "x', "Is x?", "0"]],
            Example('qqp question1: Is "x question2: Is x?', ("not_duplicate",), key="7")),
    "stsb": ([[*STSB, "score"],
              ["3", "main-captions", "MSRvid", "2012", "0001", "none", "none", "A plane.",
               "An air plane.", "3.800"]],
             Example("stsb sentence1: A plane. sentence2: An air plane.", ("3.8",), key="3")),
    "mnli": ([[*MNLI, "label1", "gold_label"],
              ["0", "31193", "31193n", "government", "( A )", "( B )", "(ROOT A)", "(ROOT B)",
               "A premise.", "A hypothesis.", "entailment", "neutral"]],
             Example("mnli hypothesis: A hypothesis. premise: A premise.", ("neutral",), key="0")),
    "qnli": ([["index", "question", "sentence", "label"],
              ["0", "When?", "Then it was.", "not_entailment"]],
             Example("qnli question: When? sentence: Then it was.", ("not_entailment",), key="0")),
    "rte": ([["index", "sentence1", "sentence2", "label"],
             ["0", "No arms.", "Arms.", "entailment"]],
            Example("rte sentence1: No arms. sentence2: Arms.", ("entailment",), key="0")),
    "wnli": ([["index", "sentence1", "sentence2", "label"], ["0", "It is.", "A pin is.", "1"]],
             Example("wnli sentence1: It is. sentence2: A pin is.", ("entailment",), key="0")),
}
PASSAGE = "The Norman dynasty had a major impact."
ANSWERS = [{"answer_start": 4, "text": "Norman"}, {"answer_start": 0, "text": "The Norman"},
           {"answer_start": 4, "text": "Norman"}]


def write(path, rows) -> None:
    path.write_bytes("".join("\t".join(row) + "\n" for row in rows).encode())


@pytest.mark.parametrize("task", TRAINING)
def test_a_training_set_of_glue(tmp_path, task):
    rows, example = TRAINING[task]
    write(tmp_path / "train.tsv", rows)
    found = load_examples(task, tmp_path, "train")
    assert found[-1] == example and found[-1].references[0] in (TASKS.get(task).labels or ("3.8",))
    # a file whose rows end in CR LF is the same
    (tmp_path / "train.tsv").write_bytes((tmp_path / "train.tsv").read_bytes().replace(b"\n",
                                                                                      b"\r\n"))
    assert load_examples(task, tmp_path, "train") == found


@pytest.mark.parametrize(("task", "name", "rows", "context"), [
    ("sst2", "test.tsv", [["index", "sentence"], ["0", "dull"]], "sst2 sentence: dull"),
    ("cola", "test.tsv", [["index", "sentence"], ["0", "Bill."]], "cola sentence: Bill."),
    ("mrpc", "test.tsv", [["index", "#1 ID", "#2 ID", "#1 String", "#2 String"],
                          ["0", "1", "2", "a", "b"]], "mrpc sentence1: a sentence2: b"),
    ("rte", "test.tsv", [["index", "sentence1", "sentence2", "label"], ["0", "a", "b", "-1"]],
     "rte sentence1: a sentence2: b"),
    ("mnli_mismatched", "test_mismatched.tsv", [MNLI, ["0", *"1234567", "p", "h"]],
     "mnli hypothesis: h premise: p"),
    ("qqp", "test.tsv", [["id", "question1", "question2"], ["0", "", "b"]],
     "qqp question1:  question2: b"),
])
def test_a_test_set_without_labels(tmp_path, task, name, rows, context):
    write(tmp_path / name, rows)
    assert load_examples(task, tmp_path, "test") == [Example(context, (), key="0")]


def test_a_line_ends_at_lf_and_nowhere_else(tmp_path):
    write(tmp_path / "dev.tsv", [["sentence", "label"], ["a\rb\x0bc\u2028d\x85e", "0"], ["f", "1"]])
    assert [e.context for e in load_examples("sst2", tmp_path, "validation")] == [
        "sst2 sentence: a\rb\x0bc\u2028d\x85e", "sst2 sentence: f"]


def test_matched_and_mismatched_sets_are_two_tasks(tmp_path):
    for part in ("matched", "mismatched"):
        row = ["0", *"1234567", part, "h", "neutral", "entailment"]
        write(tmp_path / f"dev_{part}.tsv", [[*MNLI, "label1", "gold_label"], row])
    for task, part in (("mnli", "matched"), ("mnli_mismatched", "mismatched")):
        (example,) = load_examples(task, tmp_path, "validation")
        assert example.context == f"mnli hypothesis: h premise: {part}"


def test_microsofts_test_set_of_mrpc_has_labels_and_goes_first(tmp_path):
    header = ["#1 ID", "#2 ID", "#1 String", "#2 String"]
    write(tmp_path / "test.tsv", [["index", *header], ["0", "1", "2", "a", "b"]])
    write(tmp_path / "msr_paraphrase_test.txt", [["Quality", *header], ["0", "1", "2", "a", "b"]])
    (example,) = load_examples("mrpc", tmp_path, "test")
    assert example.references == ("not_equivalent",)
    assert load_examples("mrpc", tmp_path / "test.tsv", "test")[0].references == ()


def test_broken_rows_of_qqp_are_left_out_and_said(tmp_path, caplog):
    header, row = TRAINING["qqp"][0]
    write(tmp_path / "train.tsv", [header, row, row[:4], ["goes on?", "0"], row])
    with caplog.at_level(logging.WARNING):
        assert len(load_examples("qqp", tmp_path, "train")) == 2
    assert "2 rows are broken in two or more and left out, lines 3, 4" in caplog.text
    write(tmp_path / "test.tsv", [["id", "question1", "question2"], ["0", "a"]])
    with pytest.raises(ValueError, match="test.tsv, line 2: 2 fields where the header has 3"):
        load_examples("qqp", tmp_path, "test")  # a submission has a line for every row


@pytest.mark.parametrize(("task", "rows", "message"), [
    ("sst2", [["sentence", "label"], ["good", "2"]],
     r"line 2: field 'label' must be 0, 1, or -1, - for none; it is '2'"),
    ("sst2", [["text", "label"], ["good", "1"]], r"line 1: no column sentence; the header is"),
    ("sst2", [["sentence", "label"], [" ", "1"]], r"line 2: field 'sentence' must be a text"),
    ("rte", [["index", "sentence1", "sentence2", "label"], ["0", "a", "b"]],
     r"line 2: 3 fields where the header has 4"),
    ("stsb", [[*STSB, "score"], [*"0123456", "a", "b", "high"]],
     r"line 2: field 'score' must be a number, or -1, - for none; it is 'high'"),
    ("cola", [["a", "b", "c"]], r"line 1: no column sentence"),
    ("wnli", [], r"line 1: no column sentence1, sentence2"),
])
def test_what_is_malformed_is_named(tmp_path, task, rows, message):
    write(tmp_path / "train.tsv", rows)
    with pytest.raises(ValueError, match=f"train.tsv, {message}"):
        load_examples(task, tmp_path, "train")
    (tmp_path / "train.tsv").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="train.tsv: not UTF-8"):
        load_examples(task, tmp_path, "train")


@pytest.mark.parametrize(("task", "outputs", "lines"), [
    ("sst2", ["positive", "Positive", "negative"], ["0\t1", "1\t0", "2\t0"]),
    ("qnli", ["entailment", "not_entailment", ""],
     ["0\tentailment", "1\tnot_entailment", "2\tentailment"]),
    ("stsb", ["3.8", "9.25", "alike"], ["0\t3.8", "1\t5.0", "2\t0.0"]),
])
def test_a_submission_to_glue(task, outputs, lines):
    examples = [Example("a", (), key=str(number)) for number in range(3)]
    name, content = TASKS.get(task).submission(examples, outputs)
    assert name == {"sst2": "SST-2.tsv", "qnli": "QNLI.tsv", "stsb": "STS-B.tsv"}[task]
    assert content.splitlines() == ["index\tprediction", *lines]
    unnamed = [Example("a", ()) for _ in range(3)]
    assert TASKS.get(task).submission(unnamed, outputs) == (name, content)


def squad(question: dict, version: str = "1.1") -> dict:
    paragraph = {"context": PASSAGE, "qas": [{"id": "56d", "question": " Who?", **question}]}
    return {"data": [{"title": "Normans", "paragraphs": [paragraph]}], "version": version}


def test_squad_has_the_question_last_and_each_answer_once(tmp_path):
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(squad({"answers": ANSWERS})))
    (example,) = load_examples("squad", tmp_path, "validation")
    assert example == Example(f"context: {PASSAGE} question: Who?", ("Norman", "The Norman"),
                              key="56d")
    (tmp_path / "test-v1.1.json").write_text(json.dumps(squad({})))
    assert load_examples("squad", tmp_path, "test")[0].references == ()
    name, content = TASKS.get("squad").submission([example], ["the Normans\u00e9"])
    assert name == "predictions.json" and json.loads(content) == {"56d": "the Normans\u00e9"}


@pytest.mark.parametrize(("content", "message"), [
    ([], "a list instead of an object with the field 'data'"),
    ({"data": [{"title": "x"}]}, "article 1: field 'paragraphs' must be a list"),
    ({"data": [{"paragraphs": [{"qas": []}]}]}, "paragraph 1: field 'context' must be a text"),
    (squad({"answers": [{"text": ""}]}), "question 56d: field 'text' must be a text"),
    (squad({"answers": ["Norman"]}), "question 56d: an object must have text; it is 'Norman'"),
    (squad({"answers": [], "is_impossible": True}, "v2.0"),
     "question 56d has no answer: this is SQuAD 2.0"),
])
def test_what_is_malformed_in_squad_is_named(tmp_path, content, message):
    (tmp_path / "train-v1.1.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_examples("squad", tmp_path, "train")


STORY = ("LONDON (Reuters) -- A star is 18\n\n\u201cHe said so.\u201d\n\n@highlight\n\n"
         "Harry gets \u00a320M\n\n@highlight\n\nHe has no plans!\n")
NEWS = Example("LONDON (Reuters) -- A star is 18 . \u201cHe said so.\u201d",
               ("Harry gets \u00a320M . He has no plans!",))


def test_stories_of_cnn_are_the_csv_files(tmp_path):
    """A csv of Hugging Face has what See's script makes of a story."""
    article, highlights = NEWS.context, NEWS.references[0].replace(" . ", " .\n \n")
    assert "\n" in highlights
    (tmp_path / "test.csv").write_text(f'id,article,highlights\nabc,"{article}","{highlights}"\n'
                                       'def,," "\n')
    (found,) = load_examples("cnn_dailymail", tmp_path, "test")
    assert found == Example(NEWS.context, NEWS.references, key="abc")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "abc.story").write_text(STORY)
    (tmp_path / "train" / "empty.story").write_text("@highlight\n\nNothing above\n")
    assert load_examples("cnn_dailymail", tmp_path, "train") == [found]


def test_stories_by_a_list_of_urls(tmp_path):
    url = "http://web.archive.org/web/2009id_/http://www.cnn.com:80/a.html"
    name = hashlib.sha1(url.encode()).hexdigest()
    (tmp_path / "all_val.txt").write_text(f"{url}\n")
    with pytest.raises(ValueError, match=f"all_val.txt, line 1: .*{name}.story must be in cnn/"):
        load_examples("cnn_dailymail", tmp_path, "validation")
    (tmp_path / "dailymail" / "stories").mkdir(parents=True)
    (tmp_path / "dailymail" / "stories" / f"{name}.story").write_text(STORY)
    (found,) = load_examples("cnn_dailymail", tmp_path, "validation")
    assert found == Example(NEWS.context, NEWS.references, key=name)


def test_a_csv_without_highlights_is_decoded(tmp_path):
    (tmp_path / "test.csv").write_text("id,article\nabc,News.\n")
    assert load_examples("cnn_dailymail", tmp_path, "test") == [Example("News.", (), key="abc")]


@pytest.mark.parametrize(("task", "kept", "lost"), [
    ("cnn_dailymail", "first", "last"), ("squad", "last", "first")])
def test_what_a_long_input_loses(tmp_path, task, kept, lost):
    """Of an article the end, and never of the summary; of a passage the beginning, and never the
    question."""
    words = ["first", *["word"] * 60, "last"]
    (tmp_path / "train.csv").write_text(f"id,article,highlights\na,{' '.join(words)},Short .\n")
    (tmp_path / "train-v1.1.json").write_text(json.dumps({"data": [{"paragraphs": [
        {"context": " ".join(words[:-1]),
         "qas": [{"id": "a", "question": "last", "answers": [{"text": "Short ."}]}]}]}]}))
    tokenizer = train_tokenizer("bpe", [" ".join(words)] * 3, 262, tmp_path / "bpe")
    pairs = tokenize(task, tmp_path, "train", tokenizer, 32)
    text = tokenizer.decode(pairs.tokens[0][: pairs.starts[0] - 1])
    assert pairs.truncated == 1 and pairs.lengths[0] == 32
    assert kept in text and lost not in text
    assert tokenizer.decode(pairs.tokens[0][pairs.starts[0] : -1]) == " Short ."
