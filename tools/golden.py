#!/usr/bin/env python3
"""Golden records: what small fixed runs of a tree compute, to the last digit.

    python tools/golden.py record DIR [--tree PATH] [--only NAME...]
    python tools/golden.py compare BEFORE AFTER [--only NAME...]

A change that must not change results has equal records before and after it. `record` runs the
command lines of a checkout, this one or another, and writes a JSON file for each case: losses and
gradient norms of every step, hashes of tensors, manifests, plans. `compare` prints a line for each;
golden_words.py has what was renamed. Exit code 0, or 1 where a case failed or a value differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megatron_spdf  # noqa: F401  before PyTorch, for interrupts meanwhile

# isort: split
from golden_cases import CASES
from golden_place import Failed, Place
from golden_words import flatten

from megatron_spdf.command_line import hear_interrupts
from megatron_spdf.files import write_file

META, SHOWN = "meta.json", 5
LIBRARIES = ("torch", "megatron-core", "deepspeed", "transformers", "tokenizers", "numpy")


def main() -> int:
    """Runs the command."""
    options = parse_arguments()
    return options.run(options)


def record(options: argparse.Namespace) -> int:
    """Records cases of a tree, with those they need."""
    names = with_needed(options.only or list(CASES))
    if not options.tree.is_dir():
        print(f"error: {options.tree} is no directory; give a checkout", file=sys.stderr)
        return 1
    options.directory.mkdir(parents=True, exist_ok=True)
    for name in names:  # so that no case that fails leaves an older record
        (options.directory / f"{name}.json").unlink(missing_ok=True)
    write_json(options.directory / META, describe(options.tree))
    with tempfile.TemporaryDirectory(prefix="golden.") as scratch:
        place = Place(options.tree.resolve(), Path(scratch))
        try:
            place.check()
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return record_all(place, names, options.directory)


def record_all(place: Place, names: list[str], directory: Path) -> int:
    """Records cases in threads; the place lets as many processes run as there are cores."""
    found: dict[str, Future] = {}
    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        for name in names:
            needed = [found[need] for need in CASES[name].needs]
            found[name] = pool.submit(record_case, place, name, needed, directory)
    return int(any(future.exception() for future in found.values()))


def record_case(place: Place, name: str, needed: list[Future], directory: Path) -> None:
    """Records a case when those it needs have ended."""
    for future in needed:
        future.result()
    started = time.perf_counter()
    try:
        values = CASES[name].record(place)
    except Exception as error:
        print(f"{name}: FAILED: {error if isinstance(error, Failed) else repr(error)}",
              flush=True)
        raise
    write_json(directory / f"{name}.json", values)
    print(f"{name}: recorded after {time.perf_counter() - started:.0f} s", flush=True)


def with_needed(names: list[str]) -> list[str]:
    """The names and all they need, what is needed first."""
    found: dict[str, None] = {}
    for name in names:
        found |= dict.fromkeys([*with_needed(list(CASES[name].needs)), name])
    return list(found)


def describe(tree: Path) -> dict[str, Any]:
    """Origin of a record: commit, versions and machine."""
    return {"commit": git(tree, "rev-parse", "HEAD"), "python": platform.python_version(),
            "changed": bool(git(tree, "status", "--porcelain", "--untracked-files=no")),
            "versions": {name: version_of(name) for name in LIBRARIES}, "machine": machine(),
            "recorded": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def git(tree: Path, *words: str) -> str:
    """Output of git in a tree; nothing where that is no repository."""
    done = subprocess.run(["git", *words], cwd=tree, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def version_of(library: str) -> str:
    """Version of a library that is installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def machine() -> dict[str, Any]:
    """System and processor, whose instructions decide how sums round."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"system": platform.platform(), "processor": (models or [platform.processor()])[0]}


def compare(options: argparse.Namespace) -> int:
    """Compares two records case by case."""
    before, after = (read_meta(directory) for directory in (options.before, options.after))
    for key in ("python", "versions", "machine"):
        if before.get(key) != after.get(key):
            print(f"warning: {key} differs: {before.get(key)} and {after.get(key)}",
                  file=sys.stderr)
    files = [f for d in (options.before, options.after) for f in d.glob("*.json")]
    names = options.only or sorted({file.stem for file in files} - {Path(META).stem})
    if not names:
        print("error: neither directory has a record", file=sys.stderr)
    equal = [compare_case(options, name) for name in names]
    return 0 if names and all(equal) else 1


def compare_case(options: argparse.Namespace, case: str) -> bool:
    """Prints how a case compares; returns whether it is equal."""
    files = [directory / f"{case}.json" for directory in (options.before, options.after)]
    if missing := [str(file) for file in files if not file.exists()]:
        print(f"{case}: {' and '.join(missing)} missing")
        return False
    a, b = (flatten(json.loads(file.read_text()), case) for file in files)
    different = [path for path in {**a, **b} if a.get(path) != b.get(path)]
    if not different:
        print(f"{case}: equal ({len(a)} values)")
        return True
    print(f"{case}: {len(different)} of {len({**a, **b})} values differ")
    for path in different[:SHOWN]:
        print(f"  {path}: {a.get(path, 'missing')} and {b.get(path, 'missing')}")
    return False


def write_json(file: Path, value: Any) -> None:
    """Writes a value as JSON, floats with all their digits."""
    write_file(file, json.dumps(value, indent=1) + "\n")


def read_meta(directory: Path) -> dict[str, Any]:
    """Origin of a record; nothing where it is missing."""
    file = directory / META
    return json.loads(file.read_text()) if file.exists() else {}


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("record", help="run the cases on a tree")
    command.add_argument("directory", type=Path, metavar="DIR", help="where the records go")
    command.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1],
                         metavar="PATH", help="checkout to record (default: that of this file)")
    command.set_defaults(run=record)
    command = commands.add_parser("compare", help="hold one record against another")
    command.add_argument("before", type=Path, metavar="BEFORE", help="directory of the older one")
    command.add_argument("after", type=Path, metavar="AFTER", help="directory of the newer one")
    command.set_defaults(run=compare)
    for command in commands.choices.values():
        command.add_argument("--only", nargs="+", metavar="NAME", choices=CASES,
                             help=f"cases among {', '.join(CASES)}")
    return parser.parse_args()


if __name__ == "__main__":
    hear_interrupts()
    sys.exit(main())
