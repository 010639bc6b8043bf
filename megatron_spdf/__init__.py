"""Sparse pre-training, dense fine-tuning (SPDF) of GPT models on Megatron-Core and DeepSpeed."""

__version__ = "0.1.0"
