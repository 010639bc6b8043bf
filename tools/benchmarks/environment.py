"""When, on what and with what a figure was measured, and the command: what every report of figures
says."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_spdf.files import write_json

LIBRARIES = ("torch", "megatron-core", "numpy")


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="minutes")


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"CPU, {len(names)} x {names[0]}" if names else f"CPU, {platform.processor()}"


def circumstances(libraries: tuple[str, ...] = LIBRARIES) -> dict:
    """Args:
        libraries: whose versions matter; of those that are not installed nothing is said.
    """
    return {
        "date": now(),
        "device": device_name(),
        "versions": {name: found for name in libraries if (found := _version(name))},
        "command": shlex.join(["python", *sys.argv]),
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def render_circumstances(report: dict) -> list[str]:
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    return [f"{report['date']}, {report['device']}, {versions}", f"$ {report['command']}", ""]


def publish(report: dict, lines: list[str], output: Path | None) -> None:
    """Prints a report, and writes it as JSON if it is to be."""
    print("\n".join([*render_circumstances(report), *lines]))
    if output:
        write_json(output, report)
