"""What every rank imports, imported once; see harness.py."""

from megatron_spdf.parallel import cpu

cpu.install()

import cases  # noqa: E402
import finetune_cases  # noqa: E402

__all__ = ["cases", "finetune_cases"]
