"""Rotary positions in transformers' configurations: release 5 has all in `rope_parameters`, release
4 and most other programs read `rope_theta` and `rope_scaling` beside it."""

from __future__ import annotations

import sys
from typing import Any

# Of Llama 3.1's scaling, constants in Megatron-Core (`RotaryEmbedding._apply_scaling`).
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
THETA = 10_000.0  # where a configuration has none


def write_rotary(base: float, scaling: float) -> dict[str, Any]:
    """The value of `rope_parameters`.

    Args:
        base: theta.
        scaling: factor of Llama 3.1's scaling, 1 for none.
    """
    scaled = {"rope_type": "llama3", "factor": scaling, **LLAMA3}
    return {"rope_theta": base, **({"rope_type": "default"} if scaling == 1.0 else scaled)}


def rotary_keys(base: float, scaling: float) -> dict[str, Any]:
    """The keys that release 4 reads."""
    scaled = write_rotary(base, scaling)
    theta = scaled.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if scaling == 1.0 else scaled}


def read_rotary(config: dict[str, Any]) -> tuple[float, float]:
    """Theta and the factor of Llama 3.1's scaling, of a configuration of either release.

    Raises:
        ValueError: its positions are other ones, or it contradicts itself.
    """
    new, old = (config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
            raise ValueError(f"has {key}={value!r}, and here all layers rotate alike; use a model "
                             "whose layers do")
    thetas = [source["rope_theta"] for source in (new, config, old) if "rope_theta" in source]
    given = [theta for theta in thetas if theta is not None] or thetas
    bases = {_number("rope_theta", theta) for theta in given} or {THETA}
    factors = {_factor(source) for source in (new, old) if source} or {1.0}
    if len(bases) > 1 or len(factors) > 1:
        raise ValueError(f"has rope_theta={config.get('rope_theta')!r} and rope_scaling={old!r}, "
                         f"and rope_parameters={new!r} says otherwise; put right the ones that the "
                         "model was not trained with")
    shares = [source.get("partial_rotary_factor") for source in (new, config)]
    if partial := [share for share in shares if share not in (None, 1)]:
        raise ValueError(f"has partial_rotary_factor={partial[0]!r}, and here all of a head "
                         "rotates; use a model with 1.0")
    return bases.pop(), factors.pop()


def _factor(rope: dict[str, Any]) -> float:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return 1.0
    if kind != "llama3":
        raise ValueError(f"has rope_type={kind!r}, and here positions rotate plainly ('default') "
                         "or as in Llama 3.1 ('llama3'); use a model with one of these")
    for key, wanted in LLAMA3.items():
        if rope.get(key) != wanted:
            raise ValueError(f"has {key}={rope.get(key)!r} in its RoPE scaling, and Megatron-Core "
                             f"computes {wanted:g} only; its outputs would differ")
    factor = _number("factor", rope.get("factor"))
    if factor < 1.0:
        raise ValueError(f"has factor={factor!r} in its RoPE scaling, which must be at least 1; "
                         "use the config.json the model was saved with")
    return factor


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (
            0 < value <= sys.float_info.max):
        raise ValueError(f"has {key}={value!r}, which must be a number over 0; use the config.json "
                         "the model was saved with")
    return float(value)
