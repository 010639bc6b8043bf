"""The figures of a task: those that its official scripts print, and equal to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from megatron_spdf.evaluation.metrics.captions import caption_scores
from megatron_spdf.evaluation.metrics.java import JavaUnavailable, meteor
from megatron_spdf.evaluation.metrics.ngrams import bleu_raw, bleu_tokenized, ter_edits
from megatron_spdf.evaluation.metrics.nist import nist
from megatron_spdf.evaluation.metrics.summaries import rouge
from megatron_spdf.evaluation.references import TOKENIZED, References, in_official_form

ALL = "all"
_METEOR = f"METEOR 1.5 -l en -norm, pycocoevalcap {version('pycocoevalcap')}"
_COCO = f"PTB tokens, pycocoevalcap {version('pycocoevalcap')}"


@dataclass
class Scores:
    """What was computed, how, and what could not be.

    Attributes:
        values: part of the test set -> metric -> score. The part "all" is there always; WebNLG's
            data have "seen" and "unseen".
        signatures: metric -> the implementation and settings behind its values.
        missing: metric -> why it has no value.
    """

    values: dict[str, dict[str, float]] = field(default_factory=lambda: {ALL: {}})
    signatures: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def score(task: str, predictions: Sequence[str], references: References) -> Scores:
    """Scores predictions, one for each input.

    E2E has BLEU, NIST, METEOR, ROUGE_L and CIDEr of its metrics; WebNLG and DART have BLEU, METEOR
    and TER of theirs; summaries have ROUGE, and other tasks BLEU and ROUGE.

    Raises:
        ValueError: predictions and references are of different counts, or there are none.
    """
    if len(predictions) != len(references.texts) or not predictions:
        raise ValueError(f"{len(predictions)} predictions for {len(references.texts)} inputs with "
                         "references; there must be one prediction for each, one per line, in the "
                         "order of the references")
    if task in TOKENIZED:
        return _score_tokenized(*in_official_form(task, predictions, references))
    scores = Scores()
    if task == "e2e":
        _score_e2e(scores, predictions, references.texts)
    else:
        if task == "jsonl":
            _add_bleu(scores, predictions, references.texts)
        signature = (
            f"F1, stemmed, best of the references, mean; rouge-score {version('rouge-score')}"
        )
        _add(scores, rouge(predictions, references.texts), signature)
    return scores


def _add(scores: Scores, values: dict[str, float], signature: str, part: str = ALL) -> None:
    scores.values.setdefault(part, {}).update(values)
    scores.signatures.update(dict.fromkeys(values, signature))


def _add_bleu(scores: Scores, predictions: Sequence[str],
              references: Sequence[Sequence[str]]) -> None:
    bleu, signature = bleu_raw(predictions, references)
    _add(scores, {"BLEU": bleu}, signature)


def _score_e2e(scores: Scores, predictions: Sequence[str],
               references: Sequence[Sequence[str]]) -> None:
    _add_bleu(scores, predictions, references)
    both = nist(predictions, references)
    _add(scores, {"NIST": both.port},
         "own, length penalty of the official metrics' Python port (measure_scores.py -p)")
    _add(scores, {"NIST_mteval": both.perl},
         "own, length penalty of the official metrics' mteval-v13a (Perl)")
    try:
        values = caption_scores(predictions, references)
        _add(scores, {"METEOR": values.pop("METEOR")}, f"PTB tokens, {_METEOR}")
        _add(scores, values, _COCO)
    except JavaUnavailable as error:
        scores.missing.update(dict.fromkeys(("METEOR", "ROUGE_L", "CIDEr"), str(error)))


def _score_tokenized(predictions: Sequence[str], references: References) -> Scores:
    """BLEU in percent, METEOR and TER of each part; TER of all is from the sums of its parts."""
    scores = Scores()
    parts = sorted(set(references.groups))
    inputs = {part: [i for i, group in enumerate(references.groups) if group == part]
              for part in parts}
    edits, lengths = 0.0, 0.0
    for part in parts:
        outputs = [predictions[i] for i in inputs[part]]
        targets = [references.texts[i] for i in inputs[part]]
        part_edits, part_length, signature = ter_edits(outputs, targets)
        edits, lengths = edits + part_edits, lengths + part_length
        if len(parts) > 1:
            _add_bleu_and_meteor(scores, part, outputs, targets)
            _add(scores, {"TER": part_edits / part_length}, signature, part)
    _add_bleu_and_meteor(scores, ALL, predictions, references.texts)
    _add(scores, {"TER": edits / lengths}, f"tercom's (not pyter's); sacrebleu {signature}")
    return scores


def _add_bleu_and_meteor(scores: Scores, part: str, outputs: Sequence[str],
                         targets: Sequence[Sequence[str]]) -> None:
    bleu, signature = bleu_tokenized(outputs, targets)
    _add(scores, {"BLEU": bleu}, signature, part)
    try:
        _add(scores, {"METEOR": meteor(outputs, targets)}, _METEOR, part)
    except JavaUnavailable as error:
        scores.missing["METEOR"] = str(error)


def render(scores: Scores) -> str:
    """A line for each metric and a column for each part of the test set, then what is behind the
    figures."""
    parts = [ALL, *sorted(scores.values.keys() - {ALL})]
    names = list(dict.fromkeys(name for part in parts for name in scores.values[part]))
    head = [f"{'':<12}" + "".join(f"{part:>12}" for part in parts)] if len(parts) > 1 else []
    rows = [f"{name:<12}"
            + "".join(f"{_figure(scores.values[part].get(name)):>12}" for part in parts)
            for name in names]
    missing = [f"{name:<12}{'missing':>12}  ({why})" for name, why in scores.missing.items()]
    behind = [f"  {name}: {signature}" for name, signature in scores.signatures.items()]
    return "\n".join([*head, *rows, *missing, *behind])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
