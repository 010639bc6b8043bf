"""Correlations of numbers that a model writes out, by `scipy`, as STS-B of GLUE has them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.metadata import version

from scipy.stats import pearsonr, spearmanr

from megatron_spdf.evaluation.metrics.metric import METRICS, Figure, Figures, Metric, Texts, by_part

NO_NUMBER = -1.0  # what an output counts as that is none, below every score (Raffel et al. 2020)
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


@by_part
def correlation(outputs: Texts, references: Sequence[Texts]) -> Figures:
    """Pearson's and Spearman's correlation, in [-1, 1], and the number of outputs that are no
    number."""
    found = [float(text) if _NUMBER.fullmatch(text) else NO_NUMBER for text in outputs]
    gold = [float(texts[0]) for texts in references]
    constant = len(set(found)) < 2 or len(set(gold)) < 2  # of which there is no correlation
    signature = f"scipy {version('scipy')}; what is no number counts as {NO_NUMBER:g}"
    values = {name: math.nan if constant else float(measure(found, gold).statistic)
              for name, measure in (("pearson", pearsonr), ("spearman", spearmanr))}
    return {**{name: Figure(value, signature) for name, value in values.items()},
            "no_number": Figure(float(found.count(NO_NUMBER)),
                                "number of outputs that are no number")}


METRICS.register("correlation", Metric(("pearson", "spearman", "no_number"), correlation))
