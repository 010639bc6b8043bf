"""Metrics, one family per file. Tasks in megatron_spdf/data/finetuning/tasks name those they
use."""
