"""METEOR, ROUGE-L and CIDEr of MS-COCO's caption evaluation, which the official E2E metrics use."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from megatron_spdf.evaluation.metrics.java import meteor, ptb_tokenize


def caption_scores(predictions: Sequence[str],
                   references: Sequence[Sequence[str]]) -> dict[str, float]:
    """METEOR, ROUGE_L (Lin, 2004; with beta 1.2) and CIDEr (Vedantam et al., 2015) of raw texts.

    Raises:
        JavaUnavailable: Java is missing or fails.
    """
    tokens = ptb_tokenize([*predictions, *(text for texts in references for text in texts)])
    ends = accumulate(map(len, references), initial=len(predictions))
    targets = dict(enumerate(tokens[start:end] for start, end in pairwise(ends)))
    outputs = {i: [text] for i, text in enumerate(tokens[: len(predictions)])}
    return {"METEOR": meteor([text for (text,) in outputs.values()], list(targets.values())),
            "ROUGE_L": float(Rouge().compute_score(targets, outputs)[0]),
            "CIDEr": float(Cider().compute_score(targets, outputs)[0])}
