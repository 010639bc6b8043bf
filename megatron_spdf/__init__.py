"""Sparse pre-training, dense fine-tuning (SPDF) of decoders on Megatron-Core and DeepSpeed.

For any module of PyTorch there are `sparsify`, `densify` and `expanded`, see `layers/plain.py`.
"""

import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from megatron_spdf.version import __version__

__all__ = ["__version__", "densify", "expanded", "sparsify"]

# What Megatron-Core and PyTorch say of their own code on every rank of every run: that libraries
# are missing which are optional (the log's first lines have what is used instead), and that some
# calls will have other names one day.
_KNOWN = (
    r"Transformer Engine and Apex are not installed",
    r"Apex is not installed",
    r"full scope is deprecated",
    r"barrier\(\): using the device under current context",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    r"MimoModelConfig is experimental",
    r"Could not determine rank from torch\.distributed",
)
# The same, where they log instead: logger -> how its message begins. Megatron-Core 0.19 recommends
# HybridModel over GPTModel; and that its buffers be laid out ahead, where it does it alike itself.
_KNOWN_LOGGED = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel":
        "DistributedDataParallel: full_param_layout not provided",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}

if not sys.warnoptions:  # -W and PYTHONWARNINGS are the user's
    warnings.filterwarnings("ignore", "|".join(_KNOWN))
for _name, _start in _KNOWN_LOGGED.items():
    logging.getLogger(_name).addFilter(
        lambda record, start=_start: not record.getMessage().startswith(start))


def _is_command() -> bool:
    """Whether this process runs a script of the project."""
    script, root = getattr(sys.modules["__main__"], "__file__", None), Path(__file__).parents[1]
    places = (root.resolve(), (root / "tools").resolve())
    return bool(script) and Path(script).resolve().parent in places


# Ctrl-C while a command imports libraries, which takes seconds, ends it without a word. Its main
# part then says what an interrupt is: see `end_quietly` and `hear_interrupts` of command_line.py.
if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def __getattr__(name: str) -> Any:
    """Imports what needs PyTorch when it is first asked for."""
    if name == "sparsify":
        from megatron_spdf.layers.plain import sparsify

        return sparsify
    if name in ("densify", "expanded"):
        from megatron_spdf.layers import compact

        return getattr(compact, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
