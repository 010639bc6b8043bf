"""DeepSpeed: ZeRO 0 to 3 around the same model, optimizer state in the host's memory too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from megatron_spdf.engine.deepspeed_settings import contradictions
from megatron_spdf.optimizers.base import STATE_BYTES
from megatron_spdf.planning.activations import sizes_of
from megatron_spdf.planning.buffers import local_parameters
from megatron_spdf.planning.engines import EngineRow
from megatron_spdf.planning.memory import RankBytes
from megatron_spdf.planning.traffic import Operation, Traffic
from megatron_spdf.recipe.recipe import AUTO, ENGINES, Recipe
from megatron_spdf.recipe.rules import batch_violations
from megatron_spdf.sparsity.plan import Plan

# Defaults of stage3_param_persistence_threshold and stage3_max_reuse_distance, in elements.
PERSISTENT, REUSE = 100_000, 1_000_000_000


class DeepSpeed(EngineRow):
    """Bytes are ZeRO's closed form."""

    title = "DeepSpeed"
    engine = "megatron_spdf.engine.deepspeed:DeepSpeedEngine"
    zero_stages = (0, 1, 2, 3)
    offload = True
    fields = ("deepspeed",)

    def rule_violations(self, recipe: Recipe) -> Iterator[str]:
        yield from super().rule_violations(recipe)
        t = recipe.train  # a step that cannot be cut up is named without them
        if t.micro_batch == AUTO or not list(
                batch_violations(t.global_batch, t.micro_batch, recipe.parallel.data)):
            yield from contradictions(recipe)

    def rank_bytes(self, recipe: Recipe, plan: Plan, stage: int, on_gpu: bool,
                   data_rank: int) -> RankBytes:
        held = super().rank_bytes(recipe, plan, stage, on_gpu, data_rank)
        return replace(held, master=0, moments=0) if recipe.parallel.offload else held

    def data_traffic(self, recipe: Recipe, plan: Plan, stage: int, on_gpu: bool) -> Traffic:
        """Gradients travel in fp32, as `deepspeed_settings.py` has them.

        Stages 2 and 3 reduce every micro-batch's gradients. Stage 3 gathers a parameter for every
        micro-batch, and for its backward pass once more where the forward pass was too many
        parameters ago; small ones once a step.
        """
        zero, many, width = (recipe.parallel.zero_stage, recipe.micro_batches,
                             sizes_of(recipe).width)
        parameters = [q.elements
                      for chunk in local_parameters(recipe.model, recipe.parallel, plan, stage)
                      for q in chunk]
        elements = sum(parameters)
        sent: Traffic = Counter()
        reduction: Operation = "reduce-scatter" if zero == 3 else "all-reduce"
        sent["gradients", reduction] += 4 * elements * (many if zero >= 2 else 1)
        if zero == 3:
            kept = sum(n for n in parameters if n <= PERSISTENT)
            gathers = many * (2 if elements > REUSE else 1)
            sent["parameters", "all-gather"] += width * (kept + gathers * (elements - kept))
        elif zero >= 1:
            sent["parameters", "all-gather"] += width * elements
        return sent

    def move_bytes(self, recipe: Recipe, plan: Plan, stage: int, on_gpu: bool) -> int:
        """After the state, the weights themselves are gathered anew."""
        gathered = super().move_bytes(recipe, plan, stage, on_gpu)
        states = STATE_BYTES * (len(recipe.saved) + 1)
        return gathered + gathered // states * sizes_of(recipe).width


ENGINES.register("deepspeed", DeepSpeed())
