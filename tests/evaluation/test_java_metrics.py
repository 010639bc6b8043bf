"""What the Java programs behind METEOR and the captioning metrics are asked, and what becomes of
their answers. No Java runs here; figures are held by test_metrics.py where there is one."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_spdf.evaluation.metrics import captions, java
from megatron_spdf.evaluation.metrics.metric import Unavailable
from megatron_spdf.evaluation.references import References


@pytest.fixture
def asked(monkeypatch):
    """What Java is started with: words, standard input, and what is in files that are named."""
    calls, answers = [], []

    def run(*words: object, stdin: str = "") -> str:
        files = [word.read_text() for word in words if isinstance(word, Path) and word.is_file()]
        calls.append(([str(word) for word in words], stdin, files))
        return answers.pop(0)

    monkeypatch.setattr(java, "_java", run)
    monkeypatch.setattr(java, "coco", lambda name: SimpleNamespace(
        __file__=f"/coco/{name}.py", STANFORD_CORENLP_3_4_1_JAR="corenlp.jar",
        PUNCTUATIONS=[".", ","]))
    return calls, answers


def test_meteor_reads_a_line_for_each_output_and_as_many_for_each_ones_references(asked):
    calls, answers = asked
    answers.append("0.25\n")
    given = [["a pub"], ["it  is", "b\nc", "d"], ["e"]]
    assert java.meteor(["the  pub", "it\nis", ""], given) == 0.25
    ((words, stdin, (outputs, references)),) = calls
    assert words[:3] == ["-Xmx2G", "-jar", "/coco/meteor-1.5.jar"] and stdin == ""
    assert words[5:] == ["-l", "en", "-norm", "-r", "3", "-q"]
    assert outputs == "the pub\nit is\n\n"
    assert references == "a pub\n\n\nit is\nb c\nd\ne\n\n\n"  # as many for each, some blank
    assert not any(Path(word).exists() for word in words[3:5])


def test_captions_are_tokenized_line_by_line_in_lower_case_without_punctuation(asked):
    calls, answers = asked
    answers += ["the pub , is here .\n\nit 's\n", "one\n"]
    assert java.ptb_tokenize(["The pub, is\nhere.", "", "It's"]) == ["the pub is here", "", "it 's"]
    words, stdin, _ = calls[0]
    assert words == ["-cp", "/coco/corenlp.jar", "edu.stanford.nlp.process.PTBTokenizer",
                     "-preserveLines", "-lowerCase"]
    assert stdin == "The pub, is here.\n\nIt's"
    with pytest.raises(Unavailable, match="gave 2 lines of 3"):
        java.ptb_tokenize(["a", "b", "c"])


def test_a_java_that_does_not_answer_is_not_waited_for(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(java, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(java, "coco", lambda name: SimpleNamespace(__file__="/coco/it.py"))
    began = time.monotonic()
    with pytest.raises(Unavailable, match="java gave no answer in 0.2 s; see with `java -version`"):
        java.meteor(["a"], [["a"]])
    assert time.monotonic() - began < 20


def test_every_caption_is_held_against_its_own_references(monkeypatch):
    given = []

    class Scorer:
        def compute_score(self, targets, outputs):
            given.append((targets, outputs))
            return float(len(given)), None

    monkeypatch.setattr(captions, "coco", lambda name: SimpleNamespace(Cider=Scorer, Rouge=Scorer))
    monkeypatch.setattr(captions, "ptb_tokenize", lambda texts: [text.lower() for text in texts])
    monkeypatch.setattr(captions, "version", lambda package: "1.2")
    monkeypatch.setattr(captions, "meteor_signature", lambda: "METEOR's")
    monkeypatch.setattr(captions, "meteor", lambda *words: given.append(words) or 0.5)
    found = captions.captions(["A", "B"], References((("C", "D"), ("E",)), ("", "")))["all"]
    targets = {0: ["c", "d"], 1: ["e"]}
    assert given == [(["a", "b"], [["c", "d"], ["e"]]), *[(targets, {0: ["a"], 1: ["b"]})] * 2]
    assert {name: (figure.value, figure.signature) for name, figure in found.items()} == {
        "METEOR": (0.5, "PTB tokens, METEOR's"),
        "ROUGE_L": (2.0, "PTB tokens, pycocoevalcap 1.2"),
        "CIDEr": (3.0, "PTB tokens, pycocoevalcap 1.2")}
