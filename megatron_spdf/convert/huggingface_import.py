"""Reads a Hugging Face directory, tensor by tensor, with no code from it."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_spdf.architecture.base import ARCHITECTURES, EMBEDDING, Model, Weight
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer, load_tokenizer

CONFIG = "config.json"
# or the same with .index.json, in several files
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HEAD = "lm_head.weight"
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer.model")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class HuggingFaceReader:
    """A model as `transformers` saves it: safetensors or pytorch_model.bin, in one file or several;
    a `source.WeightSource`.

    Attributes:
        config: the content of config.json.
        model: its shape; what its configuration does not say has our defaults.
        weights: canonical name -> parameter.

    Raises:
        ValueError: no architecture here, one that computes what ours does not, weights that are
            missing, of the wrong shape or unknown, or files that cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _read_json(path / CONFIG)
        self.model = _model(self.config, path)
        self.weights: dict[str, Weight] = {w.name: w for w in self.model.weights()}
        self._files = _find_files(path)
        self._open: dict[str, Any] = {}
        self._forms = {name: self.model.huggingface_form(w) for name, w in self.weights.items()}
        self._places = {self._plain(name): name for name in self._names()}
        self._check()

    @property
    def origin(self) -> str:
        return f"the Hugging Face model {self.path.resolve().name}"

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        if not any((self.path / name).is_file() for name in _TOKENIZER_FILES):
            return None
        return load_tokenizer(self.path)

    def weight(self, name: str) -> Tensor:
        """A parameter by its canonical name, in the type of the file; the vocabulary padded with
        its mean."""
        form = self._forms[name]
        return form.join([self._part(self._places[self._plain(there)], shape)
                          for there, shape in zip(form.names, form.shapes, strict=True)])

    def _part(self, place: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensor(place)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{self.path}: {place} has shape {tuple(tensor.shape)}, and by "
                             f"{CONFIG} it must have {shape}; use a model whose files belong "
                             "together")
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{self.path}: {place} is {tensor.dtype}; quantized weights cannot be "
                             "read, use the model they were made from")
        return tensor

    def master(self, name: str) -> Tensor:
        """Like `weight`, in float32."""
        return self.weight(name).float()

    def _plain(self, name: str) -> str:
        """A name there without the prefix that a model saved without its LM head lacks."""
        return name.removeprefix(self.model.huggingface_prefix)

    def _check(self) -> None:
        """That every weight is there, and nothing that would be left out."""
        wanted = [self._plain(name) for form in self._forms.values() for name in form.names]
        if missing := [name for name in wanted if name not in self._places]:
            raise ValueError(f"{self.path} has no tensor {_some(missing)}, which a "
                             f"{self.model.title} of {self.model.layers} layers has; use a "
                             "complete model")
        rest = {name: place for name, place in self._places.items() if name not in wanted}
        if self.model.tied:
            self._check_tied(rest.pop(_HEAD, None))
        unknown = [place for name, place in rest.items()
                   if not name.endswith(self.model.huggingface_ignored)]
        if unknown:
            (kind,) = self.model.huggingface_config()["architectures"]
            raise ValueError(f"{self.path} has {_some(unknown)}, which {kind} has not and which "
                             "would be lost; use a plain language model")

    def _check_tied(self, head: str | None) -> None:
        """That an LM head, where there is one, is the embedding."""
        if head:
            (embedding,) = self._forms[EMBEDDING].names
            if not torch.equal(self._tensor(head),
                               self._tensor(self._places[self._plain(embedding)])):
                raise ValueError(f"{self.path}: {head} is not the token embedding; here the two "
                                 "are tied, so a model with a head of its own cannot be read")
        elif not self.config.get("tie_word_embeddings", True):
            raise ValueError(f"{self.path}: {CONFIG} has tie_word_embeddings false, but there is "
                             f"no {_HEAD}; use a complete model")

    def _names(self) -> list[str]:
        if isinstance(self._files, dict):
            return list(self._files)
        opened = self._opened(self._files)
        return list(opened.keys())

    def _tensor(self, name: str) -> Tensor:
        file = self._files[name] if isinstance(self._files, dict) else self._files
        opened = self._opened(file)
        try:
            return opened.get_tensor(name) if file.suffix == ".safetensors" else opened[name]
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(
                f"{file}: {name} cannot be read ({error}); copy the file again"
            ) from None

    def _opened(self, file: Path) -> Any:
        """The file, opened once; its tensors come from the disk when they are asked for."""
        if file.name not in self._open:
            try:
                self._open[file.name] = (
                    safe_open(file, framework="pt") if file.suffix == ".safetensors"
                    else torch.load(file, map_location="cpu", weights_only=True,
                                    mmap=zipfile.is_zipfile(file)))
            except pickle.UnpicklingError as error:
                named = re.search(r"GLOBAL (\S+)", str(error))
                raise ValueError(f"{file} holds {named[1] if named else 'something'} beside "
                                 "tensors; it is a pickle that could run code, so it is refused; "
                                 "save the model as safetensors") from None
            except (SafetensorError, OSError, RuntimeError, EOFError) as error:
                raise ValueError(f"{file} cannot be read ({error}); copy the file again") from None
        return self._open[file.name]


def _model(config: dict[str, Any], path: Path) -> Model:
    kind = config.get("model_type")
    families = {family.huggingface: family for family in map(ARCHITECTURES.get,
                                                             ARCHITECTURES.names())
                if family.huggingface}
    if kind not in families:
        raise ValueError(f"{path} is a model of type {kind!r}; those that can be read are "
                         f"{', '.join(sorted(families))}")
    try:
        return families[kind].from_huggingface(config)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG} {error}") from None


def _find_files(path: Path) -> Path | dict[str, Path]:
    """The one file of weights, or tensor name -> file where there are several."""
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
        index = path / f"{name}.index.json"
        if index.is_file():
            listed = _read_json(index).get("weight_map")
            if not isinstance(listed, dict):
                raise ValueError(f"{index} has no weight_map; copy the file again")
            missing = sorted({file for file in listed.values() if not (path / file).is_file()})
            if missing:
                raise ValueError(f"{path} has no file {_some(missing)}, which {index.name} names; "
                                 "copy it again")
            return {tensor: path / file for tensor, file in listed.items()}
    raise ValueError(f"{path} has neither {' nor '.join(_WEIGHTS)}, whole or with an index; there "
                     f"are {', '.join(sorted(p.name for p in path.iterdir()))}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
        return content
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy the file again") from None


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
