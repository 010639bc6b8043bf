"""METEOR, ROUGE-L and CIDEr of MS-COCO's caption evaluation, as the official E2E metrics use
them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from itertools import accumulate, pairwise

from megatron_spdf.evaluation.metrics.java import (
    PACKAGE,
    coco,
    meteor,
    meteor_signature,
    ptb_tokenize,
)
from megatron_spdf.evaluation.metrics.metric import METRICS, Figure, Figures, Metric, by_part


@by_part
def captions(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Figures:
    """METEOR, ROUGE_L (Lin 2004, with beta 1.2) and CIDEr (Vedantam et al. 2015) of raw texts.

    Raises:
        Unavailable: Java or `pycocoevalcap` is missing, or Java fails.
    """
    cider, rouge = coco("cider.cider").Cider(), coco("rouge.rouge").Rouge()
    tokens = ptb_tokenize([*predictions, *(text for texts in references for text in texts)])
    ends = accumulate(map(len, references), initial=len(predictions))
    targets = dict(enumerate(tokens[start:end] for start, end in pairwise(ends)))
    outputs = {i: [text] for i, text in enumerate(tokens[: len(predictions)])}
    of_meteor = meteor([text for (text,) in outputs.values()], list(targets.values()))
    behind = f"PTB tokens, {PACKAGE} {version(PACKAGE)}"
    return {"METEOR": Figure(of_meteor, f"PTB tokens, {meteor_signature()}"),
            "ROUGE_L": Figure(float(rouge.compute_score(targets, outputs)[0]), behind),
            "CIDEr": Figure(float(cider.compute_score(targets, outputs)[0]), behind)}


METRICS.register("captions", Metric(("METEOR", "ROUGE_L", "CIDEr"), captions))
