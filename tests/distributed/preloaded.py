"""What every rank imports, imported once; see harness.py."""

import gc

from megatron_spdf.parallel import fake_cuda

fake_cuda.install()

import cases  # noqa: E402
import finetune_cases  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401
from transformers import GPT2LMHeadModel  # noqa: E402, F401

# the ranks collect garbage after every case, and need not go through the libraries for that
gc.freeze()

__all__ = ["cases", "finetune_cases"]
