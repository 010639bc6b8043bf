"""Small corpora for the tests of this directory, and ways to look at what was made of them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

from backports import zstd

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SPDF_DATA", ROOT / ".." / "shared" / "data"))
PILE = SHARED / "pile_sample"
GPT2 = SHARED / "gpt2_tokenizer"
HAS_PILE = PILE.exists() and GPT2.exists()
NO_PILE = "no pile_sample and gpt2_tokenizer in ../shared/data; SPDF_DATA names another place"
SETS = ("Pile-CC", "Wikipedia (en)", "Github")


def records(count: int, seed: int = 0) -> list[dict]:
    """Records in the Pile's form, some with the same text, of lengths from a few words to some
    pages."""
    made = []
    for i in range(count):
        number = (i * 7919 + seed) % (count - count // 8)  # one in eight comes again
        words = f"document {number} of {seed}: the best of times, the worst of times, 東京 🙂\n" * (
            1 + number % 40
        )
        made.append({"text": words, "meta": {"pile_set_name": SETS[number % len(SETS)]}})
    return made


def as_jsonl(items: list[dict]) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def write_shard(path: Path, items: list[dict]) -> Path:
    """A .jsonl, .jsonl.gz or .jsonl.zst file; compressed ones of several frames."""
    lines = as_jsonl(items).splitlines(keepends=True)
    pieces = [b"".join(lines[i : i + 100]) for i in range(0, len(lines), 100)]
    compress = {".zst": zstd.compress,
                ".gz": lambda piece: gzip.compress(piece, mtime=0)}.get(path.suffix, bytes)
    path.write_bytes(b"".join(map(compress, pieces)))
    return path


def content(prefix: Path) -> dict[str, str]:
    """Everything under a prefix, a single data set or a directory of them: file -> hash of its
    bytes."""
    files = [f for start in prefix.parent.glob(f"{prefix.name}*")
             for f in (start, *start.rglob("*")) if f.is_file()]
    return {str(f.relative_to(prefix.parent)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in files}


def documents_of(prefix: Path) -> list[list[int]]:
    """Token ids of each document, read by Megatron."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data_set = IndexedDataset(str(prefix))
    return [data_set[i].tolist() for i in range(len(data_set))]
