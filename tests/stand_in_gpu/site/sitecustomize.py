"""Is imported by every Python that `run.py` starts, and by those that these start."""

import os

if os.environ.get("STAND_IN_COMPUTES") == "1":
    import on_cpu

    on_cpu.install()
elif "STAND_IN_COMPUTES" in os.environ:
    import computes_nothing

    computes_nothing.install()
