"""Describes a checkpoint, as plain values and as text, and verifies it against its recipe."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_spdf.checkpoint.mask_progress import mask_progress, render_progress
from megatron_spdf.checkpoint.reader import (
    AGES,
    OPTIMIZER,
    VALUES,
    CheckpointReader,
    stored_name,
)
from megatron_spdf.checkpoint.run_metadata import INITIAL, describe_masks
from megatron_spdf.checkpoint.store import DamagedCheckpoint
from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.tables import Column, Table
from megatron_spdf.text import any_layer

_NAMED_FAULTS = 5


def describe(reader: CheckpointReader) -> dict[str, Any]:
    """Collects model, layout, progress, sparsity, bytes by part and origin of a checkpoint, as
    plain values."""
    run, recipe, plan = reader.run, reader.recipe, reader.plan
    parameters = sum(w.numel for w in reader.weights.values())
    return {
        "checkpoint": str(reader.path),
        "model": {**recipe.model.shape(),
                  "padded_vocab": recipe.model.padded_vocab,
                  "parameters": parameters,
                  "active_parameters": parameters - plan.numel + plan.active},
        "layout": recipe.parallel.model_dump(exclude={"overlap", "timeout"}),
        "precision": recipe.train.precision,
        "state": {**run["state"], "tokens": run["tokens"]},
        "tokenizer": run["tokenizer"],
        "sparsity": {"masks": reader.masks, "target": plan.sparsity,
                     "weights": sparsity_by_kind(reader)},
        "algorithm": mask_progress(reader),
        "bytes": bytes_by_part(reader),
        "versions": run["versions"],
        "saved": run["saved"],
        "origin": run.get("origin", INITIAL),
    }


def sparsity_by_kind(reader: CheckpointReader) -> list[dict[str, Any]]:
    """Target and measured sparsity as saved, one row for all layers of one kind, shape and target.

    Raises:
        ValueError: run.json lacks a weight that its recipe makes sparse.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for name, weight in reader.plan.weights.items():
        kind = any_layer(name)
        saved = reader.run["sparsity"].get(name)
        if saved is None:
            raise ValueError(f"{reader.path}: run.json has no sparsity of {name}, which its recipe "
                             "makes sparse; use a checkpoint that this program wrote")
        row = rows.setdefault((kind, weight.shape, saved["target"]), {
            "kind": kind, "count": 0, "shape": list(weight.shape), "target": saved["target"],
            "measured": [saved["measured"]] * 2})
        low, high = row["measured"]
        row["count"] += 1
        row["measured"] = [min(low, saved["measured"]), max(high, saved["measured"])]
    return list(rows.values())


def bytes_by_part(reader: CheckpointReader) -> dict[str, int]:
    """Bytes of the tensors: values and mask bits of sparse weights, other weights, optimizer
    state."""
    parts = {"sparse_values": 0, "mask_bits": 0, "other_weights": 0, "optimizer": 0}
    for name in reader.shapes:
        parts[_part_of(name)] += reader.nbytes(name)
    return {**parts, "total": sum(parts.values())}


def _part_of(name: str) -> str:
    if name.startswith("optimizer."):
        return "optimizer"
    if name.endswith(VALUES):
        return "sparse_values"
    return "mask_bits" if name.endswith(("_bits", AGES)) else "other_weights"


def verify(reader: CheckpointReader) -> str:
    """Compares the tensors with the recipe.

    Every weight and its optimizer state must be there with the right shape, every tensor must lie
    where the index says, and there must be no other. Every seeded mask must
    be the one that the plan draws, and any other must have the planned density. Bytes of the files
    are checked by `CheckpointReader(checksums=True)` instead.

    Returns:
        Summary, in a sentence.

    Raises:
        DamagedCheckpoint: naming the tensors at fault and what is wrong with each.
    """
    faults = wrong_shapes(reader)
    if not faults:
        for name in reader.shapes:
            reader.check(name)
        faults = [f for weight in reader.plan.weights.values() for f in _wrong_mask(reader, weight)]
    if faults:
        more = f"; and {len(faults) - _NAMED_FAULTS} more" if len(faults) > _NAMED_FAULTS else ""
        raise DamagedCheckpoint(
            f"checkpoint {reader.path} is not what its recipe says: "
            f"{'; '.join(faults[:_NAMED_FAULTS])}{more}. Use another checkpoint"
        )
    return (f"{len(reader.weights)} weights and their optimizer state are there, "
            f"{len(reader.plan.weights)} masks are as planned")


def wrong_shapes(reader: CheckpointReader) -> list[str]:
    """Lists tensors of the model and its optimizer that are missing, have another shape than the
    recipe says, or are not the model's, as sentences."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, weight in reader.weights.items():
        sparse, stored, shape = reader.plan.weights.get(name), stored_name(name), weight.shape
        if sparse:
            stored, shape = stored + VALUES, (sparse.slices, sparse.stored_per_slice)
        expected |= {stored: shape, **{f"{OPTIMIZER}{state}.{stored}": shape
                                       for state in reader.recipe.saved}}
    masks = {bits for name in reader.plan.weights for bits in reader.side_bits(name)}
    return [f"{name} is missing" if name not in reader.shapes else
            f"{name} has shape {reader.shapes[name]} instead of {shape}"
            for name, shape in expected.items() if reader.shapes.get(name) != shape] + [
            f"{name} is no tensor of its model" for name in reader.shapes
            if name not in expected and name not in masks]


def _wrong_mask(reader: CheckpointReader, weight: SparseWeight) -> list[str]:
    """Describes the first slice of a weight whose mask is not the planned one. Empty if all are."""
    k = weight.active_per_slice
    if weight.algorithm.tracks and (np.unpackbits(reader.first_bits(weight.name), axis=1).sum(1)
                                    != k).any():
        return [f"the first mask of {weight.name} has another number of active entries than {k} in "
                "a slice"]
    for slice_id, bits in enumerate(reader.mask_bits(weight.name)):
        active = int(np.unpackbits(bits).sum(dtype=np.int64))
        if active != k:
            return [f"slice {slice_id} of {weight.name} has {active} active entries instead of {k}"]
        if reader.masks["kind"] == "seeded" and not np.array_equal(
                np.packbits(weight.draw(reader.plan.seed, slice_id)), bits):
            return [f"slice {slice_id} of {weight.name} has another mask than seed "
                    f"{reader.plan.seed} draws"]
    return []


# Of a model, what `render` says in words; the rest is what only some families have.
_SAID = {"architecture", "layers", "hidden", "heads", "query_groups", "ffn_hidden", "vocab_size",
         "padded_vocab", "max_positions", "parameters", "active_parameters"}


def render(facts: dict[str, Any]) -> str:
    """Formats the result of `describe` as text."""
    m, p, state = facts["model"], facts["layout"], facts["state"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = {
        "checkpoint": facts["checkpoint"],
        "model": f"{m['architecture']} of {m['layers']} layers x {m['hidden']} hidden, "
        f"{m['heads']} heads in {m['query_groups']} query groups, feed-forward {m['ffn_hidden']}, "
        f"vocabulary {m['vocab_size']:,} (padded to {m['padded_vocab']:,}), "
        f"{m['max_positions']:,} positions"
        + "".join(f", {key} {m[key]}" for key in sorted(m.keys() - _SAID)),
        "parameters": f"{m['parameters']:,}, of which {m['active_parameters']:,} active",
        "layout": f"tensor {p['tensor']}{' + sequence' if p['sequence'] else ''} x pipeline "
        f"{p['pipeline']}"
        f"{' (interleave {})'.format(p['interleave']) if p['interleave'] > 1 else ''} x "
        f"data {p['data']}, ZeRO-{p['zero_stage']}, {facts['precision']}",
        "progress": f"step {state['step']:,}, {state['tokens']:,} tokens, "
        f"{state['optimizer_steps']:,} optimizer steps, {state['skipped']:,} skipped",
        "tokenizer": f"{facts['tokenizer']['kind']}, sha256 {facts['tokenizer']['sha256'][:16]}",
        "written by": versions,
        **({"masks": render_progress(facts["algorithm"])} if facts["algorithm"] else {}),
        "saved": facts["saved"],
        "begun from": facts["origin"],
    }
    text = [f"{name + ':':<12}{value}" for name, value in lines.items()]
    return "\n".join([*text, *_render_bytes(facts["bytes"]), *_render_sparsity(facts["sparsity"])])


def _render_bytes(parts: dict[str, int]) -> list[str]:
    table = Table([Column("part", lambda part: part[0].replace("_", " ")),
                   Column("bytes", lambda part: part[1], ",")], list(parts.items()))
    return ["bytes of the tensors", table.text("  ")]


def _render_sparsity(sparsity: dict[str, Any]) -> list[str]:
    if not sparsity["weights"]:
        return ["sparsity: dense, every weight is active"]
    columns = [Column("weight", "kind"), Column("count", form="d"),
               Column("shape", lambda row: " x ".join(map(str, row["shape"])), align="right"),
               Column("target", form=".4%"),
               Column("measured", lambda row: " to ".join(
                   dict.fromkeys(f"{share:.4%}" for share in row["measured"])))]
    return [f"sparsity: {sparsity['target']:.4%} of the weights below, masks "
            f"{describe_masks(sparsity['masks'])}",
            Table(columns, sparsity["weights"]).text("  ")]
