"""SST-2 (Socher et al. 2013): a sentence of a film review, negative or positive."""

from __future__ import annotations

from megatron_spdf.data.finetuning.glue import Columns, glue_task
from megatron_spdf.data.finetuning.task import TASKS

TASKS.register("sst2", glue_task(
    "SST-2 (Socher et al. 2013)",
    Columns("sst2", {"sentence": "sentence"}, "label", {"0": "negative", "1": "positive"}),
    metrics=("accuracy",), submission="SST-2.tsv"))
