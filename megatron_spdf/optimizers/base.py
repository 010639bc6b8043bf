"""The seam of optimizers: section of the recipe, named state per parameter, construction.

A tenant is one file with a section class that registers itself (`adamw.py` is one). Engines,
checkpoints, mask moves and the planner go by what the class says.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, create_model

from megatron_spdf.registry import Registry
from megatron_spdf.section import MOST_STEPS, MOST_TOKENS, ByName, Count, Section

if TYPE_CHECKING:  # the planner goes without PyTorch
    import torch
    from torch import Tensor

    from megatron_spdf.architecture.base import Group

MASTER = "param"  # the fp32 master weight, kept beside the named state
STATE_BYTES = 4  # of an entry of one state: all states are fp32


# Of the learning rate, with x from 0 where the decay begins to 1 at the end.
Decay = Literal["cosine", "linear", "minus_sqrt", "exponential", "constant"]
# Keys of a schedule, which a stage of a run may have of its own.
SCHEDULE = ("lr", "embedding_lr", "norm_lr", "min_lr_ratio", "decay", "decay_share",
            "warmup_tokens")


class Average(NamedTuple):
    """A named state that is a running average: its decay, and the power of the gradient."""

    decay: float
    power: int


class Optimizer(Section):
    """Linear warm-up, then the peak learning rate, then decay to it x min_lr_ratio at the end of
    the run. Weights of every group follow this schedule, each group with a peak of its own.

    A tenant derives from it, adds its fields, gives `states` and `build`, and registers.

    Attributes:
        states: names of the fp32 tensors that the optimizer keeps for every parameter, of its
            shape, under these names in `torch.optim.Optimizer.state`; zero before the first update.
        title: the algorithm as PyTorch and DeepSpeed call it.
    """

    states: ClassVar[tuple[str, ...]]
    title: ClassVar[str]

    name: str = Field("adamw", description="which optimizer; its fields follow from it")
    lr: float = Field(gt=0.0,
                      description="peak learning rate; of linear weights, where the two below say "
                                  "otherwise")
    embedding_lr: float | None = Field(
        None, gt=0.0, description="that of embeddings and the LM head; default: lr")
    norm_lr: float | None = Field(
        None, gt=0.0, description="that of norms and biases; default: embedding_lr")
    min_lr_ratio: float = Field(0.1, ge=0.0, le=1.0, description="final over peak learning rate")
    decay: Decay = Field(
        "cosine", description="shape of its fall, with x from 0 to 1: (1 + cos(pi x)) / 2, 1 - x, "
                              "1 - sqrt(x), 2^(1 - x) - 1, or none")
    decay_share: float = Field(
        1.0, gt=0.0, le=1.0, description="of the steps, the last, in which it falls, after a "
                                         "stretch at the peak (WSD); 1: all after the warm-up")
    weight_decay: float = Field(0.1, ge=0.0, description="not on biases and norms")
    clip_grad: float = Field(1.0, ge=0.0,
                             description="largest global gradient norm; 0: no clipping")

    def peak(self, group: Group) -> float:
        """Peak learning rate of a group of weights."""
        embedding = self.lr if self.embedding_lr is None else self.embedding_lr
        norm = embedding if self.norm_lr is None else self.norm_lr
        return {"linear": self.lr, "embedding": embedding, "norm": norm}[group]

    @property
    def saved(self) -> tuple[str, ...]:
        """Names of what a checkpoint holds for every parameter: master weight and named state."""
        return (MASTER, *self.states)

    @property
    def state_bytes(self) -> int:
        """Bytes of the named state for one entry of a parameter, without its master weight."""
        return STATE_BYTES * len(self.states)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The PyTorch optimizer of parameter groups; the engine sets their `lr` and `weight_decay`
        before every update."""
        raise NotImplementedError

    def megatron_options(self) -> dict[str, Any] | None:
        """Fields of Megatron-Core's `OptimizerConfig` where it has this optimizer, ZeRO-1 included;
        None: the one of `build` is put into its wrappers."""
        return None

    def deepspeed_options(self) -> dict[str, tuple[str, Any]]:
        """Keys of `optimizer` in DeepSpeed's file that the recipe decides: key -> (field of the
        recipe, value)."""
        return {"type": ("optimizer.name", self.title),
                "params.lr": ("optimizer.lr", self.lr),
                "params.weight_decay": ("optimizer.weight_decay", self.weight_decay)}

    def set_steps(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Sets the number of updates done, where the optimizer counts them."""

    def start(self, optimizer: torch.optim.Optimizer, masters: Iterable[Tensor]) -> None:
        """Gives fp32 masters the state that they have before the first update."""
        import torch

        for master in masters:
            optimizer.state[master].update({s: torch.zeros_like(master) for s in self.states})
        self.set_steps(optimizer, 0)

    def skips_on_device(self, optimizer: torch.optim.Optimizer) -> bool:
        """True if an update leaves everything as it is where the PyTorch optimizer's `found_inf`,
        () float32 on the device, is 1; so the host need not know whether gradients are finite."""
        return False

    @property
    def averages(self) -> dict[str, Average]:
        """Those of the named state that are running averages from zero, which the step count
        corrects for that."""
        return {}

    @property
    def largest_first_updates(self) -> float:
        """The largest update of an entry that starts with zero state under an old step count, over
        its steady one, for a constant gradient."""
        return 1.0

    def mup_rate(self, linear: bool, width: float, growth: float) -> float:
        """Learning rate under `parametrization: mup` or `density`, over the recipe's.

        Args:
            linear: whether of a linear weight, not of an embedding, a bias or a norm.
            width: m_d, the model's over the base model's; 1 under `density`.
            growth: m_d m_rho of a linear weight, 1 of others.
        """
        raise ValueError(f"optimizer.name={self.name} has no rule for parametrization=mup or "
                         "density; set parametrization=standard or another optimizer")


OPTIMIZERS: Registry[type[Optimizer]] = Registry("optimizer", "megatron_spdf.optimizers")


class Pretraining(Section):
    """The schedule of pre-training."""

    warmup_tokens: Count = Field(0, ge=0, le=MOST_TOKENS,
                                 description="length of the warm-up, in tokens")


class Finetuning(Section):
    """The schedule of fine-tuning."""

    min_lr_ratio: float = Field(0.0, ge=0.0, le=1.0, description="final over peak learning rate")
    decay: Decay = Field("linear", description=Optimizer.model_fields["decay"].description)
    weight_decay: float = Field(0.01, ge=0.0, description="not on biases and norms")
    warmup_steps: int = Field(0, ge=0, le=MOST_STEPS, description="length of the warm-up, in steps")


@cache
def with_schedule(schedule: type[Section], tenant: type[Optimizer]) -> type[Optimizer]:
    """The section of a tenant with the fields of a schedule."""
    return create_model(tenant.__name__, __base__=(schedule, tenant), __doc__=tenant.__doc__,
                        __module__=tenant.__module__)


def _pretraining(tenant: type[Optimizer]) -> type[Optimizer]:
    return with_schedule(Pretraining, tenant)


def _finetuning(tenant: type[Optimizer]) -> type[Optimizer]:
    return with_schedule(Finetuning, tenant)


PRETRAINING = ByName(OPTIMIZERS, "adamw", _pretraining)
FINETUNING = ByName(OPTIMIZERS, "adamw", _finetuning)
