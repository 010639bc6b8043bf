"""Section of a recipe for distillation: a teacher whose distribution the model learns too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import Field, TypeAdapter

from megatron_spdf.architecture.base import ARCHITECTURES, BY_ARCHITECTURE, Model
from megatron_spdf.architecture.forms import model_of
from megatron_spdf.files import CHECKPOINT, RUN
from megatron_spdf.records.json_reader import read_json
from megatron_spdf.section import PathText, Section
from megatron_spdf.sparsity.settings import Sparsity

HUGGING_FACE = "config.json"
R = TypeVar("R", bound="Student")
_MODEL: TypeAdapter[Model] = TypeAdapter(Annotated[Model, BY_ARCHITECTURE])


class Distill(Section):
    """A loss beside cross entropy: (1 - weight) x cross entropy + weight x T^2 x KL(teacher ||
    student) of each token, both distributions at temperature T (Hinton et al. 2015)."""

    teacher: PathText | None = Field(
        None, description="whose distribution is learned: a run, a checkpoint of one, or a Hugging "
                          "Face directory; default: none")
    weight: float = Field(0.5, ge=0.0, le=1.0,
                          description="share of the distillation loss; 0: cross entropy alone, and "
                                      "no teacher is read")
    temperature: float = Field(1.0, gt=0.0, description="T, which logits of both are divided by")

    @property
    def on(self) -> bool:
        """True if there is a teacher whose loss counts."""
        return self.teacher is not None and self.weight > 0.0


class Student(Protocol):
    """A recipe, as far as its teacher depends on it."""

    distill: Distill
    model: Model
    train: Any
    parallel: Any

    def model_copy(self: R, *, update: dict[str, Any]) -> R: ...


def teacher_of(recipe: Student) -> Model | None:
    """The shape of the model that a recipe distills from; None: it distills from none, or recorded
    one that is not there any more, which `distill_violations` refuses before a run."""
    try:
        return require_teacher(recipe)
    except ValueError:
        return None


def require_teacher(recipe: Student) -> Model | None:
    """As `teacher_of`.

    Raises:
        ValueError: the directory is missing, or holds no model.
    """
    if not recipe.distill.on:
        return None
    path = Path(recipe.distill.teacher)
    teacher, slices = _model_at(path), recipe.model.slices
    # a run's weights are cut already
    free = (path / HUGGING_FACE).is_file() and slices in teacher.possible_slices()
    return teacher.cut_like(recipe.model) if free else teacher


@lru_cache(maxsize=16)  # a search over layouts asks thousands of times
def _model_at(path: Path) -> Model:
    if not path.is_dir():
        raise ValueError(f"distill.teacher={path} is no directory; give a run, a checkpoint of "
                         "one, or a Hugging Face directory with config.json")
    if (path / HUGGING_FACE).is_file():
        try:
            return model_of(read_json(path / HUGGING_FACE, dict, constants=True),
                            [ARCHITECTURES.get(name) for name in ARCHITECTURES.names()])
        except (OSError, ValueError) as error:
            raise ValueError(f"distill.teacher={path / HUGGING_FACE} {error}") from None
    steps = sorted((file for file in path.glob(f"checkpoints/*/{RUN}")
                    if CHECKPOINT.fullmatch(file.parent.name)), reverse=True)
    saved = [path / RUN, *steps]
    found = next((file for file in saved if file.is_file()), None)
    if found is None:
        raise ValueError(f"distill.teacher={path} holds no weights, neither {HUGGING_FACE} nor a "
                         "complete checkpoint; give a run, a checkpoint of one, or a Hugging Face "
                         "directory")
    try:
        return _MODEL.validate_python(read_json(found, dict, constants=True)["recipe"]["model"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"distill.teacher={found} does not tell the model's shape ({error}); "
                         "copy the file again, or take another checkpoint") from None


def distill_violations(recipe: Student) -> Iterator[str]:
    """What does not go between a teacher, the model and the layout."""
    distill, default = recipe.distill, Distill()
    if distill.teacher is None:
        yield from (f"distill.{key}={getattr(distill, key):g} is of a teacher, and there is none; "
                    "set distill.teacher, or leave it out"
                    for key in ("weight", "temperature")
                    if getattr(distill, key) != getattr(default, key))
    try:
        teacher = require_teacher(recipe)
    except ValueError as error:
        yield str(error)
        return
    if teacher is None:
        return
    model, p, length = recipe.model, recipe.parallel, recipe.train.sequence_length
    at = f"distill.teacher={recipe.distill.teacher}"
    if teacher.vocab_size != model.vocab_size:
        yield (f"{at} has a vocabulary of {teacher.vocab_size}, and model.vocab_size="
               f"{model.vocab_size}; distributions over different tokens cannot be compared, so "
               "take a teacher with the model's tokenizer")
    if teacher.max_positions < length:
        yield (f"{at} reads at most {teacher.max_positions} tokens, and train.sequence_length="
               f"{length}; lower that, or take another teacher")
    if p.pipeline > 1:
        yield (f"parallel.pipeline={p.pipeline}: a teacher runs where the logits are, whole, and "
               "has no pipeline stages; set pipeline=1 and a larger tensor or zero_stage, or leave "
               "out distill")
    if p.tensor not in teacher.tensor_degrees():
        yield (f"{at} has {teacher.slices} slices, which parallel.tensor={p.tensor} does not "
               f"divide; tensor may be {teacher.tensor_degrees()}")
    elif p.tensor > 1 and teacher.padded_vocab != model.padded_vocab:
        yield (f"{at} has its vocabulary padded to {teacher.padded_vocab} rows and the model to "
               f"{model.padded_vocab}, so that ranks of parallel.tensor={p.tensor} hold different "
               "tokens; set tensor=1")


def as_teacher(recipe: R, model: Model) -> R:
    """The recipe of a teacher that runs beside a recipe's model: dense, without dropout."""
    train = recipe.train.model_copy(update={"recompute": "none"})
    return recipe.model_copy(update={
        "model": model.model_copy(update={"dropout": 0.0}), "sparsity": Sparsity(), "stages": [],
        "parametrization": "standard", "distill": Distill(), "train": train})
