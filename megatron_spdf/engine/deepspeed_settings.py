"""DeepSpeed's configuration: what the recipe decides, and what a JSON file of the user adds to
it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any

from megatron_spdf.recipe.recipe import AUTO, Recipe
from megatron_spdf.records.json_reader import read_json

# Settings of DeepSpeed that the recipe decides, with the names it has for them.
_FIELDS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch / (train.micro_batch x parallel.data)",
    "gradient_clipping": "optimizer.clip_grad",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
}

# gradients, or parameters of stage 3, that travel at once; DeepSpeed's ten times as many take GiB
BUCKET = 50_000_000

# Sections of DeepSpeed's file that a run of ours may want, to tell a misspelt one by: DeepSpeed
# says nothing of those.
_SECTIONS = frozenset(key.partition(".")[0] for key in _FIELDS) | {
    "activation_checkpointing", "aio", "autotuning", "comms_logger", "communication_data_type",
    "compile", "optimizer",
    "csv_monitor", "data_types", "disable_allgather", "dump_state", "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown", "prescale_gradients", "scheduler", "seq_parallel_communication_data_type",
    "sparse_gradients",
    "steps_per_print", "tensorboard", "torch_autocast", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}


def deepspeed_settings(recipe: Recipe) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`: defaults of ours, then the recipe's JSON file,
    whose `auto` leaves a value to the recipe, then the recipe."""
    bf16 = recipe.train.precision == "bf16"
    defaults: dict[str, Any] = {
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # an optimizer with a guard, engine/deepspeed.py
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled on first use
        "bf16": {"check_grad_overflow": True} if bf16 else {},
        "data_types": {"grad_accum_dtype": "fp32"} if bf16 and recipe.parallel.zero_stage else {},
        "zero_optimization": dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"),
                                           BUCKET),
    }
    settings = _merge(_merge(defaults, _read(recipe.deepspeed) if recipe.deepspeed else {}),
                      _nest(_decided(recipe)))
    del settings["optimizer"]  # the engine brings its own
    if recipe.parallel.zero_stage == 0 and not bf16:
        # the engine clips, since DeepSpeed would not tell the norm
        settings["gradient_clipping"] = 0.0
    return settings


def contradictions(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the JSON file, a sentence each; above all values that are not the
    recipe's."""
    if recipe.deepspeed is None:
        return
    try:
        there = _read(recipe.deepspeed)
    except ValueError as error:
        yield str(error)
        return
    ours, leaves = _decided(recipe), dict(_leaves(there))
    fields = _FIELDS | {f"optimizer.{key}": field
                        for key, (field, _) in recipe.optimizer.deepspeed_options().items()}
    for key, value in leaves.items():
        if key in ours and value != AUTO and not _same(value, ours[key]):
            yield (f"{recipe.deepspeed} has {key}={_json(value)}, but the recipe's {fields[key]} "
                   f"makes it {_json(ours[key])}; change one of them, or write {_json(AUTO)} there")
        if key not in ours and value == AUTO:
            yield (f"{recipe.deepspeed} has {key}={_json(AUTO)}, which the recipe says nothing "
                   "about; give a value")
        elif key not in ours and isinstance(value, str) and _is_number(value):
            yield (f"{recipe.deepspeed} has {key}={_json(value)}, a text; write the number without "
                   "quotes")
    for key in there.keys() - _SECTIONS:
        if meant := difflib.get_close_matches(key, _SECTIONS, 1, 0.8):
            yield (f"{recipe.deepspeed} has {key}, of which DeepSpeed knows nothing and would say "
                   f"nothing; write {meant[0]} if that is meant")
    if "scheduler" in there:
        yield (
            f"{recipe.deepspeed} has a scheduler, {_json(there['scheduler'])}, but the recipe's "
            "optimizer.decay, warm-up and min_lr_ratio decide the learning rate; remove it there"
        )
    offloaded = leaves.get("zero_optimization.offload_param.device", "none")
    if offloaded != "none" and recipe.parallel.zero_stage != 3:
        yield (f"{recipe.deepspeed} has zero_optimization.offload_param.device={_json(offloaded)}, "
               f"but parallel.zero_stage={recipe.parallel.zero_stage}; parameters can be offloaded "
               "with zero_stage=3 only")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _decided(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value of every setting that the recipe decides."""
    t, o, p = recipe.train, recipe.optimizer, recipe.parallel
    return {
        "train_batch_size": t.global_batch,
        "train_micro_batch_size_per_gpu": t.micro_batch,
        "gradient_accumulation_steps": AUTO if t.micro_batch == AUTO else recipe.micro_batches,
        "gradient_clipping": o.clip_grad,
        "bf16.enabled": t.precision == "bf16",
        "fp16.enabled": False,
        "zero_optimization.stage": p.zero_stage,
        "zero_optimization.offload_optimizer.device": "cpu" if p.offload else "none",
        **{f"optimizer.{key}": value for key, (_, value) in o.deepspeed_options().items()},
    }


def _read(path: str) -> dict[str, Any]:
    """The JSON file.

    Raises:
        ValueError: it is not there, not JSON, ambiguous, or not an object.
    """
    try:
        return read_json(path, dict[str, Any], remedy="see configs/deepspeed")
    except OSError as error:
        raise ValueError(f"deepspeed={path} cannot be read ({error.strerror}); see "
                         "configs/deepspeed") from None


def _leaves(values: dict[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def _nest(leaves: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in leaves.items():
        *sections, last = key.split(".")
        section = nested
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return nested


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` over `base`, section by section."""
    merged = dict(base)
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if nested else value
    return merged


def _same(there: Any, ours: Any) -> bool:
    if isinstance(ours, list):
        return isinstance(there, list) and len(there) == len(ours) and all(map(_same, there, ours))
    if isinstance(ours, bool) or isinstance(there, bool):
        return there is ours
    return there == ours


def _json(value: Any) -> str:
    return json.dumps(value)
