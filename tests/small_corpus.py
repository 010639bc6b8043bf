"""A corpus of real text, prepared by the tool."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_corpus(place: Path) -> None:
    """Makes data/train, data/valid and a tokenizer of 300 entries of modules of Python."""
    library = Path(sysconfig.get_paths()["stdlib"])
    (place / "text").mkdir()
    for name in ("argparse", "ast", "calendar"):
        record = {"text": (library / f"{name}.py").read_text()}
        (place / "text" / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    tool = [sys.executable, "-W", "ignore", str(ROOT / "tools/preprocess_data.py"), "--tokenizer",
            "tokenizer"]
    make = ["--train-tokenizer", "bpe", "--vocab-size", "300"]
    for inputs, output, extra in (("text/a*.jsonl", "data/train", make),
                                  ("text/c*.jsonl", "data/valid", [])):
        subprocess.run([*tool, "--input", inputs, "--output", output, *extra], cwd=place,
                       check=True, capture_output=True, timeout=300)
