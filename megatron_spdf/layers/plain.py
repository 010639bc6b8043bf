"""Compact weights in anybody's PyTorch: every `nn.Linear` of a module, in one call.

    from megatron_spdf import densify, expanded, sparsify

    model = sparsify(model, 0.75)       # any optimizer, DDP, fully_shard, state_dict: as before
    with expanded(model):               # several forward passes expand a weight once
        ...
    densify(model)                      # ordinary layers again, with the same outputs

A layer computes the dense weight from its values whenever it runs. Parameters, gradients,
optimizer state, traffic and checkpoints have the size of the active weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from megatron_spdf.architecture.base import Weight
from megatron_spdf.layers.compact import CompactWeight, make_compact
from megatron_spdf.recipe.load import sentence
from megatron_spdf.sparsity.plan import make_plan
from megatron_spdf.sparsity.settings import Sparsity

M = TypeVar("M", bound=nn.Module)
IGNORED = "_ddp_params_and_buffers_to_ignore"


def sparsify(module: M, level: float, pattern: str = "unstructured", seed: int = 0,
             rules: Mapping[str, float] | None = None, slices: int = 8, **keys: Any) -> M:
    """Makes the weights of all `nn.Linear` in a module sparse and compact, in place.

    The active weights keep their values. A weight that another module shares, such as an LM head
    that is the embedding, stays dense.

    Args:
        level: fraction of zeros of a weight, in [0, 1).
        pattern: of the masks: `unstructured`, `tile`, `2:4`, or one that a plugin registers.
        seed: of the masks; they depend on it, the weight's name in the module and `slices`.
        rules: glob on names of weights -> level, the first that matches wins:
            `{"head.weight": 0.0}`.
        slices: most parts of a weight, rows beside rows, with equally many active weights each. The
            parameter is (parts, active weights of a part), which `fully_shard` cuts along its first
            axis: take a multiple of the ranks.
        keys: of the pattern: `tile=32`.

    Returns:
        The module.

    Raises:
        ValueError: a setting is wrong, a weight cannot have the pattern, a rule decides nothing, or
            there is nothing to make sparse.
    """
    settings = _settings(level=level, pattern=pattern, seed=seed, rules=rules or {}, **keys)
    layers = dict(_linear_layers(module))
    plan = make_plan(settings, list(_weights(module, layers)), slices)
    if not plan.weights:
        raise ValueError(f"sparsify: no weight of this {type(module).__name__} is made sparse by "
                         f"level={level:g} and rules={dict(rules or {})}; give it a module with "
                         "nn.Linear layers of their own and a level over 0")
    ignored = list(getattr(module, IGNORED, []))
    for name, planned in plan.weights.items():
        layer = layers[name]
        make_compact(layer, CompactWeight(planned, plan.seed, 0, 1, layer.weight.device))
        place = name.removesuffix("weight") + "parametrizations.weight.0."
        compact = layer.parametrizations.weight[0]
        ignored += [place + buffer for buffer, _ in compact.named_buffers()]
    # Masks are the same on all ranks, and DDP would broadcast them before every forward pass.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    return module


def _settings(rules: Mapping[str, float], **keys: Any) -> Sparsity:
    if of_runs := sorted({"dense_copy", "algorithm", "update"} & keys.keys()):
        raise ValueError(f"sparsify: {of_runs[0]}={keys[of_runs[0]]!r} is for runs of recipes; the "
                         "masks of a module stay, so leave it out")
    values = {**keys, "rules": [{"weights": glob, "level": level} for glob, level in rules.items()]}
    try:
        return Sparsity.model_validate(values)
    except ValidationError as error:
        said = [sentence(e, Sparsity, values) for e in error.errors()]
        raise ValueError(f"sparsify: {'; '.join(said)}") from None


def _linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Name of the weight -> layer."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            weight = f"{name}.weight".removeprefix(".")
            if parametrize.is_parametrized(layer, "weight"):
                raise ValueError(f"sparsify: {weight} has a parametrization already; call densify, "
                                 "or torch.nn.utils.parametrize.remove_parametrizations, first")
            yield weight, layer


def _weights(module: nn.Module, layers: Mapping[str, nn.Linear]) -> Iterator[Weight]:
    """All parameters by name; those of linear layers alone can be sparse."""
    users = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    for name, parameter in module.named_parameters(remove_duplicate=False):
        linear = name in layers and users[id(parameter)] == 1
        yield Weight(name, tuple(parameter.shape), 0, 0, linear=linear)
