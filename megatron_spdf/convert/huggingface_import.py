"""Reads a Hugging Face directory of the GPT-2 family, tensor by tensor, with no code from it."""

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

from megatron_spdf.architecture.base import EMBEDDING, Model, Weight
from megatron_spdf.architecture.gpt import Gpt
from megatron_spdf.convert.gpt2_state_dict import PREFIX, from_gpt2, gpt2_name, gpt2_shape
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer, load_tokenizer

CONFIG = "config.json"
# or the same with .index.json, in several files
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HEAD = "lm_head.weight"
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer.model")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What our GPT computes, as GPT-2's configuration says it, and what GPT2Config says where a key is
# missing.
_COMPUTES = {
    "activation_function": (("gelu_new", "gelu_pytorch_tanh"), "gelu_new"),
    "layer_norm_epsilon": ((1e-5,), 1e-5),
    "scale_attn_weights": ((True,), True),
    "scale_attn_by_inverse_layer_idx": ((False,), False),
    "reorder_and_upcast_attn": ((False,), False),
    "add_cross_attention": ((False,), False),
}


class HuggingFaceReader:
    """A GPT-2 as `transformers` saves it: safetensors or pytorch_model.bin, in one file or several;
    a `source.WeightSource`.

    Attributes:
        config: the content of config.json.
        model: its shape; what a GPT-2's configuration does not say has our defaults.
        weights: canonical name -> parameter.

    Raises:
        ValueError: another architecture, a GPT-2 that computes what ours does not, weights that are
            missing, of the wrong shape or unknown, or files that cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _read_json(path / CONFIG)
        self.model = _model(self.config, path)
        self.weights: dict[str, Weight] = {w.name: w for w in self.model.weights()}
        self._files = _find_files(path)
        self._open: dict[str, Any] = {}
        names = {name.removeprefix(PREFIX): name for name in self._names()}
        self._place = {name: names.pop(gpt2_name(name), None) for name in self.weights}
        self._check(names)

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
        place, weight = self._place[name], self.weights[name]
        tensor = self._tensor(place)
        shape = gpt2_shape(weight, self.model)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{self.path}: {place} has shape {tuple(tensor.shape)}, and by "
                             f"{CONFIG} it must have {shape}; use a model whose files belong "
                             "together")
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{self.path}: {place} is {tensor.dtype}; quantized weights cannot be "
                             "read, use the model they were made from")
        return from_gpt2(tensor, weight, self.model)

    def master(self, name: str) -> Tensor:
        """Like `weight`, in float32."""
        return self.weight(name).float()

    def _check(self, rest: dict[str, str]) -> None:
        """That every weight is there, and nothing that would be left out; `rest` is what none of
        our names took."""
        missing = [gpt2_name(name) for name, place in self._place.items() if place is None]
        if missing:
            raise ValueError(f"{self.path} has no tensor {_some(missing)}, which a GPT-2 of "
                             f"{self.model.layers} layers has; use a complete model")
        if head := rest.pop(_HEAD, None):
            if not torch.equal(self._tensor(head), self._tensor(self._place[EMBEDDING])):
                raise ValueError(f"{self.path}: {head} is not the token embedding; here the two "
                                 "are tied, so a model with a head of its own cannot be read")
        elif not self.config.get("tie_word_embeddings", True):
            raise ValueError(f"{self.path}: {CONFIG} has tie_word_embeddings false, but there is "
                             f"no {_HEAD}; use a complete model")
        # GPT-2's causal masks used to be saved with it.
        unknown = [place for name,
                   place in rest.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))]
        if unknown:
            raise ValueError(f"{self.path} has {_some(unknown)}, which GPT2LMHeadModel has not and "
                             "which would be lost; use a plain language model")

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
    if kind != "gpt2":
        raise ValueError(f"{path} is a model of type {kind!r}; only the GPT-2 family (model_type "
                         "gpt2) can be read")
    for key, (allowed, default) in _COMPUTES.items():
        if config.get(key, default) not in allowed:
            raise ValueError(f"{path}: {CONFIG} has {key}={config[key]!r}, and our GPT computes "
                             f"{' or '.join(map(repr, allowed))} only; its outputs would differ")
    keys = {"layers": "n_layer", "hidden": "n_embd", "heads": "n_head", "vocab_size": "vocab_size",
            "max_positions": "n_positions"}
    missing = [key for key in keys.values() if not isinstance(config.get(key), int)]
    if missing:
        raise ValueError(f"{path / CONFIG} has no {', '.join(missing)}; use the config.json the "
                         "model was saved with")
    return Gpt(**{ours: config[theirs] for ours, theirs in keys.items()},
                 ffn_hidden=config.get("n_inner") or 4 * config["n_embd"])


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
