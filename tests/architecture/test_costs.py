"""What a layer keeps, moves and multiplies, in bytes and FLOPs worked out by hand."""

from __future__ import annotations

import pytest
from shapes import GATED, GPT, GROUPED, Gated, Normed, model

from megatron_spdf.architecture.gpt import Gpt
from megatron_spdf.architecture.lm_head import LOGITS_BYTES, tokens_at_once
from megatron_spdf.architecture.sizes import Sizes

# T = 16, B = 2, t = 2, under sequence parallelism, in bf16
SIZE = Sizes(width=2, length=16, tokens=32, tensor=2, share=0.5, whole=2 * 32 * 24)


@pytest.mark.parametrize(("made", "expected"), [
    (GPT, {"norm statistics": 256, "queries, keys, values": 2304, "cosines and sines": 0,
           "activation function": 2560}),
    # queries are copied out of the common product: 2 x 32 x 24 / 2 more
    (GROUPED, {"norm statistics": 256, "queries, keys, values": 1536 + 768,
               "cosines and sines": 0, "activation function": 2560}),
    # queries and keys are rotated, 2 x 32 x (6 + 3) x 4 / 2
    (GATED, {"norm statistics": 128, "queries, keys, values": 1536 + 1152,
             "cosines and sines": 512, "activation function": 3840})],
    ids=["gpt", "grouped", "gated"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_layer_keeps_for_backward(made, expected, dropout):
    found = made.model_copy(update={"dropout": dropout}).layer_activations(SIZE)
    assert found == {"norm inputs": 1536, "linear inputs": 1536, "attention output": 768,
                     "log-sum-exp": 384, "dropout masks": 768 if dropout else 0, **expected}


def test_a_rank_with_a_single_key_copies_no_queries():
    """With as many ranks as groups; 2 x 32 x (6 + 3 + 3) x 4 / 3 of the product alone."""
    size = Sizes(width=2, length=16, tokens=32, tensor=3, share=1 / 3, whole=2 * 32 * 24)
    assert GROUPED.layer_activations(size)["queries, keys, values"] == 2 * 32 * 48 // 3


def test_norms_of_heads_keep_a_statistic_of_every_head():
    """4 x 32 x (6 + 3) / 2 bytes, beside those of the layer."""
    plain, normed = (model(family, query_groups=3).layer_activations(SIZE)
                     for family in (Gated, Normed))
    assert normed["norm statistics"] == plain["norm statistics"] + 576


def test_without_sequence_parallelism_what_lies_between_layers_is_whole():
    whole = Sizes(width=4, length=16, tokens=32, tensor=2, share=1.0, whole=4 * 32 * 24)
    found = GPT.model_copy(update={"dropout": 0.1}).layer_activations(whole)
    assert {name: found[name] for name in ("norm inputs", "norm statistics", "linear inputs",
                                           "dropout masks", "log-sum-exp", "attention output")} == {
        "norm inputs": 6144, "norm statistics": 512, "linear inputs": 6144, "dropout masks": 1536,
        "log-sum-exp": 384, "attention output": 1536}


@pytest.mark.parametrize(("made", "tokens", "whole", "cut"), [
    # the output's gradient, and those of the input, f wide, and of the weight
    (GPT, 32, 768 + 2 * 40 * (32 + 24) // 2, 768 + 1280),
    (GROUPED, 32, 768 + 2240, 768 + 1280),
    # gated: gradients of gate and up are larger with many tokens
    (GATED, 32, 768 + 2 * 1280, 768 + 2 * 1280),
    # ... that of W_I, twice as wide, with few
    (GATED, 4, 96 + 96 + 1920 - 160, 96 + 320),
    # ... and that of W_O in between
    (GATED, 20, 480 + 2 * 40 * (20 + 24) // 2, 480 + 1600)])
def test_the_largest_temporaries_of_a_backward_pass(made, tokens, whole, cut):
    size = Sizes(width=2, length=tokens, tokens=tokens, tensor=2, share=0.5, whole=48 * tokens)
    assert made.feed_forward_backward(size, whole_gradients=True) == whole
    assert made.feed_forward_backward(size, whole_gradients=False) == cut


@pytest.mark.parametrize(("made", "expected"), [
    (GPT, 7680 + 2560), (GROUPED, 7680 + 2560), (GATED, 7680 + 3840 + 2 * 1152),
    # rotated, and normed by head
    (model(Normed, query_groups=3), 7680 + 3840 + 2 * 2 * 1152)])
def test_what_moves_through_memory_outside_of_products(made, expected):
    assert made.forward_passes(SIZE) == expected


@pytest.mark.parametrize(("made", "linear"), [
    # rows of W_QKV, W_D, W_I (both of a gated one) and W_O
    (GPT, 24 * (72 + 24 + 40 + 40)), (GROUPED, 24 * (48 + 24 + 40 + 40)),
    (GATED, 24 * (48 + 24 + 80 + 40))])
def test_flops_of_a_token_are_two_for_each_weight_and_four_for_each_key(made, linear):
    assert made.forward_flops(10.0) == (2 * 5 * linear, 4 * 5 * 10 * 24, 2 * 300 * 24)


@pytest.mark.parametrize(("family", "groups", "vocabulary", "rows"), [
    (Gpt, 6, 300, 384), (Gpt, 6, 384, 384), (Gpt, 6, 385, 768), (Gpt, 2, 385, 512),
    (Gpt, 2, 512, 512), (Gated, 3, 50257, 50304), (Gpt, 1, 50257, 50304)])
def test_the_vocabulary_is_padded_for_tensor_cores_and_for_every_slice(family, groups, vocabulary,
                                                                       rows):
    made = model(family, query_groups=groups, vocab_size=vocabulary)
    assert made.padded_vocab == rows
    assert {w.shape[0] for w in made.weights() if "word" in w.name or "output" in w.name} == {rows}


@pytest.mark.parametrize(("rows", "tokens", "chunk"), [
    (50304, 2668, 2668), (50304, 2669, 1335), (50304, 8000, 2667), (50304, 1, 1), (128, 4096, 4096),
    (LOGITS_BYTES // 4, 3, 1), (LOGITS_BYTES, 3, 1)])
def test_as_many_tokens_go_through_the_head_as_have_half_a_gibibyte_of_logits(rows, tokens, chunk):
    assert LOGITS_BYTES == 2**29 and tokens_at_once(rows, tokens) == chunk
