"""Interface of anything that holds the weights of a dense model by canonical name."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_spdf.architecture.base import Model, Weight
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.huggingface_import import CONFIG, HuggingFaceReader
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer


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


def open_weights(path: str | Path, checksums: bool = True) -> WeightSource:
    """Opens the weights at `path`.

    Args:
        path: a run directory (see `reader.find_checkpoint`), a checkpoint of a run, or a Hugging
            Face directory.
        checksums: of a checkpoint of ours, check every byte first.

    Raises:
        ValueError: it is none of these, is damaged, or is a model of another architecture.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        return HuggingFaceReader(path)
    if (path / "latest_checkpointed_iteration.txt").is_file():
        raise ValueError(f"{path} is a checkpoint directory of Megatron-LM, whose files do not "
                         "tell the model's shape; make a run of it with "
                         "tools/convert_checkpoint.py from-megatron")
    if not (path / "checkpoints").is_dir() and not (path / "run.json").is_file():
        raise ValueError(f"{path} holds no weights; give a run directory, a checkpoint of a run, "
                         f"or a Hugging Face directory with {CONFIG}")
    return CheckpointReader(find_checkpoint(path), checksums)
