"""Logits of the engine, restored from a run's newest checkpoint at tensor-parallel degree 1, as an independent word on
what an export must compute.

    python engine_logits.py RUN TOKENS.npy LOGITS.npy
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_spdf.parallel import cpu

cpu.install()

from megatron_spdf.checkpoint.checkpointer import Checkpointer  # noqa: E402
from megatron_spdf.config import load_recipe  # noqa: E402
from megatron_spdf.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_spdf.engine.megatron import MegatronEngine  # noqa: E402
from megatron_spdf.model.weights import model_weights  # noqa: E402
from megatron_spdf.parallel.ranks import find_ranks, join, leave  # noqa: E402
from megatron_spdf.sparsity.plan import make_plan  # noqa: E402


def main(run: Path, tokens: Path, logits: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml", ["parallel.tensor=1"])
    plan = make_plan(recipe.sparsity, model_weights(recipe.model), recipe.model.query_groups)
    engine = MegatronEngine(recipe, plan, join(find_ranks(), recipe))
    tokenizer = load_tokenizer(next((run / "checkpoints").glob("step_*")) / "tokenizer")
    _, found = Checkpointer(run / "checkpoints", recipe, plan, tokenizer).restore(engine)
    assert any(said.startswith("resumed") for said in found), found
    ids = torch.from_numpy(np.load(tokens))  # (B, T)
    places = torch.arange(ids.size(1)).expand_as(ids)
    with torch.no_grad():
        np.save(logits, engine.models[0].eval()(ids, places, None).numpy())  # (B, T, padded vocabulary)
    leave()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
