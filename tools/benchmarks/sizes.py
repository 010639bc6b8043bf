"""How large the models of the suite are: GPT-3 XL on a GPU, and something tiny where the suite is
only tried."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import Recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DENSE = "0.0"


@dataclass(frozen=True)
class Scale:
    """A recipe and how long it is measured.

    Attributes:
        recipe_path, overrides: of the model that is trained.
        deep: further overrides, of the model whose largest depth is looked for.
        tiles: sizes of tiles, the last of which stanford-stk multiplies with too.
        steps, by_part: that are measured of each run, as they come and with clocks in them.
        seconds: that each measurement of a kernel takes at least.
        tries: of training at a depth.
    """

    recipe_path: Path
    overrides: tuple[str, ...]
    deep: tuple[str, ...]
    tiles: tuple[int, int]
    steps: int
    by_part: int
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

    def recipe(self, sparsity: str, *overrides: str) -> Recipe:
        return load_recipe(self.recipe_path, [*self.overrides, *overrides, f"sparsity={sparsity}"])

    def deep_recipe(self, sparsity: str) -> Recipe:
        return self.recipe(sparsity, *self.deep)


GPU = Scale(CONFIGS / "pretrain/gpt3_xl_dense.yaml",
            ("parallel.data=1", "train.global_batch=16", "train.micro_batch=8"),
            ("model.preset=gpt3_6b7", "train.global_batch=1", "train.micro_batch=1",
             "train.recompute=full"),
            tiles=(64, 128), steps=8, by_part=2, seconds=0.2, tries=4)
CPU = Scale(CONFIGS / "benchmark/cpu.yaml",
            ("model.layers=1", "model.hidden=128", "model.heads=4", "model.vocab_size=512",
             "model.max_positions=32",
             "train.global_batch=2", "train.micro_batch=1"),
            ("model.hidden=64", "train.global_batch=1", "train.recompute=full"),
            tiles=(16, 32), steps=4, by_part=1, seconds=1e-3, tries=1)
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
    """Of a micro-batch."""
    return recipe.train.micro_batch * recipe.train.sequence_length
