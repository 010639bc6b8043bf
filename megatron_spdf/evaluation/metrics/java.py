"""Java programs behind the captioning metrics, from `pycocoevalcap`: Stanford's tokenizer and
METEOR. Where the package is not installed these metrics alone are missing."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from megatron_spdf.evaluation.metrics.metric import (
    METRICS,
    Figure,
    Figures,
    Metric,
    Unavailable,
    by_part,
)
from megatron_spdf.files import write_file

PACKAGE = "pycocoevalcap"
ANSWER_SECONDS = 3600  # the largest test set takes a minute


def coco(name: str) -> ModuleType:
    """Imports a module of `pycocoevalcap`.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        raise Unavailable(f"needs {PACKAGE}, and there is no {error.name}; pip install "
                          f"{PACKAGE}") from None


def ptb_tokenize(sentences: Sequence[str]) -> list[str]:
    """Tokenizes captions as MS-COCO's metrics do: lower-cased Penn Treebank tokens without
    punctuation, joined by blanks.

    Raises:
        Unavailable: Java or `pycocoevalcap` is missing, or Java fails.
    """
    ptb = coco("tokenizer.ptbtokenizer")
    jar = Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)
    text = "\n".join(map(_one_line, sentences))
    out = _java("-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines",
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
        Unavailable: Java or `pycocoevalcap` is missing, or Java fails.
    """
    jar = Path(coco("meteor.meteor").__file__).with_name("meteor-1.5.jar")
    most = max(map(len, references))
    padded = [line for texts in references
              for line in [*map(_one_line, texts), *[""] * (most - len(texts))]]
    with tempfile.TemporaryDirectory() as directory:
        outputs, targets = Path(directory, "outputs"), Path(directory, "references")
        write_file(outputs, "".join(f"{_one_line(text)}\n" for text in predictions))
        write_file(targets, "".join(f"{line}\n" for line in padded))
        return float(_java("-Xmx2G", "-jar", jar, outputs, targets, "-l", "en", "-norm",
                           "-r", most, "-q"))


@by_part
def meteor_score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Figures:
    """METEOR of tokenized texts."""
    return {"METEOR": Figure(meteor(predictions, references), meteor_signature())}


def meteor_signature() -> str:
    """What is behind a figure of METEOR."""
    return f"METEOR 1.5 -l en -norm, {PACKAGE} {version(PACKAGE)}"


METRICS.register("meteor", Metric(("METEOR",), meteor_score))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _java(*words: object, stdin: str = "") -> str:
    program = shutil.which("java")
    if program is None:
        raise Unavailable("needs Java, and there is no `java` in PATH")
    try:
        done = subprocess.run([program, *map(str, words)], input=stdin.encode(),
                              capture_output=True, check=False, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"java gave no answer in {ANSWER_SECONDS:,} s; see with `java -version` "
                          "whether it works, and score what was decoded again") from None
    if done.returncode or not done.stdout:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
        raise Unavailable(f"java failed: {reason[0]}")
    return done.stdout.decode()
