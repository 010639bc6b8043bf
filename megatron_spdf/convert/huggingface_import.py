"""Reads a Hugging Face directory, tensor by tensor, with no code from it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_spdf.architecture.base import ARCHITECTURES, EMBEDDING, Model, Weight
from megatron_spdf.architecture.forms import UnknownFamily, model_of
from megatron_spdf.convert.compressed_tensors import storage_fault
from megatron_spdf.convert.foreign import place_of, read_pickled, require_finite
from megatron_spdf.data.tokenizers.base import END_FILE
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from megatron_spdf.paths import real
from megatron_spdf.records.json_reader import read_json
from megatron_spdf.text import printable

T = TypeVar("T")
logger = logging.getLogger(__name__)
CONFIG = "config.json"
# or the same with .index.json, in several files
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HEAD = "lm_head.weight"
# parts of names that wrappers add: DistributedDataParallel, torch.compile, FSDP, checkpointing
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PREFIXES = ("transformer.", "model.")  # what a family has around its decoder, or a user around it
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class HuggingFaceReader:
    """A model as `transformers` saves it: safetensors or pytorch_model.bin, in one file or several;
    a `source.WeightSource`.

    Args:
        path: directory of the model.
        like: whose slices its weights are cut into; None: the family's default.

    Attributes:
        config: the content of config.json.
        model: its shape; what its configuration does not say has our defaults.
        weights: canonical name -> parameter.

    Raises:
        ValueError: no architecture here, one that computes what ours does not, weights that are
            missing, of the wrong shape or unknown, or files that cannot be read.
    """

    def __init__(self, path: Path, like: Model | None = None):
        self.path = path
        self.config = _read_json(path / CONFIG)
        if fault := storage_fault(self.config):
            raise ValueError(f"{path / CONFIG} {fault}")
        self.model = _model(self.config, path)
        if like is not None:
            self.model = self.model.cut_like(like)
        self.weights: dict[str, Weight] = {w.name: w for w in self.model.weights()}
        self._files = _find_files(path)
        self._open: dict[str, Any] = {}
        self._forms = {name: self.model.huggingface_form(w) for name, w in self.weights.items()}
        self._places = self._find_places()
        self._check()

    @property
    def origin(self) -> str:
        return f"the Hugging Face model {real(self.path).name}"

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Types of the weights in the files."""
        return {self._form_of(self._places[self._plain(name)])[1]
                for form in self._forms.values() for name in form.names}

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        if not tokenizer_files(self.path):
            return None
        tokenizer, end = load_tokenizer(self.path), self.config.get("eos_token_id")
        if isinstance(end, int) and end != tokenizer.eod:
            logger.warning(f"{self.path}: {CONFIG} ends texts with the id {end}, and the tokenizer "
                           f"documents with {tokenizer.end_token!r}, id {tokenizer.eod}; where it "
                           f"should be the other, write that token to {END_FILE} there")
        return tokenizer

    def weight(self, name: str) -> Tensor:
        """A parameter by its canonical name, in the type of the file; the vocabulary padded with
        its mean."""
        places = [self._places[self._plain(there)] for there in self._forms[name].names]
        return self._forms[name].join([
            require_finite(self._tensor(place), place, self.path) for place in places])

    def master(self, name: str) -> Tensor:
        """Like `weight`, in float32."""
        return self.weight(name).float()

    def _find_places(self) -> dict[str, str]:
        """Plain name -> name in the files; a tied model may have its embedding as LM head only.

        Raises:
            ValueError: two names in the files are one weight's.
        """
        places: dict[str, str] = {}
        for name in self._names():
            plain = self._plain(name)
            if plain in places:
                raise ValueError(f"{self.path} has both {places[plain]} and {name}, which are one "
                                 f"weight of a {self.model.title}; remove one from a copy of it")
            places[plain] = name
        (embedding,) = map(self._plain, self._forms[EMBEDDING].names)
        tied = self.model.tied and self.config.get("tie_word_embeddings", True)
        if tied and embedding not in places and _HEAD in places:
            places[embedding] = places[_HEAD]
        return places

    def _plain(self, name: str) -> str:
        """A name there without what wrappers put into it, and without the prefix that a model saved
        without its LM head lacks."""
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        prefixes = (*_PREFIXES, self.model.huggingface_prefix or _PREFIXES[0])
        while found := next(filter(plain.startswith, prefixes), None):
            plain = plain.removeprefix(found)
        return plain

    def _check(self) -> None:
        """Requires that every weight is there, of its shape, and nothing that would be left out."""
        shapes = {self._plain(name): shape for form in self._forms.values()
                  for name, shape in zip(form.names, form.shapes, strict=True)}
        if missing := [name for name in shapes if name not in self._places]:
            raise ValueError(f"{self.path} has no tensor {_some(missing)}, which a "
                             f"{self.model.title} of {self.model.layers} layers has; use a "
                             "complete model")
        rest = {name: place for name, place in self._places.items() if name not in shapes}
        unknown = [place for name, place in rest.items()
                   if not name.endswith(self.model.huggingface_ignored)
                   and not (self.model.tied and name == _HEAD)]
        if unknown:
            (kind,) = self.model.huggingface_config()["architectures"]
            raise ValueError(f"{self.path} has {_some(unknown)}, which {kind} has not and which "
                             "would be lost; use a plain language model")
        self._check_forms(shapes)
        if self.model.tied:
            self._check_tied(self._places.get(_HEAD))

    def _check_forms(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Requires that every tensor has the shape that config.json gives it, and is one of
        floats."""
        found = {place: (self._form_of(place), shape)
                 for place, shape in ((self._places[name], shape)
                                      for name, shape in shapes.items())}
        if wrong := [f"{place} has shape {there}, and by {CONFIG} it must have {shape}"
                     for place, ((there, _), shape) in found.items() if there != shape]:
            raise ValueError(f"{self.path}: {_some(wrong, '; ')}; use a model whose files belong "
                             "together")
        if wrong := [f"{place} is {dtype}" for place, ((_, dtype), _) in found.items()
                     if dtype not in _FLOATS]:
            raise ValueError(f"{self.path}: {_some(wrong)}; quantized weights cannot be read, use "
                             "the model they were made from")

    def _check_tied(self, head: str | None) -> None:
        """Requires that an LM head, where there is one, is the embedding."""
        if head:
            (embedding,) = self._forms[EMBEDDING].names
            place = self._places[self._plain(embedding)]
            one, other = (require_finite(self._tensor(p), p, self.path) for p in (place, head))
            if place != head and not torch.equal(one, other):
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
        return self._read(name, lambda opened: opened.get_tensor(name), lambda tensor: tensor)

    def _form_of(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of a tensor, which is not read."""
        def of_slice(opened: Any) -> tuple[tuple[int, ...], torch.dtype]:
            there = opened.get_slice(name)
            shape = tuple(there.get_shape())
            return shape, (there[:0] if shape else opened.get_tensor(name)).dtype

        return self._read(name, of_slice, lambda tensor: (tuple(tensor.shape), tensor.dtype))

    def _read(self, name: str, safe: Callable[[Any], T], loaded: Callable[[Tensor], T]) -> T:
        """What one of the two makes of a tensor: of an open safetensors file, or of what a
        pytorch_model.bin holds."""
        file = self._files[name] if isinstance(self._files, dict) else self._files
        opened = self._opened(file)
        try:
            return safe(opened) if file.suffix == ".safetensors" else loaded(opened[name])
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
                    else _only_tensors(file, read_pickled(file, "save the model as safetensors")))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error}); copy the file again") from None
        return self._open[file.name]


def _only_tensors(file: Path, content: Any) -> dict[str, Tensor]:
    """The content of a pytorch_model.bin, which must be a state dict and nothing else."""
    others = ([str(name) for name, value in content.items() if not isinstance(value, Tensor)]
              if isinstance(content, dict) else [f"a {type(content).__name__}"])
    if others:
        raise ValueError(f"{file} holds {_some(others)} beside tensors; save the model's "
                         "state_dict() alone, as safetensors")
    return content


def _model(config: dict[str, Any], path: Path) -> Model:
    try:
        model = model_of(config, [ARCHITECTURES.get(name) for name in ARCHITECTURES.names()])
        if model.hidden % model.heads and "head_width" not in type(model).model_fields:
            raise ValueError(f"has {model.heads} attention heads for a width of {model.hidden}, "
                             "which they do not divide; use the config.json of the weights")
        return model
    except UnknownFamily as error:
        raise ValueError(f"{path} {error}") from None
    except ValueError as error:
        raise ValueError(f"{path / CONFIG} {error}") from None


def _find_files(path: Path) -> Path | dict[str, Path]:
    """The one file of weights, or tensor name -> file where there are several."""
    for name in _WEIGHTS:
        if (path / name).is_file():
            return place_of(path, name, path)
        index = path / f"{name}.index.json"
        if index.is_file():
            listed = _read_json(index).get("weight_map")
            if not isinstance(listed, dict):
                raise ValueError(f"{index} has no weight_map; copy the file again")
            files = {file: place_of(path, file, index) for file in _names_in(listed, index)}
            missing = sorted(name for name, file in files.items() if not file.is_file())
            if missing:
                raise ValueError(f"{path} has no file {_some(missing)}, which {index.name} names; "
                                 "copy it again")
            return {tensor: files[file] for tensor, file in listed.items()}
    raise ValueError(f"{path} has neither {' nor '.join(_WEIGHTS)}, whole or with an index; there "
                     f"are {', '.join(sorted(p.name for p in path.iterdir()))}")


def _names_in(listed: dict[str, Any], index: Path) -> set[str]:
    """Files that an index names."""
    if not all(isinstance(file, str) for file in listed.values()):
        raise ValueError(f"{index} names something which is no file beside it; copy the file "
                         "again")
    return set(listed.values())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, dict[str, Any], constants=True)  # some have Infinity
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy the file again") from None


def _some(names: list[str], between: str = ", ") -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return between.join(printable(name[:300]) for name in names[:4]) + more
