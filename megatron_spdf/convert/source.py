"""Something that holds the weights of a dense GPT by canonical name, wherever it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_spdf.architecture.base import Model, Weight
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.huggingface_import import CONFIG, HuggingFaceReader
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer


class WeightSource(Protocol):
    """Weights to convert, or to start a fine-tuning from.

    Attributes:
        path: where they lie.
        model: shape of the model.
        weights: canonical name -> parameter of the whole model (`model/weights.py`).
        tokenizer: what its ids mean; None where the files of none lie with the weights.
        origin: what they are, in words, without the directories above.
    """

    path: Path
    model: Model
    weights: dict[str, Weight]

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def origin(self) -> str: ...

    def weight(self, name: str) -> Tensor:
        """A parameter whole and dense, with the shape that `weights` says, in the type it is kept
        in.

        Raises:
            ValueError: it is missing, damaged, or has another shape.
        """

    def master(self, name: str) -> Tensor:
        """Like `weight`, in float32 and with all the precision there is."""


def open_weights(path: str | Path, checksums: bool = True) -> WeightSource:
    """The weights at `path`: a run directory (see `reader.find_checkpoint`), a checkpoint of a run,
    or a Hugging Face directory of the GPT-2 family.

    Args:
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
