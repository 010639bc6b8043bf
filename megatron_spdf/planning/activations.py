"""Bytes that a step needs beside weights and optimizer state, by closed form, after Korthikanti et
al. 2022.

What a layer keeps of a micro-batch is the architecture's to say (`Model.layer_activations`). Of a
GPT that is 32 T B h for bf16 at t = 1, the paper's 34 less the masks. Its 5 heads T / h term is
absent: attention is `scaled_dot_product_attention` on a flash kernel, which stores no T x T scores
(assumed of GPUs; the CPU's is one). Recomputing the attention core ("selective") therefore saves
its log-sum-exp only; recomputing layers ("full") keeps the input of each, and one layer at a time
in whole.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_spdf.architecture.lm_head import tokens_at_once, tokens_beside_teacher
from megatron_spdf.architecture.sizes import Sizes
from megatron_spdf.planning.buffers import local_parameters
from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.planning.moves import transient_bytes
from megatron_spdf.recipe.distillation import as_teacher, teacher_of
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan


@dataclass(frozen=True)
class StepBytes:
    """Bytes at the fullest moment of a step, on one rank: while a micro-batch goes back through the
    layers.

    Attributes:
        running: kept by the transformer layers for the backward of that micro-batch, of one model
            chunk.
        waiting: the same of the other micro-batches in flight.
        embedding: kept by the embedding.
        pipeline: outputs sent to the next stage, kept until their gradient comes.
        head: of the last stage, input and output of the last norm, logits and their softmax chunk
            by chunk, and the gradients of the LM head; beside `running`. Of distillation, two more
            chunks like the logits and the teacher's hidden states, or before them one of its
            layers.
        workspace: the largest temporaries of a layer's backward, and the layer itself where it is
            recomputed. They come after those of the head are gone.
        late: what there is instead of all these when backward has reached the embedding: its
            gradients, and the dense gradients of expanded weights. Autograd leaves cutting these to
            the active entries to the end of each backward pass but the first, since it takes the
            newest nodes first and the expansion is the oldest; with full recomputation, where every
            layer has a pass of its own, to the end of the layer.
        communication: the buffer that sequence parallelism gathers into.
    """

    running: int
    waiting: int
    embedding: int
    pipeline: int
    head: int
    workspace: int
    late: int
    communication: int

    @property
    def activations(self) -> int:
        return self.running + self.waiting + self.embedding + self.pipeline

    @property
    def total(self) -> int:
        fullest = max(self.running + max(self.head, self.workspace), self.late)
        return self.waiting + self.embedding + self.pipeline + self.communication + fullest


def sizes_of(recipe: Recipe) -> Sizes:
    """Sizes of one of the recipe's micro-batches."""
    width = 2 if recipe.train.precision == "bf16" else 4
    length = recipe.train.sequence_length
    tokens = length * recipe.train.micro_batch
    tensor = recipe.parallel.tensor
    share = 1 / tensor if recipe.parallel.sequence else 1.0
    return Sizes(width, length, tokens, tensor, share, width * tokens * recipe.model.hidden)


def layer_bytes(recipe: Recipe) -> dict[str, int]:
    """What one layer keeps of one micro-batch for backward, by tensor; nothing recomputed."""
    return recipe.model.layer_activations(sizes_of(recipe))


def kept_by_layer(recipe: Recipe) -> int:
    """`layer_bytes` together, less what is recomputed."""
    if recipe.train.recompute == "full":
        return sizes_of(recipe).hidden
    parts = layer_bytes(recipe)
    return sum(parts.values()) - (parts["log-sum-exp"] if recipe.train.recompute == "selective"
                                  else 0)


def in_flight(recipe: Recipe, stage: int) -> int:
    """Micro-batches whose activations a stage holds at once, counted in model chunks.

    1F1B holds as many as there are stages from this one on; interleaved, 2 (P - p - 1) + (v - 1) P
    + 1 chunks (Narayanan et al. 2021, section 2.2, as Megatron-Core schedules it).
    """
    p = recipe.parallel
    after = p.pipeline - stage - 1
    chunks = after + 1 if p.interleave == 1 else 2 * after + (p.interleave - 1) * p.pipeline + 1
    return min(recipe.micro_batches * p.interleave, chunks)


def step_bytes(recipe: Recipe, plan: Plan, stage: int) -> StepBytes:
    """Bytes beside weights and optimizer state at the fullest moment of a step, on each rank of a
    stage."""
    p, m, size = recipe.parallel, recipe.model, sizes_of(recipe)
    last = stage == p.pipeline - 1
    flying = in_flight(recipe, stage)
    running = m.layers // (p.pipeline * p.interleave) * kept_by_layer(recipe)
    sends = p.pipeline > 1 and not (last and p.interleave == 1)
    # Token ids shifted to the shard (8 bytes) and which of them are other shards' (1), of each
    # micro-batch.
    embedding = 9 * size.tokens * -(-flying // p.interleave) if stage == 0 and p.tensor > 1 else 0
    return StepBytes(
        running=running,
        waiting=(flying - 1) * running,
        embedding=embedding,
        pipeline=flying * size.hidden if sends else 0,
        head=max(_head(recipe, size), _teacher(recipe)) if last else 0,
        workspace=_workspace(recipe, plan, size, stage),
        late=_late(recipe, plan, size, stage),
        communication=size.whole if p.sequence else 0,
    )


def _teacher(recipe: Recipe) -> int:
    """Bytes of a teacher's forward pass: a layer, its input and output."""
    model = teacher_of(recipe)
    if model is None:
        return 0
    own = as_teacher(recipe, model)
    return sum(layer_bytes(own).values()) + 2 * sizes_of(own).hidden


def _late(recipe: Recipe, plan: Plan, size: Sizes, stage: int) -> int:
    """One chunk's dense gradients, of weights that were expanded before this micro-batch; and the
    larger of what the end of a layer holds and the embedding's gradients, from the LM head, from
    the look-up, and their sum."""
    p, dense = recipe.parallel, 0
    if recipe.micro_batches > 1 and recipe.train.recompute != "full":
        dense = max(sum(q.expands_to for q in c if q.expands_to
                        and plan.keeps_copy(q.name, on_gpu=True))
                    for c in local_parameters(recipe.model, p, plan, stage))
    vocabulary = _vocabulary_gradient(recipe, size)
    waits, at_embedding = 0, vocabulary if stage == 0 else 0
    if _waits_for_embedding(recipe):
        waits, at_embedding = vocabulary, 3 * vocabulary
    return size.width * dense + max(waits + _at_layer_end(recipe, size), at_embedding)


def _at_layer_end(recipe: Recipe, size: Sizes) -> int:
    """Bytes at the backward of W_QKV: five tensors between layers (the output, its gradient, that
    of the residual path, the norm's output and its gradient) and the gradients of Q, K and V; those
    that all ranks have of them, and in the order of ranks, where these share query groups."""
    m = recipe.model
    shared = 2 * size.width * size.tokens * m.qkv_rows if size.tensor > m.query_groups else 0
    return 5 * size.hidden + size.sharded(3 * m.heads * m.head_width) + shared


def _workspace(recipe: Recipe, plan: Plan, size: Sizes, stage: int) -> int:
    """Backward of W_O, the fullest moment of a layer: the gradients of its output, of its input and
    of itself, whole before it is cut to the active weights, unless zeros are skipped. In one
    pipeline stage the embedding's gradient from the LM head waits for that from the look-up. With
    full recomputation there is the layer too, whose input is kept anyway but whose output is not;
    or, at its end, the dense gradients of its four weights. The end of a layer is the fullest
    moment too where ranks share query groups, though most of the layer has been freed."""
    m, p = recipe.model, recipe.parallel
    waits = _vocabulary_gradient(recipe, size) if _waits_for_embedding(recipe) else 0
    down = [f"decoder.layers.{i}.mlp.linear_fc2.weight" for i in range(m.layers)]
    whole = not all(n in plan.weights and plan.skips_zeros(n) for n in down)
    gradients = m.feed_forward_backward(size, whole)
    gradients += size.whole if p.sequence else 0  # the output's, gathered
    at_end = _at_layer_end(recipe, size)
    if recipe.train.recompute == "full":
        at_end += _dense_gradients(recipe, plan, size, stage)
        return max(gradients + sum(layer_bytes(recipe).values()), at_end) + waits
    if p.tensor > m.query_groups:
        if recipe.micro_batches > 1:  # those of the layer's other weights wait to be cut
            at_end += _dense_gradients(recipe, plan, size, stage, but=".linear_qkv.")
        freed = kept_by_layer(recipe) - 2 * size.hidden  # not its norm's input and W_QKV's
        gradients = max(gradients, at_end - freed)
    return gradients + waits


def _dense_gradients(recipe: Recipe, plan: Plan, size: Sizes, stage: int, but: str = "\n") -> int:
    """Dense gradients of the expanded weights of the layer that has the most.

    Args:
        but: a part of the names of those left out.
    """
    dense: Counter[int] = Counter()
    chunks = local_parameters(recipe.model, recipe.parallel, plan, stage)
    for q in (q for chunk in chunks for q in chunk if but not in q.name):
        dense[q.layer] += q.expands_to * (q.expands_to > 0 and plan.keeps_copy(q.name, on_gpu=True))
    return size.width * max(dense.values())


def _head(recipe: Recipe, size: Sizes) -> int:
    """Bytes for a chunk of tokens: logits, whose gradient overwrites them, and the gradient of the
    LM head's weight; where there are several chunks, their sum in fp32, and that gradient after the
    last of them. All along there are the LM head's input, where sequence parallelism gathers it,
    and its gradient."""
    rows, teacher = recipe.model.padded_vocab // recipe.parallel.tensor, teacher_of(recipe)
    chunk = (tokens_beside_teacher(rows, size.tokens) if teacher else
             tokens_at_once(rows, size.tokens, size.width))
    logits, beside, softmax = size.width * chunk * rows, 0, 0
    # fp32 softmaxes beside the logits, which fp32 logits become; the student's less the teacher's,
    # the teacher's, and its hidden states
    if teacher:
        beside = 8 * chunk * rows + size.width * size.tokens * teacher.hidden
        softmax = 4 * chunk * rows + (logits if size.width == 2 else 0)
    gradient, summed = _vocabulary_gradient(recipe, size), 0
    if chunk < size.tokens:
        fullest, summed = max(softmax, logits, gradient), 4 * rows * recipe.model.hidden
    else:
        fullest = max(softmax, logits + gradient)
    inputs = 2 * size.hidden + (2 if recipe.parallel.sequence else 1) * size.whole
    norm = int(recipe.model.norm_statistics * size.tokens * size.share)
    return beside + inputs + norm + summed + fullest


def _waits_for_embedding(recipe: Recipe) -> bool:
    """True if the LM head's gradient of its weight waits for that of the embedding's look-up."""
    return recipe.model.tied and recipe.parallel.pipeline == 1


def _vocabulary_gradient(recipe: Recipe, size: Sizes) -> int:
    """Bytes of the gradient of the embedding, or of the LM head's weight."""
    return size.width * recipe.model.padded_vocab // recipe.parallel.tensor * recipe.model.hidden


def peak_bytes(recipe: Recipe, plan: Plan, stage: int) -> int:
    """Bytes on a GPU of a stage at the fullest moment: in forward and backward, since the update,
    by a fused Adam, has no temporaries and needs neither activations nor expanded copies."""
    return (rank_bytes(recipe, plan, stage, on_gpu=True).total
            + step_bytes(recipe, plan, stage).total + transient_bytes(recipe, plan, stage))
