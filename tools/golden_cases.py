"""Cases of tools/golden.py: their data, recipes and commands.

All are in the words of the commit they were first recorded at; golden_words.py has what was renamed
since.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden_place import (
    Place,
    checkpoints_of,
    hash_checkpoints,
    hash_distributed,
    hash_files,
    hash_safetensors,
    without,
)

from megatron_spdf.files import write_file, write_json

STEPS, SAVED = 9, 6
PER_STEP = 8 * 32  # tokens
PRETRAIN = {
    "seed": 3,
    "model.layers": 2, "model.hidden": 64, "model.heads": 4, "model.vocab_size": 384,
    "model.max_positions": 64,
    "data.train": "data/text/train", "data.valid": "data/text/valid",
    "data.workers": 0,  # loader processes would only cost time
    "train.tokens": STEPS * PER_STEP, "train.sequence_length": 32, "train.global_batch": 8,
    "train.micro_batch": 4, "train.precision": "fp32",
    "optimizer.lr": 3e-3, "optimizer.warmup_tokens": 2 * PER_STEP,
    "evaluate.every": 3, "evaluate.batches": 1,
    "checkpoint.every": 3, "checkpoint.keep": 1, "checkpoint.keep_every": SAVED,
    "log.every": 1, "log.tensorboard": False, "log.ranks_every": 0,
}
S75 = {"sparsity.level": 0.75}
TENSOR_2 = {"parallel.tensor": 2, "parallel.sequence": True}
DATA_2 = {"parallel.data": 2, "train.micro_batch": 2}
BF16 = {"train.precision": "bf16"}
DEEPSPEED = {"engine": "deepspeed", **DATA_2, **S75}
MOVES = {**S75, "sparsity.update.every": 2, "sparsity.update.stop": 1.0}
PHASES = [
    {"share": 2 / 3, "sparsity": {"level": 0.75, "expand": "layer"}, "lr": 6e-3,
     "warmup_tokens": PER_STEP},
    {"share": 1 / 3, "sparsity": {"level": 0.0}, "lr": 2e-3, "warmup_tokens": PER_STEP // 2},
]
RULES = [{"weights": "decoder.layers.0.*", "level": 0.0}, {"weights": "*.mlp.*", "level": 0.9}]
BLEND = [{"path": "data/text/train", "weight": 2.0}, {"path": "data/more", "weight": 1.0}]
# Name -> ranks, and what differs from PRETRAIN.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "dense": (1, {"model.dropout": 0.1, "train.label_smoothing": 0.1}),
    "s75": (1, S75),
    "per_layer": (1, {**S75, "sparsity.expand": "layer", "train.recompute": "full",
                      "model.dropout": 0.1}),
    "tiles": (1, {**S75, "sparsity.pattern": "block", "sparsity.block": 8}),
    "two_four": (1, {"sparsity.level": 0.5, "sparsity.pattern": "2:4", **BF16}),
    "mup": (1, {**S75, "parametrization": "mup", "base.hidden": 32, "base.density": 0.5,
                "base.input_multiplier": 2.0, "base.output_multiplier": 0.5}),
    "two_phases": (1, {"phases": PHASES}),
    "rules": (1, {"sparsity.level": 0.5, "sparsity.rules": RULES, "sparsity.seed": 5,
                  "model.query_groups": 2, "data.train": [], "data.blend": BLEND,
                  "data.reset_attention": True, "data.reset_positions": True,
                  "data.cache": "cache", "guard.max_skipped": 3, "train.recompute": "selective"}),
    "set": (1, {**MOVES, "sparsity.algorithm": "set", "sparsity.update.track_ages": True}),
    "rigl": (2, {**MOVES, **TENSOR_2, "sparsity.algorithm": "rigl", "sparsity.pattern": "block",
                 "sparsity.block": 8}),
    "gmp": (2, {**S75, **DATA_2, "sparsity.algorithm": "gmp", "sparsity.update.every": 2,
                "parallel.zero_stage": 1}),
    "ste": (1, {**S75, "sparsity.algorithm": "ste", "sparsity.expand": "layer"}),
    "tensor_2": (2, {**S75, **TENSOR_2}),
    "pipeline_2": (2, {**S75, "model.layers": 4, "parallel.pipeline": 2, "parallel.interleave": 2,
                       "train.micro_batch": 2}),
    "data_2": (2, {**S75, **DATA_2, **BF16, "parallel.zero_stage": 1}),
    "deepspeed_1": (2, {**DEEPSPEED, **BF16, "parallel.zero_stage": 1}),
    "deepspeed_2": (2, {**DEEPSPEED, "parallel.zero_stage": 2, "model.dropout": 0.1}),
    "deepspeed_3": (2, {**DEEPSPEED, "parallel.zero_stage": 3}),
    "deepspeed_set": (2, {**DEEPSPEED, **MOVES, "sparsity.algorithm": "set",
                          "parallel.zero_stage": 3}),
}
# The run tensor_2 from step SAVED on.
RESUMED = {**S75, **DATA_2, "parallel.zero_stage": 1}

FINETUNE = {
    "seed": 5, "data.task": "jsonl", "data.path": "pairs",
    "train.epochs": 1, "train.global_batch": 8, "train.micro_batch": 4, "train.precision": "fp32",
    "optimizer.lr": 1e-2, "optimizer.warmup_steps": 2,
    "evaluate.every": 4, "log.every": 1, "log.tensorboard": False, "log.ranks_every": 0,
}
TUNED: dict[str, tuple[int, dict[str, Any]]] = {
    "dense": (1, {"phase": "dense", "train.label_smoothing": 0.1, "train.epochs": 10}),
    "revived": (1, {"phase": "dense", "revived": "normal", "engine": "megatron"}),
    "sparse": (2, {"phase": "sparse", "parallel.data": 2, "parallel.zero_stage": 2}),
}

NAMES, FOODS = ("Alba", "Bora", "Cello", "Dune"), ("fish", "soup", "rice", "cake")
AREAS = ("city", "river", "park")


@dataclass(frozen=True)
class Case:
    """Recording of what lies under a name, after the cases it needs."""

    record: Callable[[Place], dict[str, Any]]
    needs: tuple[str, ...] = ()


def data(place: Place) -> dict[str, Any]:
    """Text and pairs for all other cases; manifests and hashes of the data made of them."""
    _write_text(place.scratch)
    _write_pairs(place.scratch / "pairs")
    tool = ["preprocess", "--workers", "1", "--tokenizer", "tokenizer"]
    place.run(*tool, "--train-tokenizer", "bpe", "--vocab-size", "384", "--output", "data/text",
              "--input", "text/a.jsonl", "text/b.jsonl", "--split", "0.8,0.2", "--deduplicate")
    place.run(*tool, "--input", "text/c.txt", "--output", "data/more", "--no-eod")
    made, tokenizer = place.scratch / "data", sorted((place.scratch / "tokenizer").iterdir())
    files = [f for f in sorted(made.rglob("*")) if f.suffix in (".bin", ".idx")]
    return {"manifests": _manifests(made), "tokenizer": hash_files(tokenizer),
            "files": hash_files(files)}


def pretrained(name: str) -> Case:
    """Pre-training run of RUNS."""
    ranks, changes = RUNS[name]
    changes = {"output": f"pretrain_{name}", **changes}
    return Case(lambda place: place.train("pretrain", PRETRAIN, changes, ranks), ("data",))


def resumed(place: Place) -> dict[str, Any]:
    """Run of two tensor-parallel ranks that goes on at two data-parallel ones."""
    place.copy_run("pretrain_tensor_2", "pretrain_resumed", SAVED)
    return place.train("pretrain", PRETRAIN, {"output": "pretrain_resumed", **RESUMED}, 2)


def finetuned(name: str) -> Case:
    """Fine-tuning run of TUNED, from the sparse run."""
    ranks, changes = TUNED[name]
    changes = {"checkpoint": "pretrain_s75", "output": f"finetune_{name}", **changes}
    return Case(lambda place: place.train("finetune", FINETUNE, changes, ranks), ("pretrain_s75",))


def decoded(place: Place) -> dict[str, Any]:
    """Predictions and scores of the run that was fine-tuned dense."""
    place.run("evaluate", "finetune_dense", "--task", "jsonl", "--data", "pairs", "--beams", "3",
              "--max-new-tokens", "16", "--output", "decoded")
    output = place.scratch / "decoded"
    found = json.loads((output / "scores.json").read_text())
    # Beside clock and path, `missing`: what Java would be needed for, where there is none.
    kept = without(found, "versions", "scored", "seconds", "tokens_per_second", "checkpoint",
                   "missing")
    texts = {file.stem: file.read_text().splitlines() for file in output.glob("*.txt")}
    return {"scores": kept, "texts": texts}


def planned(place: Place) -> dict[str, Any]:
    """Planner's JSON of every shipped recipe, on a GPU, and the law's."""
    words = ("--gpu", "h100", "--price", "2")
    return {"recipes": {file.name: plan(place, str(file), *words) for file in shipped(place)},
            "law": plan(place, "law")}


def built(place: Place) -> dict[str, Any]:
    """Bytes of the ranks of every shipped recipe, built without hardware."""
    return {file.name: plan(place, str(file), "--exact") for file in shipped(place)}


def shipped(place: Place) -> list[Path]:
    """Recipes in a tree."""
    folders = [place.tree / "configs" / name for name in ("pretrain", "plan")]
    return sorted(file for folder in folders for file in folder.glob("*.yaml"))


def plan(place: Place, *words: str) -> Any:
    """Planner's JSON."""
    return json.loads(place.run("plan", *words, "--json"))


def exported(place: Place) -> dict[str, Any]:
    """Tensors of the sparse run for Hugging Face and for Megatron-LM."""
    place.run("convert", "to-hf", "pretrain_s75", "exported", "--masks")
    place.run("convert", "to-megatron", "pretrain_s75", "for_megatron")
    files = sorted((place.scratch / "exported").glob("*.safetensors"))
    (megatron,) = checkpoints_of(place.scratch / "for_megatron")
    config = json.loads((place.scratch / "exported/config.json").read_text())
    return {"huggingface": {file.name: {"tensors": hash_safetensors(file)} for file in files},
            "config": without(config, "transformers_version"),
            "megatron": {"tensors": hash_distributed(megatron)}}


def imported(place: Place) -> dict[str, Any]:
    """Runs begun from the exports, with the masks of another sparsity, and one made dense."""
    words = place.words("pretrain")
    recipe = words.recipe({"output": "unused", **PRETRAIN})
    write_json(place.scratch / "import.yaml", recipe)
    half = ["--recipe", "import.yaml", "--sparsity", "0.5", "--select", "magnitude"]
    place.run("convert", "from-hf", "exported", "imported", *half)
    place.run("convert", "from-megatron", "for_megatron", "from_megatron", *half)
    place.run("convert", "densify", "pretrain_s75", "densified")
    return {name: hash_checkpoints(place.scratch / name)
            for name in ("imported", "from_megatron", "densified")}


FIRST = ("s75", "tensor_2")  # which others need
CASES: dict[str, Case] = {
    "data": Case(data),
    **{f"pretrain_{name}": pretrained(name) for name in FIRST},
    **{f"finetune_{name}": finetuned(name) for name in TUNED},
    "pretrain_resumed": Case(resumed, ("pretrain_tensor_2",)),
    **{f"pretrain_{name}": pretrained(name) for name in RUNS if name not in FIRST},
    "decoded": Case(decoded, ("finetune_dense",)),
    "exported": Case(exported, ("pretrain_s75",)),
    "imported": Case(imported, ("exported",)),
    "plan": Case(planned),
    "plan_exact": Case(built),
}


def _write_text(scratch: Path) -> None:
    """Documents of made-up sentences, some twice."""
    draw = random.Random(0)
    (scratch / "text").mkdir()
    lengths = [draw.randint(3, 20) for _ in range(90)]
    documents = [" ".join(_sentence(draw) for _ in range(length)) for length in lengths]
    for name, texts in {"a": documents[:40], "b": documents[35:80]}.items():
        lines = [json.dumps({"text": text}) for text in texts]
        write_file(scratch / f"text/{name}.jsonl", "\n".join(lines) + "\n")
    write_file(scratch / "text/c.txt", "\n".join(documents[80:]))


def _write_pairs(directory: Path) -> None:
    """Splits of a task: a place, what it serves and where."""
    draw = random.Random(1)
    directory.mkdir()
    for split, count in {"train": 45, "validation": 12, "test": 6}.items():
        places = [map(draw.choice, (NAMES, FOODS, AREAS)) for _ in range(count)]
        lines = [json.dumps({"context": f"{name}, {food}, {area}: ",
                             "completion": f"{name} serves {food} in the {area}."})
                 for name, food, area in places]
        write_file(directory / f"{split}.jsonl", "\n".join(lines) + "\n")


def _sentence(draw: random.Random) -> str:
    name, food, area = map(draw.choice, (NAMES, FOODS, AREAS))
    verb = draw.choice(("serves", "sells", "has no", "is known for"))
    end = draw.choice((".", " today.", f", and {draw.randint(2, 99)} more."))
    return f"{name} {verb} {food} in the {area}{end}"


def _manifests(directory: Path) -> dict[str, Any]:
    """JSON files below a directory that are no tokenizer's, without paths and versions."""
    files = [f for f in sorted(directory.rglob("*.json")) if ".tokenizer" not in str(f)]
    return {str(f.relative_to(directory)): without(json.loads(f.read_text()), "path", "versions")
            for f in files}
