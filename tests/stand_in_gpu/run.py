#!/usr/bin/env python3
"""Runs a Python script on a GPU that is not there; see README.md beside this file.

    python tests/stand_in_gpu/run.py [--compute] [--gib 79.1] [--name "NVIDIA H200"] SCRIPT ...
    python tests/stand_in_gpu/run.py --compute -m pytest tests/distributed/test_gpu.py

The interpreter is the one that runs this file; its PyTorch is one for CUDA 13. A C compiler is
needed, once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_python.so")
CALLS = re.compile(r"(__)?cuda[A-Z]|cublas|cudnn[A-Z]|cusparseLt|nccl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute", action="store_true",
                        help="operations are computed, on the CPU")
    parser.add_argument("--gib", type=float, default=79.1, help="memory of the GPU (default: 79.1)")
    parser.add_argument("--name", default="NVIDIA H100 80GB HBM3", help="(default: %(default)s)")
    own = 1
    while own < len(sys.argv) and sys.argv[own] in ("--compute", "--gib", "--name", "-h", "--help"):
        own += 2 if sys.argv[own] in ("--gib", "--name") else 1
    # argparse would take -m for its own
    options, command = parser.parse_args(sys.argv[1:own]), sys.argv[own:]
    build = Path(tempfile.gettempdir()) / f"stand_in_gpu_{os.getuid()}"
    made = make(build)
    environment = {
        **os.environ, "LD_PRELOAD": str(made), "LD_LIBRARY_PATH": str(build),
        "TRITON_LIBCUDA_PATH": str(build),
        "STAND_IN_GIB": str(options.gib), "STAND_IN_NAME": options.name,
        "STAND_IN_COMPUTES": str(int(options.compute)),
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), str(HERE.parents[1]),
                                       *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if options.compute:  # what is compiled could not be computed
        environment |= {"TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "1"}
    os.execve(sys.executable, [sys.executable, *command], environment)


def make(build: Path) -> Path:
    """Compiles the runtime and the driver, if they are older than their sources; returns the
    runtime.

    Raises:
        SystemExit: PyTorch is none for CUDA.
    """
    sources = [HERE / name for name in ("runtime.c", "libraries.c", "driver.c")]
    runtime, driver = build / "libstandin.so", build / "libcuda.so.1"
    if driver.exists() and driver.stat().st_mtime > max(s.stat().st_mtime for s in sources):
        return runtime
    torch = importlib.util.find_spec("torch")
    packages = Path(torch.origin).parents[1] if torch and torch.origin else Path("nowhere")
    if not (packages / "torch/lib/libtorch_cuda.so").exists():
        sys.exit(f"{sys.executable} has no PyTorch for CUDA; run this with an interpreter that has")
    build.mkdir(parents=True, exist_ok=True)
    stubs = build / "stubs.c"
    stubs.write_text("".join(f"int {name}(void) {{ return 0; }}\n"
                             for name in others(packages, sources)))
    headers = [f"-I{packages / place}"
               for place in ("nvidia/cu13/include", "triton/backends/nvidia/include")]
    compiler = ["cc", "-w", "-O1", "-shared", "-fPIC", *headers]
    subprocess.run([*compiler, *map(str, (*sources[:2], stubs)), "-o", str(runtime)], check=True)
    subprocess.run([*compiler, "-Wl,-soname,libcuda.so.1", str(sources[2]), "-o", str(driver)],
                   check=True)
    (build / "libcuda.so").unlink(missing_ok=True)
    (build / "libcuda.so").symlink_to(driver.name)
    return runtime


def others(packages: Path, sources: list[Path]) -> list[str]:
    """Calls of PyTorch that the sources do not define; these do nothing and say that it went
    well."""
    defined = set(re.findall(r"\b(\w+)\(", "\n".join(source.read_text() for source in sources)))
    wanted = set()
    for library in LIBRARIES:
        listed = subprocess.run(["nm", "-D", "--undefined-only",
                                 str(packages / "torch/lib" / library)], check=True,
                                capture_output=True, text=True).stdout
        wanted |= {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    return sorted(name for name in wanted - defined if CALLS.match(name))


if __name__ == "__main__":
    main()
