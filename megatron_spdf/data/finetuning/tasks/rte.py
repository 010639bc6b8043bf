"""RTE (Dagan et al. 2006 and later): whether a text entails a sentence."""

from __future__ import annotations

from megatron_spdf.data.finetuning.glue import Columns, glue_task
from megatron_spdf.data.finetuning.task import TASKS

TASKS.register("rte", glue_task(
    "RTE (Dagan et al. 2006)",
    Columns("rte", {"sentence1": "sentence1", "sentence2": "sentence2"}, "label",
            {name: name for name in ("entailment", "not_entailment")}),
    metrics=("accuracy",), submission="RTE.tsv"))
