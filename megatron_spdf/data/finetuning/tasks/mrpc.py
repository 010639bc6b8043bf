"""MRPC (Dolan and Brockett 2005): whether two sentences say the same.

Microsoft's msr_paraphrase_*.txt and the files that GLUE's script makes of them have the same
columns. Microsoft's test set has labels, and the inputs of GLUE's in its order.
"""

from __future__ import annotations

from megatron_spdf.data.finetuning.glue import Columns, glue_task
from megatron_spdf.data.finetuning.task import TASKS

TASKS.register("mrpc", glue_task(
    "MRPC (Dolan and Brockett 2005)",
    Columns("mrpc", {"sentence1": "#1 string", "sentence2": "#2 string"}, "quality",
            {"0": "not_equivalent", "1": "equivalent"}),
    metrics=("accuracy", "binary_f1"), submission="MRPC.tsv",
    files={"train": ("train.tsv",), "validation": ("dev.tsv",),
           "test": ("msr_paraphrase_test.txt", "test.tsv")}))
