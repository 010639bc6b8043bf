"""MNLI (Williams et al. 2018), its matched sets, of the genres of the training set: whether a
premise entails a hypothesis."""

from __future__ import annotations

from megatron_spdf.data.finetuning.glue import Columns, glue_task
from megatron_spdf.data.finetuning.task import TASKS

LABELS = {name: name for name in ("entailment", "neutral", "contradiction")}
COLUMNS = Columns("mnli", {"hypothesis": "sentence2", "premise": "sentence1"}, "gold_label", LABELS)

TASKS.register("mnli", glue_task(
    "MNLI, matched (Williams et al. 2018)", COLUMNS, metrics=("accuracy",),
    submission="MNLI-m.tsv",
    files={"train": ("train.tsv",), "validation": ("dev_matched.tsv",),
           "test": ("test_matched.tsv",)}))
