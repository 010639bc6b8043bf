"""CoLA (Warstadt et al. 2019): whether a sentence is acceptable English.

The training and development files have no header: source, label, the author's mark, sentence.
"""

from __future__ import annotations

from megatron_spdf.data.finetuning.glue import Columns, glue_task
from megatron_spdf.data.finetuning.task import TASKS

TASKS.register("cola", glue_task(
    "CoLA (Warstadt et al. 2019)",
    Columns("cola", {"sentence": "sentence"}, "label", {"0": "unacceptable", "1": "acceptable"},
            header=("source", "label", "mark", "sentence")),
    metrics=("matthews", "accuracy"), submission="CoLA.tsv"))
