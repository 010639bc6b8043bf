"""Place where golden cases run: a scratch directory for a tree's commands, and what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from golden_words import Words, find_script
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_spdf.files import write_file

PACKAGE, CORES, SECONDS = "megatron_spdf", 2, 900
# Figures of the log that depend on the clock or the machine, and a spread whose mean is kept.
NOT_KEPT = re.compile(r"second|tflops|mfu|memory_bytes|choices|standard_error")
# Variables that a launcher sets, and those that make every run alike.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "SLURM_")
ALIKE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
         "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore"}


class Failed(RuntimeError):
    """Command of the tree that did not end well."""


class Place:
    """Scratch directory in which commands of a tree run, at most CORES processes at once."""

    def __init__(self, tree: Path, scratch: Path):
        self.tree, self.scratch = tree, scratch
        self._free, self._changed = CORES, threading.Condition()
        self._words: dict[str, Words] = {}
        self._asking = threading.Lock()

    def check(self) -> None:
        """Raises Failed where Python would import another tree's package, as an installed one."""
        ask = f"import importlib.util as u; print(u.find_spec({PACKAGE!r}).origin)"
        done = subprocess.run([sys.executable, "-c", ask], cwd=self.scratch, check=False, text=True,
                              env=environments(self.tree, 1)[0], capture_output=True)
        if not Path(done.stdout.strip()).is_relative_to(self.tree):
            raise Failed(f"{PACKAGE} comes from {done.stdout or done.stderr}, not {self.tree}")

    def run(self, name: str, *words: str, ranks: int = 1) -> str:
        """Runs a script of the tree, on ranks as torchrun starts them.

        Returns:
            What the first rank printed.

        Raises:
            Failed: with the end of what a rank printed.
        """
        command = [sys.executable, str(find_script(self.tree, name)), *words]
        with self._cores(ranks), ExitStack() as files:
            outputs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2 * ranks)]
            said, errors = outputs[:ranks], outputs[ranks:]
            started = [subprocess.Popen(command, cwd=self.scratch, env=env, stdout=out, stderr=err)
                       for env, out, err in zip(environments(self.tree, ranks), said, errors,
                                                strict=True)]
            try:
                codes = [process.wait(SECONDS) for process in started]
            finally:
                for process in started:
                    process.kill()
            texts = [whole(file) for file in outputs]
        for code, out, err in zip(codes, texts[:ranks], texts[ranks:], strict=True):
            if code:
                raise Failed(f"{name} {' '.join(words)}: exit code {code}\n{(out + err)[-3000:]}")
        return texts[0]

    def train(self, name: str, recipe: dict[str, Any], changes: dict[str, Any],
              ranks: int) -> dict[str, Any]:
        """Trains by a recipe and words that change it; returns log and hashes of checkpoints."""
        run, words = self.scratch / changes["output"], self.words(name)
        file = run.with_suffix(".yaml")
        write_file(file, yaml.safe_dump(words.recipe(recipe)))
        self.run(name, file.name, *words.overrides(changes), ranks=ranks)
        return {"log": read_log(run / "log.jsonl"), "checkpoints": hash_checkpoints(run)}

    def words(self, name: str) -> Words:
        """Recipe language of a script."""
        with self._asking:
            if name not in self._words:
                self._words[name] = Words(self.run(name, "--help"))
            return self._words[name]

    def copy_run(self, run: str, other: str, step: int) -> None:
        """Copies a run as it was when it had saved a step."""
        shutil.copytree(self.scratch / run, self.scratch / other)
        for checkpoint in checkpoints_of(self.scratch / other):
            if number(checkpoint) > step:
                shutil.rmtree(checkpoint)

    @contextmanager
    def _cores(self, count: int):
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


def environments(tree: Path, ranks: int) -> list[dict[str, str]]:
    """Environment of each rank."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)}
    env |= ALIKE | {"PYTHONPATH": str(tree)}
    if ranks == 1:
        return [env]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def whole(file: IO[str]) -> str:
    """Text of an open file, from its beginning."""
    file.seek(0)
    return file.read()


def read_log(path: Path) -> dict[str, Any]:
    """Kind -> step -> figures of a log; a second record of a kind and step has a mark."""
    found: dict[str, Any] = {}
    for record in map(json.loads, path.read_text().splitlines()):
        of_kind, step = found.setdefault(record.pop("kind"), {}), str(record.pop("step"))
        while step in of_kind:
            step += ", again"
        of_kind[step] = {k: v for k, v in record.items() if not NOT_KEPT.search(k)}
    return found


def checkpoints_of(run: Path) -> list[Path]:
    """Directories of a run's distributed checkpoints, the newest last."""
    return sorted({file.parent for file in run.rglob(".metadata")})


def number(checkpoint: Path) -> int:
    """Step in a checkpoint's name."""
    return int(re.findall(r"\d+", checkpoint.name)[-1])


def hash_checkpoints(run: Path) -> dict[str, Any]:
    """Checkpoint's name -> hashes of its tensors: weights, masks and optimizer state."""
    return {path.name: {"tensors": hash_distributed(path)} for path in checkpoints_of(run)}


def hash_distributed(path: Path) -> dict[str, str]:
    """Key -> hash of every tensor of a distributed checkpoint, made whole."""
    index = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
               for name, entry in index.items() if isinstance(entry, TensorStorageMetadata)}
    load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return hash_tensors(tensors)


def hash_safetensors(path: Path) -> dict[str, str]:
    """Name -> hash of every tensor of a safetensors file."""
    return hash_tensors(load_file(path))


def hash_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Name -> type, shape and SHA-256 of the values."""
    return {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} {_sha256(t)}"
            for name, t in sorted(tensors.items())}


def _sha256(tensor: torch.Tensor) -> str:
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def hash_files(files: list[Path]) -> dict[str, str]:
    """Name with that of the directory -> SHA-256 of each file."""
    return {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def without(value: Any, *keys: str) -> Any:
    """Copies a JSON value without these keys of its mappings, however deep."""
    if isinstance(value, list):
        return [without(entry, *keys) for entry in value]
    if isinstance(value, dict):
        return {k: without(v, *keys) for k, v in value.items() if k not in keys}
    return value
