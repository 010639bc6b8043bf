"""Java programs behind the captioning metrics, from `pycocoevalcap`: Stanford's tokenizer and
METEOR."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pycocoevalcap.meteor.meteor
import pycocoevalcap.tokenizer.ptbtokenizer as ptb

from megatron_spdf.evaluation.metrics.metric import (
    METRICS,
    Figure,
    Figures,
    Metric,
    Unavailable,
    by_part,
)
from megatron_spdf.files import write_file

METEOR = f"METEOR 1.5 -l en -norm, pycocoevalcap {version('pycocoevalcap')}"
_METEOR_JAR = Path(pycocoevalcap.meteor.meteor.__file__).with_name("meteor-1.5.jar")
_STANFORD_JAR = Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)


def ptb_tokenize(sentences: Sequence[str]) -> list[str]:
    """Tokenizes captions as MS-COCO's metrics do: lower-cased Penn Treebank tokens without
    punctuation, joined by blanks.

    Raises:
        Unavailable: Java is missing or fails.
    """
    text = "\n".join(map(_one_line, sentences))
    out = _java("-cp", _STANFORD_JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines",
                "-lowerCase", stdin=text)
    lines = out.split("\n")[: len(sentences)]
    if len(lines) < len(sentences):
        raise Unavailable(f"Stanford's tokenizer gave {len(lines)} lines of {len(sentences)}")
    return [" ".join(w for w in line.rstrip().split(" ") if w not in ptb.PUNCTUATIONS)
            for line in lines]


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 (Denkowski and Lavie 2014) with `-l en -norm`, of several references.

    Reads files instead of the pipe of `pycocoevalcap`, in which an empty prediction would hang it.
    The figures are the same.

    Raises:
        Unavailable: Java is missing or fails.
    """
    most = max(map(len, references))
    padded = [line for texts in references
              for line in [*map(_one_line, texts), *[""] * (most - len(texts))]]
    with tempfile.TemporaryDirectory() as directory:
        outputs, targets = Path(directory, "outputs"), Path(directory, "references")
        write_file(outputs, "".join(f"{_one_line(text)}\n" for text in predictions))
        write_file(targets, "".join(f"{line}\n" for line in padded))
        return float(_java("-Xmx2G", "-jar", _METEOR_JAR, outputs, targets, "-l", "en", "-norm",
                           "-r", most, "-q"))


@by_part
def meteor_score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Figures:
    """METEOR of tokenized texts."""
    return {"METEOR": Figure(meteor(predictions, references), METEOR)}


METRICS.register("meteor", Metric(("METEOR",), meteor_score))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _java(*words: object, stdin: str = "") -> str:
    program = shutil.which("java")
    if program is None:
        raise Unavailable("needs Java, and there is no `java` in PATH")
    done = subprocess.run([program, *map(str, words)], input=stdin.encode(), capture_output=True,
                          check=False)
    if done.returncode or not done.stdout:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
        raise Unavailable(f"java failed: {reason[0]}")
    return done.stdout.decode()
