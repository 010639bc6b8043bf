"""Interface of anything that holds the weights of a dense model by canonical name."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_spdf.architecture.base import Model, Weight
from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.huggingface_import import CONFIG, HuggingFaceReader
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.files import FILES, sampled_sha256


class WeightSource(Protocol):
    """Weights to convert, or to start a run from.

    Attributes:
        path: of the files.
        model: shape of the model.
        weights: canonical name -> parameter of the whole model.
        tokenizer: that gives the ids their meaning; None if no tokenizer's files lie with the
            weights.
        origin: description of the weights, without the directories above.
    """

    path: Path
    model: Model
    weights: dict[str, Weight]

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def origin(self) -> str: ...

    def weight(self, name: str) -> Tensor:
        """Whole dense parameter, with the shape in `weights` and the dtype of the file.

        Raises:
            ValueError: it is missing, damaged, or has another shape.
        """

    def master(self, name: str) -> Tensor:
        """Parameter as `weight` gives it, but in float32, from the most precise copy in the
        files."""


def tokenizer_of(source: WeightSource) -> Tokenizer:
    """The tokenizer that a model was trained with.

    Raises:
        ValueError: it is missing, is another one, or has more ids than the model has rows.
    """
    try:
        tokenizer = source.tokenizer
    except FileNotFoundError:
        tokenizer = None
    if tokenizer is None:
        raise ValueError(f"{source.path} has no tokenizer, and a model means nothing without the "
                         "tokenizer it was trained with; put its files there")
    trained_with = tokenizer.sha256
    if isinstance(source, CheckpointReader):
        trained_with = source.run["tokenizer"]["sha256"]
    if tokenizer.sha256 != trained_with:
        raise ValueError(f"{source.path}/tokenizer is another tokenizer (sha256 "
                         f"{tokenizer.sha256[:16]}) than the model was trained with "
                         f"({trained_with[:16]}); put that one back")
    if tokenizer.vocab_size > source.model.vocab_size:
        raise ValueError(f"{source.path}: its tokenizer knows {tokenizer.vocab_size} tokens and "
                         f"its model {source.model.vocab_size}; they do not belong together, so "
                         "put the tokenizer there that the model was trained with")
    return tokenizer


def richer_of(tokenizer: Tokenizer, source: WeightSource) -> Tokenizer:
    """The same tokenizer as the files beside a model describe it, where they do: those beside data
    may know nothing of its chats and ends."""
    try:
        own = source.tokenizer
    except (FileNotFoundError, ValueError):  # it is not asked for
        return tokenizer
    return own if own == tokenizer else tokenizer


def fingerprint(source: WeightSource) -> str:
    """Hash of what lies at a source's path, by which it is known in another place."""
    listed = source.path / FILES  # has the hashes of all others
    return sampled_sha256([listed] if listed.is_file() else sorted(
        path for path in source.path.iterdir() if path.is_file()))


def require_sound(source: WeightSource) -> None:
    """Reads every weight of a model that another tool made, one at a time; those of a run were
    checked as they were saved.

    Raises:
        ValueError: one cannot be read, or has entries that are not finite.
    """
    if not isinstance(source, CheckpointReader):
        for name in source.weights:
            source.weight(name)


_ADAPTER = "adapter_config.json"


def open_weights(path: str | Path, checksums: bool = True,
                 like: Model | None = None) -> WeightSource:
    """Opens the weights at `path`.

    Args:
        path: a run directory (see `reader.find_checkpoint`), a checkpoint of a run, or a Hugging
            Face directory.
        checksums: of a checkpoint of ours, check every byte first.
        like: whose slices the weights of a Hugging Face directory are cut into.

    Raises:
        ValueError: it is none of these, is damaged, or is a model of another architecture.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        return HuggingFaceReader(path, like)
    if (path / "latest_checkpointed_iteration.txt").is_file():
        raise ValueError(f"{path} is a checkpoint directory of Megatron-LM, whose files do not "
                         "tell the model's shape; make a run of it with "
                         "tools/convert_checkpoint.py from-megatron")
    if (path / _ADAPTER).is_file():
        raise ValueError(f"{path} holds an adapter of PEFT ({_ADAPTER}) and not the weights of a "
                         "model; merge it into its model first (merge_and_unload, save_pretrained)")
    if not (path / "checkpoints").is_dir() and not (path / store.RUN).is_file() and not (
            path.name.endswith(store.PARTIAL)):
        raise ValueError(f"{path} holds no weights; give a run directory, a checkpoint of a run, "
                         f"or a Hugging Face directory with {CONFIG}" + ("" if path.exists() else (
                             "; nothing here has that name, and a model of the Hugging Face hub is "
                             "downloaded first")))
    return CheckpointReader(find_checkpoint(path), checksums)
