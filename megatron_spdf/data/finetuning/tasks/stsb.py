"""STS-B (Cer et al. 2017): how alike two sentences are, from 0 to 5.

The completion is the score as the file has it, "3.8" of 3.800, so that correlations are with the
published scores. T5 rounds them to multiples of 0.2.
"""

from __future__ import annotations

from megatron_spdf.data.finetuning.glue import Columns, glue_task
from megatron_spdf.data.finetuning.task import TASKS

TASKS.register("stsb", glue_task(
    "STS-B (Cer et al. 2017)",
    Columns("stsb", {"sentence1": "sentence1", "sentence2": "sentence2"}, "score", {}),
    metrics=("correlation",), submission="STS-B.tsv"))
