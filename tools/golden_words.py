"""Translation of recipes and of records between the words of two trees.

The cases of tools/golden.py are in the words of the commit they were first recorded at. What was
renamed since has an entry in RENAMED: a tree is spoken to in the new word where its --help knows
it, and records are compared under the new keys.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RENAMED: dict[str, list[tuple]] = {
    # (old, new) key of a recipe: a dotted path or a stretch of one, without numbers of entries.
    "recipe keys": [
        ("base", "mup_base"),
        ("data.cache", "data.index_cache"),
        ("guard", "fault_tolerance"),
        ("phase", "mode"),
        ("phases", "stages"),
        ("sparsity.block", "sparsity.tile"),
        ("sparsity.expand", "sparsity.dense_copy"),
    ],
    # (old key, old value, new value) of a recipe, the key as in the line above.
    "recipe values": [
        ("sparsity.expand", "layer", "per_layer"),
        ("sparsity.expand", "step", "per_step"),
        ("sparsity.pattern", "block", "tile"),
    ],
    # (old, new) stretch of a path in a record, whole parts; a path begins with the case's name.
    "record paths": [
        ("blocks", "skips_zeros"),
        ("tiles", "skips_zeros"),
        ("gpt3_xl_s75_block.yaml", "gpt3_xl_s75_tile.yaml"),
        ("model/block_weights", "model/linear_weights"),
        ("model/phases", "model/stages"),
    ],
    # (old, new) piece of a tensor's name. Example: (".mask_bits", ".mask").
    "tensor names": [],
    # (old, new) piece of a text among the values of a record.
    "record texts": [
        ("phase 1 of 2: ", "stage 1 of 2: "),
        ("phase 2 of 2: ", "stage 2 of 2: "),
    ],
}
# Scripts of a tree, by the paths they have or had.
SCRIPTS = {
    "pretrain": ("pretrain.py",),
    "finetune": ("finetune.py",),
    "preprocess": ("tools/preprocess_data.py",),
    "evaluate": ("tools/evaluate.py",),
    "plan": ("tools/plan.py",),
    "convert": ("tools/convert_checkpoint.py",),
}


def find_script(tree: Path, name: str) -> Path:
    """Path of a script in a tree."""
    return next((tree / path for path in SCRIPTS[name] if (tree / path).exists()),
                tree / SCRIPTS[name][0])


class Words:
    """Recipe language of a script.

    Args:
        text: its --help, which lists name, type and default of the fields of a recipe.
    """

    def __init__(self, text: str):
        heads = re.split(r"^  ([\w.]+)  ", text.partition("fields of a recipe")[2], flags=re.M)
        self.fields = dict(zip(heads[1::2], heads[2::2], strict=True))
        for name, told in list(self.fields.items()):
            if entries := re.match(r"\s*list of \{([\w,\s]+)\}", told):
                self.fields |= {f"{name}.{key.strip()}": "" for key in entries[1].split(",")}

    def recipe(self, values: dict[str, Any]) -> dict[str, Any]:
        """Translates a recipe given as dotted keys; the result is nested, as YAML has it."""
        nested: dict[str, Any] = {}
        for path, value in values.items():
            *sections, key = self.key(path).split(".")
            inner = nested
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[key] = self.value(path, value)
        return nested

    def overrides(self, values: dict[str, Any]) -> list[str]:
        """Translates the same to words of a command line."""
        return [f"{self.key(p)}={json.dumps(self.value(p, v))}" for p, v in values.items()]

    def key(self, path: str) -> str:
        """Translates a dotted key."""
        for old, new in RENAMED["recipe keys"]:
            if f".{old}." in f".{path}." and self._knows(new):
                path = f".{path}.".replace(f".{old}.", f".{new}.").strip(".")
        return path

    def value(self, path: str, value: Any) -> Any:
        """Translates the value of a key, the keys of mappings within it too."""
        if isinstance(value, list):
            return [self.value(path, entry) for entry in value]
        if isinstance(value, dict):
            inner = {f"{path}.{key}": entry for key, entry in value.items()}
            return {self.key(p).rpartition(".")[2]: self.value(p, v) for p, v in inner.items()}
        for key, old, new in RENAMED["recipe values"]:
            if f".{path}".endswith(f".{key}") and value == old and self._takes(self.key(key), new):
                return new
        return value

    def _knows(self, name: str) -> bool:
        return any(f".{name}." in f".{field}." for field in self.fields)

    def _takes(self, key: str, value: Any) -> bool:
        """Tells whether a value is among those that the type of a field lists."""
        told = [re.sub(r"\|\s+", "|", t).strip() for field, t in self.fields.items()
                if f".{field}".endswith(f".{key}")]
        return any(str(value) in re.split(r" = |  ", t)[0].split("|") for t in told)


def flatten(value: Any, path: str) -> dict[str, str]:
    """Maps the path of every single value in a record to the value, in the new words."""
    if isinstance(value, dict | list) and value:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {p: v for key, entry in entries for p, v in flatten(entry, f"{path}/{key}").items()}
    for old, new in RENAMED["record texts"] if isinstance(value, str) else ():
        value = value.replace(old, new)
    return {_renamed(path): json.dumps(value)}


def _renamed(path: str) -> str:
    for old, new in RENAMED["record paths"]:
        path = f"/{path}/".replace(f"/{old}/", f"/{new}/")[1:-1]
    for old, new in RENAMED["tensor names"] if "/tensors/" in path else ():
        path = path.replace(old, new)
    return path
