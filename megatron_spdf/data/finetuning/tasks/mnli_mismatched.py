"""MNLI (Williams et al. 2018), its mismatched sets, of genres that the training set has not."""

from __future__ import annotations

from megatron_spdf.data.finetuning.glue import glue_task
from megatron_spdf.data.finetuning.task import TASKS
from megatron_spdf.data.finetuning.tasks.mnli import COLUMNS

TASKS.register("mnli_mismatched", glue_task(
    "MNLI, mismatched (Williams et al. 2018)", COLUMNS, metrics=("accuracy",),
    submission="MNLI-mm.tsv",
    files={"train": ("train.tsv",), "validation": ("dev_mismatched.tsv",),
           "test": ("test_mismatched.tsv",)}))
