"""Real text that is on every machine with Python: the sources of its standard library, as
Pile-format shards."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from backports import zstd

VALIDATION_SHARE = 16  # one document in so many
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def write_shards(directory: Path, count: int = 4) -> tuple[int, int]:
    """The standard library's modules as Pile-format JSON lines; returns documents and bytes of
    text."""
    directory.mkdir(parents=True)
    names = [f"train-{i}" for i in range(count)] + ["valid"]
    lines = {n: zstd.open(directory / f"{n}.jsonl.zst", "wt", encoding="utf-8") for n in names}
    documents = size = 0
    for name, text in standard_library():
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        shard = (
            "valid"
            if digest % VALIDATION_SHARE == 0
            else f"train-{digest // VALIDATION_SHARE % count}"
        )
        record = {"text": text, "meta": {"pile_set_name": "Python standard library", "path": name}}
        lines[shard].write(json.dumps(record, ensure_ascii=False) + "\n")
        documents, size = documents + 1, size + len(text.encode())
    for stream in lines.values():
        stream.close()
    return documents, size


def standard_library() -> Iterator[tuple[str, str]]:
    """(module path, source) of every module, tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if LEFT_OUT & set(name.split("/")):
            continue
        try:
            yield name, path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
