"""Megatron-Core's configuration of a layout and of what a step recomputes."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_spdf.model.decoder import transformer_config
from megatron_spdf.model.parametrization import Parametrization
from megatron_spdf.sparsity.plan import Plan


@pytest.fixture
def config_of(recipe):
    def config_of(**sections):
        made = recipe(**sections)
        return transformer_config(made, Parametrization(made, Plan.of(made)))
    return config_of


@pytest.mark.parametrize(("layout", "expected"), [
    ({}, (1, 1, None, False)), ({"tensor": 2}, (2, 1, None, False)),
    ({"tensor": 4, "sequence": True}, (4, 1, None, True)),
    ({"pipeline": 2, "data": 4}, (1, 2, None, False)),
    ({"tensor": 2, "pipeline": 2, "interleave": 2}, (2, 2, 2, False))], ids=str)
def test_the_layout_is_the_recipes(config_of, layout, expected):
    found = config_of(parallel=layout)
    assert (found.tensor_model_parallel_size, found.pipeline_model_parallel_size,
            found.virtual_pipeline_model_parallel_size, found.sequence_parallel) == expected


@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"pipeline": 2, "interleave": 2},
                                    {"pipeline": 4}], ids=str)
def test_interleaved_stages_never_send_in_batches(config_of, layout):
    """Between two ranks Megatron-Core may match such sends in the wrong order, without an error."""
    found = config_of(parallel=layout)
    assert found.overlap_p2p_comm == ("interleave" in layout)
    assert found.batch_p2p_comm == ("interleave" not in layout)


@pytest.mark.parametrize(("kind", "expected"), [
    ("none", (None, None, None)), ("selective", ("selective", None, None)),
    ("full", ("full", "uniform", 1))])
def test_what_is_recomputed_is_the_recipes(config_of, kind, expected):
    found = config_of(train={"recompute": kind})
    assert (found.recompute_granularity, found.recompute_method,
            found.recompute_num_layers) == expected


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16),
                                                  ("fp32", torch.float32)])
def test_what_is_sent_has_the_precision_of_the_weights(config_of, precision, dtype):
    found = config_of(train={"precision": precision})
    assert (found.params_dtype, found.pipeline_dtype) == (dtype, dtype)
    assert found.bf16 == (precision == "bf16") and not found.fp16


@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("base", [None, 4, 8, 16])
def test_scores_are_divided_by_the_heads_width_from_the_bases_on(config_of, heads, base):
    standard = 1 / math.sqrt(64 / heads)
    scales = {"standard": standard, "density": standard,
              "mup": math.sqrt(base) * heads / 64 if base else standard}
    for rules, scale in scales.items():
        found = config_of(model={"heads": heads}, parametrization=rules,
                          mup_base={"head_width": base})
        assert found.softmax_scale == pytest.approx(scale)
        assert (found.softmax_scale == standard) == (rules != "mup" or base in (None, 64 // heads))
        assert found.kv_channels == 64 // heads and found.num_query_groups == heads
