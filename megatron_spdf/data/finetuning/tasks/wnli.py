"""WNLI (Levesque et al. 2011): whether a sentence follows from one that has a pronoun in its place.

Its development set has sentences of the training set with the opposite label, so a model that
learns them by heart scores below chance.
"""

from __future__ import annotations

from megatron_spdf.data.finetuning.glue import Columns, glue_task
from megatron_spdf.data.finetuning.task import TASKS

TASKS.register("wnli", glue_task(
    "WNLI (Levesque et al. 2011)",
    Columns("wnli", {"sentence1": "sentence1", "sentence2": "sentence2"}, "label",
            {"0": "not_entailment", "1": "entailment"}),
    metrics=("accuracy",), submission="WNLI.tsv"))
