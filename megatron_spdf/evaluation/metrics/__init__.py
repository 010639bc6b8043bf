"""Metrics, a family a file; megatron_spdf/data/finetuning/tasks says which a task has."""
