"""Is this machine fit to run megatron_spdf? Each check yields findings: a fact and, where it is
bad, a remedy.

Nothing outside the standard library is imported before the check that needs it, so that whatever is
missing becomes a finding.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

OK, NOTE, WARN, FAIL = "ok", "note", "warn", "FAIL"
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
PROJECT = REQUIREMENTS.with_name("pyproject.toml")
PYTHONS = ((3, 11), (3, 12))
# Extra of pyproject.toml -> the module to look for, and what it is for.
OPTIONAL = {"wandb": ("wandb", "figures of runs at Weights & Biases (log.wandb)"),
            "parquet": ("pyarrow", "Parquet files as input (tools/preprocess_data.py)"),
            "harness": ("lm_eval", "tasks of lm-eval (tools/evaluate.py --harness)")}
CONTAINERS = "NVIDIA's PyTorch containers"
_PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[^\s;#]+)"
                  r'(; python_version (?P<than><|>=) "(?P<python>[\d.]+)")?')
GIB = 2**30
MIN_DISK, MIN_SHARED_MEMORY, MIN_OPEN_FILES = 20 * GIB, 2 * GIB, 1024
COLLECTIVE_SECONDS = 60

ALL_REDUCE = """
import datetime, sys, torch, torch.distributed as dist
backend, store, rank, world, seconds = *sys.argv[1:3], *map(int, sys.argv[3:])
if backend == "nccl":
    torch.cuda.set_device(rank)
dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world,
                        timeout=datetime.timedelta(seconds=seconds))
total = torch.tensor([rank + 1.0], device="cuda" if backend == "nccl" else "cpu")
dist.all_reduce(total)
assert total.item() == world * (world + 1) / 2, f"the sum is {total.item()}"
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what to do about a warn or a FAIL."""

    status: str
    check: str
    fact: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.status:<5}{self.check}: {self.fact}" + (f"\n     -> {self.remedy}"
                                                               if self.remedy else "")


def examine() -> Iterator[Finding]:
    """All findings, in order; a check that itself breaks is a FAIL that names the exception."""
    for name, check in CHECKS.items():
        try:
            for status, fact, *remedy in check():
                yield Finding(status, name, fact, *remedy)
        except (
            Exception
        ) as error:  # whatever is broken in this environment is what the report is about
            yield Finding(
                FAIL,
                name,
                f"the check broke: {type(error).__name__}: {_one_line(str(error))}",
                "mend what the exception names; `pip install -r requirements.txt` if it "
                "is a package",
            )


def check_python() -> Iterator[tuple[str, ...]]:
    fact = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info[:2] in PYTHONS:
        yield OK, fact
    else:
        known = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        yield (WARN if sys.version_info[:2] > max(PYTHONS)
               else FAIL), fact, f"make the environment with Python {known}"


def check_requirements() -> Iterator[tuple[str, ...]]:
    remedy = "pip install -r requirements.txt"
    for name, wanted in pinned_requirements().items():
        found = installed_version(name)
        if found is None:
            yield FAIL, f"{name} is not installed, {wanted} is wanted", remedy
        elif found.split("+")[0] != wanted:
            yield WARN, f"{name} {found} is installed, tested with {wanted}", remedy
        else:
            yield OK, f"{name} {found}"


def check_device() -> Iterator[tuple[str, ...]]:
    import torch

    driver = run_command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = driver.split("\n")[0] if driver else None
    if not torch.cuda.is_available():
        if driver and torch.version.cuda is None:
            yield (
                WARN,
                f"driver {driver} shows a GPU, but torch {torch.__version__} is a CPU build",
                (
                    "install the CUDA build of torch (pip install -r requirements.txt, not a +cpu "
                    "index)"
                ),
            )
        elif driver:
            yield (
                FAIL,
                f"torch built for CUDA {torch.version.cuda} cannot use the GPU of driver {driver}",
                (
                    "update the driver, or check CUDA_VISIBLE_DEVICES and the container's "
                    "--gpus option"
                ),
            )
        else:
            yield NOTE, "no GPU: CPU path (gloo, stand-in)"
        return
    yield OK, f"driver {driver or 'unknown'}, torch built for CUDA {torch.version.cuda}"
    yield OK, f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield OK, (f"GPU {number}: {gpu.name}, {gpu.total_memory / GIB:.0f} GiB, "
                   f"compute capability {gpu.major}.{gpu.minor}")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield OK, "bf16 is supported"
    else:
        yield WARN, "the GPU has no bf16", "train with train.precision=fp32"


def check_host_name() -> Iterator[tuple[str, ...]]:
    host = socket.gethostname()
    try:
        yield OK, f"{host} is {socket.gethostbyname(host)}"
    except OSError as error:
        yield FAIL, f"{host} does not resolve ({error}); ranks would not find each other", (
            f"add a line '127.0.0.1 {host}' to /etc/hosts, or the node's address to DNS")


def check_gloo() -> Iterator[tuple[str, ...]]:
    fault = all_reduce("gloo", 2)
    if fault:
        yield FAIL, f"all-reduce between two processes: {fault}", (
            "set GLOO_SOCKET_IFNAME to an interface of `ip addr` (lo works on one host), and see "
            "that the host name resolves")
    else:
        yield OK, "all-reduce between two processes of this host"


def check_nccl() -> Iterator[tuple[str, ...]]:
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        yield NOTE, f"not tried: {count} GPU(s), two are needed"
        return
    fault = all_reduce("nccl", count)
    if fault:
        yield FAIL, f"all-reduce between {count} GPUs: {fault}", (
            "run again with NCCL_DEBUG=INFO; then try NCCL_SOCKET_IFNAME, NCCL_P2P_DISABLE=1, a "
            "larger /dev/shm")
    else:
        yield OK, f"all-reduce between {count} GPUs"


def check_optional() -> Iterator[tuple[str, ...]]:
    pins = optional_requirements()
    for extra, (module, purpose) in OPTIONAL.items():
        name, wanted = pins[extra]
        found = installed_version(name) if find_package(module) else None
        if found is None:
            yield NOTE, (f"{name} is not installed, for {purpose}: pip install {name}=={wanted}, "
                         f"or pip install -e '.[{extra}]'")
        elif found != wanted:
            yield NOTE, f"{name} {found}, for {purpose}; tested with {wanted}"
        else:
            yield OK, f"{name} {found}, for {purpose}"


def check_accelerators() -> Iterator[tuple[str, ...]]:
    if find_package("transformer_engine"):
        yield OK, f"Transformer Engine {installed_version('transformer-engine') or ''}".strip()
    else:
        yield NOTE, ("Transformer Engine is not installed; kernels.attention=transformer_engine "
                     "needs it, and Megatron-Core's optimizer takes its fused Adam: it comes with "
                     f"{CONTAINERS}")
    apex = find_package("apex")
    if apex is None:
        yield NOTE, ("NVIDIA Apex is not installed; its fused LayerNorm is taken where it is "
                     f"(kernels.norm): it comes with {CONTAINERS}, not from PyPI")
    elif (apex / "normalization").is_dir():
        yield OK, "NVIDIA Apex"
    else:
        yield (
            WARN,
            f"the package apex in {apex} is not NVIDIA's: it has no apex.normalization",
            "pip uninstall apex",
        )
    if found := installed_version("triton"):
        yield OK, f"Triton {found}"
    else:
        yield NOTE, ("Triton is not installed; on a GPU sparse layers are slow without its "
                     "kernels: it comes with PyTorch for CUDA")


def check_compiler() -> Iterator[tuple[str, ...]]:
    release = re.search(r"release ([\d.]+)", run_command("nvcc", "--version") or "")
    if release is None:
        yield NOTE, "no nvcc; nothing on the core path is compiled"
        return
    import torch

    built_for = torch.version.cuda
    if built_for and release[1].split(".")[0] != built_for.split(".")[0]:
        yield NOTE, (f"nvcc is of CUDA {release[1]}, torch of {built_for}: DeepSpeed's compiled "
                     "extensions will not build; nothing on the core path needs them")
    else:
        yield NOTE, f"nvcc of CUDA {release[1]}"


def check_disk() -> Iterator[tuple[str, ...]]:
    free = free_bytes(Path.cwd())
    fact = f"{free / GIB:.1f} GiB free in the current directory"
    if free < MIN_DISK:
        yield (
            WARN,
            fact,
            f"have {MIN_DISK // GIB} GiB for data and checkpoints: free some, or work on a "
            "larger disk",
        )
    else:
        yield OK, fact


def check_shared_memory() -> Iterator[tuple[str, ...]]:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield (
            WARN,
            "there is no /dev/shm, which DataLoader workers pass data through",
            "run with data.workers=0",
        )
        return
    size = total_bytes(path)
    fact = f"/dev/shm has {size / GIB:.1f} GiB"
    if size < MIN_SHARED_MEMORY:
        yield WARN, f"{fact}; DataLoader workers and NCCL may run out of it", (
            "docker run --shm-size=16g, or mount -o remount,size=16g /dev/shm, or data.workers=0")
    else:
        yield OK, fact


def check_open_files() -> Iterator[tuple[str, ...]]:
    soft, hard = open_file_limits()
    if 0 <= soft < MIN_OPEN_FILES:
        yield (
            WARN,
            f"limit {soft}, under {MIN_OPEN_FILES}",
            f"ulimit -n {MIN_OPEN_FILES} (the hard limit is {hard})",
        )
    else:
        yield OK, f"limit {'none' if soft < 0 else soft}"


def check_slurm() -> Iterator[tuple[str, ...]]:
    names = ("sbatch", "srun", "scontrol")
    found = [n for n in names if shutil.which(n)]
    if not found:
        yield NOTE, "not found; single-node runs start with torchrun"
    elif len(found) < len(names):
        missing = ", ".join(n for n in names if n not in found)
        yield (
            WARN,
            f"{', '.join(found)} found, but not {missing}",
            "put Slurm's whole bin directory on PATH",
        )
    else:
        yield OK, f"{', '.join(found)} found"


def check_java() -> Iterator[tuple[str, ...]]:
    yield (OK, "found") if shutil.which("java") else (NOTE,
                                                      "not found; only the METEOR metric needs it")


CHECKS: dict[str, Callable[[], Iterator[tuple[str, ...]]]] = {
    "python": check_python, "packages": check_requirements, "optional": check_optional,
    "device": check_device,
    "host name": check_host_name,
    "gloo": check_gloo, "NCCL": check_nccl, "accelerators": check_accelerators,
    "compiler": check_compiler,
    "disk": check_disk, "shared memory": check_shared_memory, "open files": check_open_files,
    "Slurm": check_slurm,
    "Java": check_java,
}


def pinned_requirements() -> dict[str, str]:
    """Package -> version of the `name==version` lines of requirements.txt that are for this
    Python."""
    pins = filter(None, map(_PIN.match, REQUIREMENTS.read_text(encoding="utf-8").splitlines()))
    return {pin["name"]: pin["version"] for pin in pins if _for_this_python(pin)}


def optional_requirements() -> dict[str, tuple[str, str]]:
    """Extra -> package and version of the first line of each in pyproject.toml."""
    extras = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pins = {extra: _PIN.match(lines[0]) for extra, lines in extras.items()}
    return {extra: (pin["name"], pin["version"]) for extra, pin in pins.items()}


def _for_this_python(pin: re.Match) -> bool:
    if pin["than"] is None:
        return True
    border = tuple(map(int, pin["python"].split(".")))
    return (sys.version_info[:2] < border) == (pin["than"] == "<")


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_package(name: str) -> Path | None:
    """Directory of an importable package, found without importing it. A directory of that name that
    merely lies there, as runs leave one for wandb, is none."""
    spec = importlib.util.find_spec(name)
    return (
        Path(next(iter(spec.submodule_search_locations)))
        if spec and spec.origin and spec.submodule_search_locations
        else None
    )


def free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free


def total_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).total


def open_file_limits() -> tuple[int, int]:
    """Soft and hard limit; -1 is none."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def run_command(*words: str) -> str | None:
    """Standard output of a command; None where it is missing or fails."""
    if shutil.which(words[0]) is None:
        return None
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    return None if done.returncode else done.stdout.strip()


def all_reduce(backend: str, world: int, seconds: int = COLLECTIVE_SECONDS) -> str | None:
    """Sums a number over `world` new processes; returns what went wrong, None if nothing."""
    with tempfile.TemporaryDirectory() as directory:
        words = [sys.executable, "-c", ALL_REDUCE, backend, os.path.join(directory, "store")]
        ranks = [subprocess.Popen([*words, str(rank), str(world), str(seconds)], text=True,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                 for rank in range(world)]
        end = time.monotonic() + seconds
        try:
            while all(rank.poll() in (None, 0) for rank in ranks) and any(rank.poll() is None
                                                                          for rank in ranks):
                if time.monotonic() > end:
                    return f"no answer within {seconds} s"
                time.sleep(0.05)
            failed = next((rank for rank in ranks if rank.poll()), None)
            return _one_line(failed.stderr.read()) if failed else None
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
                rank.stderr.close()


def _one_line(text: str) -> str:
    """The last line of a message, where a traceback names its exception."""
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "it ended without a message"
