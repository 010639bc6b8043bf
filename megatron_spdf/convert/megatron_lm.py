"""Megatron-LM's distributed checkpoint (`torch_dist`) of a dense decoder, weights only, both ways.

Names and layout are those of Megatron-LM core_v0.16.1 (megatron-core 0.16.1), whose
`GPTModel.sharded_state_dict` gives them alike for the local and the Transformer Engine layer
specification:

    OUT/latest_checkpointed_iteration.txt   "release": Megatron-LM's word for weights without a run
    OUT/release/.metadata, metadata.json, *.distcp   tensors by name, layers along their first axis
    OUT/release/common.pt                   checkpoint_version 3.0 (linear_qkv by query group)
    OUT/arguments.txt                       Megatron-LM's arguments for this model

A norm is saved as part of the layer it feeds, e.g.
decoder.layers.self_attention.linear_qkv.layer_norm_weight.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_spdf.architecture.base import EMBEDDING, HEAD, Model, Weight
from megatron_spdf.architecture.forms import pad_vocabulary
from megatron_spdf.checkpoint.reader import stored_name
from megatron_spdf.checkpoint.tensors import TensorFiles
from megatron_spdf.checkpoint.writer import StoredTensor, whole, write_tensors
from megatron_spdf.convert.foreign import read_word, require_finite
from megatron_spdf.convert.source import WeightSource
from megatron_spdf.files import atomic_directory, write_file
from megatron_spdf.paths import real

VERSION = "core_v0.16.1"
TRACKER = "latest_checkpointed_iteration.txt"
_COMMON = {"checkpoint_version": 3.0, "iteration": 0,
           "content_metadata": {"singleton_local_shards": False,
                                "chained_optim_avoid_prefix": True}}
# Layers that have an `_extra_state` in the local or the Transformer Engine specification; None
# means "no FP8".
_EXTRA = ("self_attention.core_attention", "self_attention.linear_qkv",
          "self_attention.linear_proj", "mlp.linear_fc1",
          "mlp.linear_fc2")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_TRAINING = ("optimizer.", "chained_")  # tensors of a training run beside the weights
_VOCABULARY = (EMBEDDING, HEAD)  # of which the rows are tokens


class MegatronReader(TensorFiles):
    """The weights of a Megatron-LM checkpoint, saved at any layout; a `source.WeightSource`. Of
    its files the vetted index and tensors are read, nothing that is pickled; so the shape comes
    from a recipe, and what the tensors do not tell (the number of heads, the activation) is taken
    on trust.

    Args:
        path: the directory with latest_checkpointed_iteration.txt, or one checkpoint in it.
        model: what the weights must be.

    Raises:
        ValueError: it is no such checkpoint, or of another model: what is missing, unknown or of
            another shape.
    """

    tokenizer = None

    def __init__(self, path: Path, model: Model):
        super().__init__(find_checkpoint(path), objects=True)
        self.model = model
        self.weights: dict[str, Weight] = {w.name: w for w in model.weights()}
        self._stacked = (
            _stacked(stored_name("decoder.layers.0.mlp.linear_fc1.weight"))[0] in self.shapes
        )
        self._check()

    @property
    def origin(self) -> str:
        return f"the Megatron-LM checkpoint {'/'.join(real(self.path).parts[-2:])}"

    def weight(self, name: str) -> Tensor:
        """A parameter by its canonical name; the vocabulary padded to our length with its mean."""
        return require_finite(self._weight(name), name, self.path)

    def _weight(self, name: str) -> Tensor:
        place, layer = self._place(name)
        shape = self.weights[name].shape
        if name in _VOCABULARY:
            return pad_vocabulary(self.part(place, (0, 0),
                                            (self.model.vocab_size, self.model.hidden)), shape[0])
        if layer is None:
            return self.model.from_megatron(name, self.tensor(place))
        part = self.part(place, (layer,) + (0,) * len(shape), (1, *shape))[0]
        return self.model.from_megatron(name, part)

    def master(self, name: str) -> Tensor:
        """Like `weight`, in float32."""
        return self.weight(name).float()

    def _place(self, name: str) -> tuple[str, int | None]:
        """Name of the tensor that holds a parameter, and where along its first axis."""
        return _stacked(stored_name(name)) if self._stacked else (stored_name(name), None)

    def _check(self) -> None:
        expected = {}
        for name, weight in self.weights.items():
            place, layer = self._place(name)
            expected[place] = weight.shape if layer is None else (self.model.layers, *weight.shape)
        missing = [name for name in expected if name not in self.shapes]
        if missing:
            raise ValueError(f"{self.path} has no tensor {', '.join(missing[:4])}, which the "
                             f"recipe's model ({self.model.architecture}) has; names as in "
                             f"Megatron-LM {VERSION}")
        # and as much padding as it was trained with
        expected |= {name: (self.model.vocab_size, self.model.hidden)
                     for name in _VOCABULARY if name in expected}
        wrong = [f"{name} is {self.shapes[name]} there and {shape} in the recipe's model"
                 for name, shape in expected.items() if not self._fits(name, shape)]
        if wrong:
            raise ValueError(f"{self.path} is another model than the recipe's: "
                             f"{'; '.join(wrong[:4])}. Set the recipe's model section to what is "
                             "there")
        unknown = [name for name in self.shapes if name not in expected
                   and not name.startswith(_TRAINING)]
        unknown = [name for name in unknown if name != HEAD or not self._is_tied()]
        if unknown:
            raise ValueError(f"{self.path} has {', '.join(unknown[:4])}, which the recipe's model "
                             "has not and which would be lost; set model.architecture="
                             f"{self.model.architecture} to what is there")

    def _fits(self, name: str, shape: tuple[int, ...]) -> bool:
        there = self.shapes[name]
        return (
            there == shape or name in _VOCABULARY and there[0] > shape[0] and there[1:] == shape[1:]
        )

    def _is_tied(self) -> bool:
        rows = (self.model.vocab_size, self.model.hidden)
        return torch.equal(self.part(HEAD, (0, 0), rows), self.part(EMBEDDING, (0, 0), rows))


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a Megatron-LM directory, or the checkpoint that `path` is itself."""
    if (path / ".metadata").is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise ValueError(f"{path} is no distributed checkpoint of Megatron-LM: it has neither "
                         f"{TRACKER} nor .metadata. Checkpoints with mp_rank_* files are of its "
                         "older format; save with --ckpt-format torch_dist")
    newest = read_word(tracker)
    place = path / (newest if newest == "release" else f"iter_{int(newest):07d}"
                    if newest.isascii() and newest.isdecimal() else "")
    if place == path or not (place / ".metadata").is_file():
        raise ValueError(f"{tracker} names {newest!r}, but {place} is no distributed checkpoint; "
                         "save with --ckpt-format torch_dist, or give the checkpoint's own "
                         "directory")
    return place


def save_for_megatron(source: WeightSource, output: Path, dtype: torch.dtype) -> None:
    """Writes a directory for Megatron-LM's `--load`; it appears complete or not at all. One weight
    at a time is dense in memory.

    Raises:
        ValueError: `output` exists.
        DamagedCheckpoint: a weight is missing or not what the recipe says.
    """
    model = source.model

    def read(name: str) -> Tensor:
        weight = source.weight(name).to(dtype)
        if name in _VOCABULARY:
            return pad_vocabulary(weight[: model.vocab_size], len(weight))
        return model.to_megatron(name, weight)

    tensors = []
    for name, weight in source.weights.items():
        place, layer = _stacked(stored_name(name))
        if layer is None:
            tensors.append(StoredTensor(place, weight.shape, dtype, whole(weight.shape),
                                        partial(read, name)))
        else:
            tensors.append(StoredTensor(place, (model.layers, *weight.shape), dtype,
                                        whole(weight.shape), partial(read, name), layer))
    extra = {f"decoder.layers.{module}._extra_state/shard_{layer}_{model.layers}": [None]
             for module in _EXTRA for layer in range(model.layers)}
    extra["decoder.final_layernorm._extra_state/shard_0_1"] = [None]
    with atomic_directory(output) as directory:
        (directory / "release").mkdir()
        write_tensors(directory / "release", tensors, extra, _COMMON)
        write_file(directory / "arguments.txt", arguments(source))
        write_file(directory / TRACKER, "release")


def _stacked(stored: str) -> tuple[str, int | None]:
    """Megatron-LM's name of a block's tensor, which has the layers along its first axis, and the
    layer."""
    found = _LAYER.fullmatch(stored)
    return (f"decoder.layers.{found[2]}", int(found[1])) if found else (stored, None)


def arguments(source: WeightSource) -> str:
    """Megatron-LM's arguments for a model, which its checkpoints of weights alone do not hold."""
    words = ["--ckpt-format torch_dist", *source.model.megatron_arguments(),
             # over the tensor-parallel degree, for the same padding
             f"--make-vocab-size-divisible-by {source.model.padded_vocab}"]
    return "\n".join(words) + "\n"
