"""QQP (Quora): whether two questions ask the same.

A few rows of the published training set are broken by line ends inside of a question.
"""

from __future__ import annotations

from megatron_spdf.data.finetuning.glue import Columns, glue_task
from megatron_spdf.data.finetuning.task import TASKS

TASKS.register("qqp", glue_task(
    "QQP (Quora)",
    Columns("qqp", {"question1": "question1", "question2": "question2"}, "is_duplicate",
            {"0": "not_duplicate", "1": "duplicate"}, may_break=True),
    metrics=("accuracy", "binary_f1"), submission="QQP.tsv"))
