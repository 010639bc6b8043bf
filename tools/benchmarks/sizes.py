"""How large the models of the suite are: GPT-3 XL and its like on a GPU, and something tiny where
the suite is only tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, MaskAlgorithm

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FAMILIES = CONFIGS / "pretrain/llama_3_2_1b_s75.yaml"
DENSE = "0.0"
HEAVY = ("rigl", "set")  # with the model that is trained, the others with a smaller one
TINY_FAMILY = ("layers: 1, hidden: 128, heads: 4, query_groups: 4, ffn_hidden: 256, "
               "vocab_size: 512, max_positions: 32")


@dataclass(frozen=True)
class Scale:
    """A recipe and how long it is measured.

    Attributes:
        recipe_path, overrides: of the model that is trained.
        deep: further overrides, of the model whose largest depth is looked for.
        family_overrides: of models of other families, in place of `overrides`.
        families: name -> further overrides.
        small: further overrides, of the model that the host may bind.
        heavy, light: further overrides of the models whose masks move: by `HEAVY`, and by the other
            algorithms. Their steps are as many as those of the published runs.
        tiles: sizes of tiles, the last of which stanford-stk multiplies with too.
        steps, by_part: that are measured of each run, as they come and with clocks in them.
        moves: that are measured of each algorithm.
        seconds: that each measurement of a kernel takes at least.
        tries: of training at a depth.
    """

    recipe_path: Path
    overrides: tuple[str, ...]
    deep: tuple[str, ...]
    family_overrides: tuple[str, ...]
    families: Mapping[str, tuple[str, ...]]
    small: tuple[str, ...]
    heavy: tuple[str, ...]
    light: tuple[str, ...]
    tiles: tuple[int, int]
    steps: int
    by_part: int
    moves: int
    seconds: float
    tries: int

    @property
    def patterns(self) -> dict[str, str]:
        """Name -> `sparsity` of a recipe, as YAML."""
        return {
            "unstructured 75%, kept for the step": "{level: 0.75}",
            "unstructured 75%, layer by layer": "{level: 0.75, dense_copy: per_layer}",
            **{f"tiles of {size}, 75%": f"{{level: 0.75, pattern: tile, tile: {size}}}"
               for size in self.tiles},
            "2:4": "{level: 0.5, pattern: '2:4'}",
        }

    @property
    def few(self) -> dict[str, str]:
        """The patterns that models are measured with of which GPT-3 XL is not one."""
        names = ["unstructured 75%, kept for the step", f"tiles of {self.tiles[0]}, 75%"]
        return {name: self.patterns[name] for name in names}

    def recipe(self, sparsity: str, *overrides: str) -> Recipe:
        return load_recipe(self.recipe_path, [*self.overrides, *overrides, f"sparsity={sparsity}"])

    def deep_recipe(self, sparsity: str) -> Recipe:
        return self.recipe(sparsity, *self.deep)

    def small_recipe(self, sparsity: str, *overrides: str) -> Recipe:
        return self.recipe(sparsity, *self.small, *overrides)

    def family(self, model: tuple[str, ...], sparsity: str) -> Recipe:
        return load_recipe(FAMILIES, [*self.family_overrides, *model, f"sparsity={sparsity}"])

    def moving(self) -> dict[str, Recipe]:
        """Algorithm and model -> recipe, of every algorithm that changes masks in a run."""
        names = sorted((n for n in ALGORITHMS.names() if _changes(n)),
                       key=lambda name: (name not in HEAVY, _has_borders(name), name))
        return {f"{name}, {'the large model' if name in HEAVY else 'the small model'}": self.recipe(
            f"{{level: 0.75, algorithm: {name}}}", *(self.heavy if name in HEAVY else self.light))
            for name in names}


def _has_borders(algorithm: str) -> bool:
    """Whether its moves are borders between parts of a run alone, which take longest."""
    return ALGORITHMS.get(algorithm).due is MaskAlgorithm.due


def _changes(algorithm: str) -> bool:
    return not ALGORITHMS.get(algorithm)().stays


GPU = Scale(CONFIGS / "pretrain/gpt3_xl_dense.yaml",
            ("parallel.data=1", "train.global_batch=16", "train.micro_batch=8"),
            ("model.preset=gpt3_6b7", "train.global_batch=1", "train.micro_batch=1",
             "train.recompute=full"),
            ("parallel.data=1", "train.global_batch=8", "train.micro_batch=8",
             "train.sequence_length=2048"),
            {"Llama 3.2 1B": ("model.preset=llama_3_2_1b",),
             "Qwen3 0.6B": ("model.architecture=qwen3", "model.preset=qwen3_0_6b")},
            ("model.preset=gpt2_small",),
            ("train.global_batch=8", f"train.tokens={24_796 * 8 * 2048}"),
            ("model.preset=gpt2_small", f"train.tokens={4_768 * 16 * 2048}",
             "optimizer.warmup_tokens=1M"),
            tiles=(64, 128), steps=8, by_part=1, moves=4, seconds=0.1, tries=4)
CPU = Scale(CONFIGS / "benchmark/cpu.yaml",
            ("model.layers=1", "model.hidden=128", "model.heads=4", "model.vocab_size=512",
             "model.max_positions=32",
             "train.global_batch=2", "train.micro_batch=1"),
            ("model.hidden=64", "train.global_batch=1", "train.recompute=full"),
            ("parallel.data=1", "train.global_batch=2", "train.micro_batch=1",
             "train.sequence_length=32", "train.precision=fp32"),
            {"Llama, tiny": (f"model={{preset: null, {TINY_FAMILY}}}",),
             "Qwen3, tiny": (f"model={{architecture: qwen3, preset: null, {TINY_FAMILY}}}",)},
            ("model.hidden=64",), ("model.hidden=64",), ("model.hidden=64",),
            tiles=(16, 32), steps=4, by_part=1, moves=2, seconds=1e-3, tries=1)
CPU_MEMORY = 2**22  # bytes, in which something tiny finds its largest depth


def scale_of(name: str) -> Scale:
    return CPU if name == "cpu" else GPU


def memory() -> int:
    """Bytes of this machine's GPU."""
    return (
        torch.cuda.get_device_properties(0).total_memory
        if torch.cuda.is_available()
        else CPU_MEMORY
    )


def dtype_of(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32


def tokens_of(recipe: Recipe) -> int:
    """Tokens of a micro-batch."""
    return recipe.train.micro_batch * recipe.train.sequence_length
