"""Small runs for a report, as they lie on disk, and a reader of its page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import yaml

VOID = {"meta", "br", "img", "hr", "link"}


def write(directory: Path, recipe: dict, flops: float, sparsity: float, steps: int = 30,
          loss: float = 5.0) -> Path:
    """A run directory whose loss falls by 0.01 a step and is 0.5 lower in validation."""
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    records = [{"kind": "bytes", "step": 1, "parameters": 2**20, "gradients": 2**20,
                "optimizer": 2**21, "sent_per_step": 3 * 2**20}]
    records += [{"kind": "train", "step": s, "tokens": 100 * s, "loss": loss - s / 100, "lr": 1e-3,
                 "grad_norm": 1.0, "sparsity": sparsity, "flops": flops * s / steps,
                 "tokens_per_second": 50.0, "step_seconds": 2.0, "memory_bytes": 2**30}
                for s in range(1, steps + 1)]
    records.append({"kind": "valid", "step": steps, "loss": loss - 0.5})
    (directory / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return directory


def pretraining(sparsity: float, seed: int | None = None) -> dict:
    seeded = {} if seed is None else {"seed": seed}
    return {"sparsity": {"level": sparsity, **seeded}, **seeded,
            "model": {"layers": 2, "hidden": 64, "heads": 4, "vocab_size": 300},
            "train": {"tokens": 3000, "global_batch": 1, "sequence_length": 100}}


def add_moves(run: Path, algorithm: str = "rigl") -> list[dict]:
    """Two moves of a run of two layers, of which the log has a record each."""
    def seen(share: float, overlap: float, age: float) -> dict:
        return {"share": share, "overlap": overlap, "age": age}

    records = [{"kind": "mask", "step": step, "algorithm": algorithm, "update": step // 10,
                "moved": 1000 * step, "seconds": 0.5, **seen(share, overlap, age),
                "layers": {"0": seen(share / 2, 0.9, 2.5), "1": seen(1.5 * share, overlap, age)}}
               for step, share, overlap, age in ((10, 0.3, 0.7, 0.25), (20, 0.1, 0.625, 1.125))]
    with (run / "log.jsonl").open("a") as log:
        log.writelines(json.dumps(r) + "\n" for r in records)
    return records


class Page(HTMLParser):
    """Tags with their attributes in order, the text, and links that leave the page. Every tag that
    opens must close."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.tags, self.links, self.inside = [], [], [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [v for k, v in attributes if k in ("href", "src")
                       and not (v or "").startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)

    def named(self, tag: str) -> list[dict]:
        """Attributes of every tag of a name."""
        return [attributes for name, attributes in self.tags if name == tag]

    def words(self) -> str:
        """The text, with a blank for each stretch of white space."""
        return " ".join(" ".join(self.text).split())
