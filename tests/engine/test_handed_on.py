"""What Megatron-Core and DeepSpeed are handed, whole: a setting that is left out, swapped or added
changes it."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_spdf.engine import deepspeed, megatron
from megatron_spdf.engine.deepspeed import DeepSpeedEngine, ModelParallelUnit
from megatron_spdf.engine.megatron import MegatronEngine
from megatron_spdf.model import decoder
from megatron_spdf.model.parametrization import Parametrization, Peak
from megatron_spdf.parallel import ranks as joining
from megatron_spdf.resilience.world import Ranks
from megatron_spdf.sparsity.plan import Plan

GROUPED = {"heads": 8, "query_groups": 4, "ffn_hidden": 96, "norm_eps": 3e-6, "init_std": 0.03,
           "layers": 6, "hidden": 128, "vocab_size": 300, "max_positions": 48, "head_width": None}
ALWAYS = {"perform_initialization": False, "gradient_accumulation_fusion": False,
          "masked_softmax_fusion": False, "bias_dropout_fusion": False}
GPT = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 4,
       "kv_channels": 16, "ffn_hidden_size": 256, "gated_linear_unit": False,
       "add_bias_linear": True, "add_qkv_bias": False, "qk_layernorm": False,
       "normalization": "LayerNorm", "layernorm_epsilon": 1e-5, "hidden_dropout": 0.2,
       "attention_dropout": 0.2, "init_method_std": 0.05, "softmax_scale": 0.25,
       "params_dtype": torch.float32, "pipeline_dtype": torch.float32, "bf16": False,
       "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2,
       "virtual_pipeline_model_parallel_size": 2, "sequence_parallel": False,
       "overlap_p2p_comm": True, "batch_p2p_comm": False, "bias_activation_fusion": False,
       "recompute_granularity": "full", "recompute_method": "uniform",
       "recompute_num_layers": 1, **ALWAYS}
LLAMA = {"num_layers": 6, "hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4,
         "kv_channels": 16, "ffn_hidden_size": 96, "gated_linear_unit": True,
         "add_bias_linear": False, "add_qkv_bias": False, "qk_layernorm": False,
         "normalization": "RMSNorm", "layernorm_epsilon": 3e-6, "hidden_dropout": 0.0,
         "attention_dropout": 0.0, "init_method_std": 0.03, "softmax_scale": 0.25,
         "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True,
         "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 1,
         "virtual_pipeline_model_parallel_size": None, "sequence_parallel": True,
         "overlap_p2p_comm": False, "batch_p2p_comm": True, "bias_activation_fusion": True,
         "activation_func": F.silu, **ALWAYS}


def of_family(name: str, **change) -> dict:
    known = {k: v for k, v in GROUPED.items() if v is not None}
    return {"architecture": name, **known, **change}


@pytest.mark.parametrize(("sections", "expected"), [
    ({"model": {"dropout": 0.2, "init_std": 0.05}, "parallel": {"pipeline": 2, "interleave": 2},
      "train": {"precision": "fp32", "recompute": "full"}}, GPT),
    ({"model": of_family("llama"), "parallel": {"tensor": 4, "sequence": True}}, LLAMA),
    ({"model": of_family("qwen2"), "parallel": {"tensor": 4, "sequence": True},
      "train": {"recompute": "selective"}},
     LLAMA | {"add_qkv_bias": True, "recompute_granularity": "selective"}),
    ({"model": of_family("qwen3", head_width=32), "parallel": {"tensor": 4, "sequence": True}},
     LLAMA | {"kv_channels": 32, "qk_layernorm": True, "softmax_scale": 1 / math.sqrt(32)}),
], ids=["gpt", "llama", "qwen2", "qwen3"])
def test_the_whole_configuration_of_a_model(recipe, monkeypatch, sections, expected):
    monkeypatch.setattr(decoder, "TransformerConfig", dict)
    made = recipe(**sections)
    found = decoder.transformer_config(made, Parametrization(made, Plan.of(made)))
    if "activation_func" not in expected:  # GPT-2's GELU is its tanh approximation
        x = torch.linspace(-3, 3, 9)
        assert torch.equal(found.pop("activation_func")(x), F.gelu(x, approximate="tanh"))
    assert found == expected


@pytest.mark.parametrize(("model", "expected"), [
    ({"vocab_size": 250}, {
        "position_embedding_type": "learned_absolute", "vocab_size": 256,
        "max_sequence_length": 32, "share_embeddings_and_output_weights": True}),
    (of_family("llama", rotary_base=5e5, rotary_scaling=8.0),
     {"position_embedding_type": "rope", "rotary_base": 5e5, "rope_scaling": True,
      "rope_scaling_factor": 8.0, "vocab_size": 384, "max_sequence_length": 48,
      "share_embeddings_and_output_weights": False}),
    (of_family("qwen3", head_width=32, tied=True),
     {"position_embedding_type": "rope", "rotary_base": 1e6, "rope_scaling": False,
      "rope_scaling_factor": 1.0, "vocab_size": 384, "max_sequence_length": 48,
      "share_embeddings_and_output_weights": True})], ids=["gpt", "llama", "qwen3"])
def test_the_whole_of_what_makes_its_decoder(recipe, model, expected):
    assert recipe(model=model).model.gpt_model() == expected


@pytest.fixture
def handed(recipe, monkeypatch):
    """What Megatron-Core's data parallelism and optimizer are made of, with a second peak of the
    learning rate and traffic behind compute or not."""
    def of(overlaps: bool, **sections) -> dict:
        made, seen = recipe(**sections), {}
        adam = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))])
        replace = partial(monkeypatch.setattr, megatron)
        replace("DistributedDataParallelConfig", dict)
        replace("DistributedDataParallel", lambda config, settings, model, **others:
                seen.setdefault("replicas", []).append((config, settings, model, others))
                or SimpleNamespace(config=config))
        replace("OptimizerConfig", lambda **fields: SimpleNamespace(**fields))
        replace("get_standard_config_overrides", lambda config: {})
        replace("get_megatron_optimizer", lambda config, chunks, overrides, **others:
                seen.update(optimizer=(vars(config), overrides, others))
                or SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam)]))
        monkeypatch.setattr(megatron.common, "other_peaks", lambda *_: [Peak(0.5, 0.25)])
        model = SimpleNamespace(config=SimpleNamespace(params_dtype=torch.float16))
        chunks = [megatron._data_parallel(made, model, overlaps, first=first)
                  for first in (True, False)]
        megatron._optimizer(made, chunks, overlaps)
        assert all(there[0] is model.config and there[2] is model for there in seen["replicas"])
        return seen
    return of


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("zero", [0, 1])
def test_the_whole_of_what_makes_replicas(handed, zero, overlaps):
    seen = handed(overlaps, parallel={"zero_stage": zero})["replicas"]
    config = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": bool(zero),
              "overlap_grad_reduce": overlaps, "overlap_param_gather": overlaps and bool(zero)}
    assert [there[1] for there in seen] == [config] * 2
    # of an interleaved schedule the first chunk alone has buckets
    assert [there[3] for there in seen] == [{"disable_bucketing": False},
                                            {"disable_bucketing": True}]


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "bf16")])
def test_the_whole_of_what_makes_the_optimizer(handed, zero, precision, overlaps):
    config, overrides, others = handed(
        overlaps, parallel={"zero_stage": zero}, train={"precision": precision}, optimizer={
            "lr": 0.04, "min_lr_ratio": 0.25, "weight_decay": 0.3, "clip_grad": 0.7, "beta1": 0.8,
            "beta2": 0.95, "eps": 1e-6})["optimizer"]
    assert config == {
        "optimizer": "adam", "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-6, "lr": 0.04,
        "min_lr": 0.01, "weight_decay": 0.3, "clip_grad": 0.7, "bf16": precision == "bf16",
        "params_dtype": torch.float16, "use_distributed_optimizer": bool(zero),
        "overlap_param_gather": overlaps and bool(zero)}
    assert others == {"use_gloo_process_groups": False}
    keys = {change["wd_mult"] if "wd_mult" in change else change["max_lr"]: (key, change)
            for key, change in overrides.items()}
    assert [change for _, change in keys.values()] == [
        {"wd_mult": 0.0}, {"max_lr": 0.125, "min_lr": 0.03125}]
    own, usual = (SimpleNamespace(own_decay=own, peak=Peak(0.5, 0.25 * own)) for own in (1, 0))
    for key, _ in keys.values():
        assert key.predicate.fn(own) and not key.predicate.fn(usual)


@pytest.mark.parametrize(("layout", "virtual"), [
    ({"tensor": 2, "pipeline": 4, "timeout": 90}, None),
    ({"pipeline": 2, "interleave": 2, "timeout": 600}, 2)], ids=["plain", "interleaved"])
@pytest.mark.parametrize("world", [1, 8])
def test_the_whole_of_what_makes_process_groups(recipe, monkeypatch, world, layout, virtual):
    from megatron.core import parallel_state, tensor_parallel

    seen, store = {}, joining.dist.HashStore()
    monkeypatch.setattr(joining, "_rendezvous", lambda ranks, seconds:
                        seen.update(rendezvous=(ranks.rank, seconds)) or store)
    monkeypatch.setattr(joining.startup_check, "check_in", lambda rank, world, store, device, secs:
                        seen.update(checked=(rank, world, device.type, secs)) or "")
    monkeypatch.setattr(joining.dist, "init_process_group", lambda backend, **others:
                        others.pop("store") and seen.update(joined=(backend, others)))
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda *degrees, **others:
                        seen.update(degrees=degrees, groups=others))
    monkeypatch.setattr(tensor_parallel, "model_parallel_cuda_manual_seed",
                        lambda seed: seen.update(seed=seed))
    made = recipe(parallel=layout, seed=31, fault_tolerance={"join_seconds": 77},
                  model={"layers": 4})
    joining.init_distributed(Ranks(world // 2, world, 0, "test"), made)
    joined = {"rank": world // 2, "world_size": world,
              "timeout": timedelta(seconds=layout["timeout"])}
    apart = {"rendezvous": (4, 77), "checked": (4, 8, "cpu", 77)} if world > 1 else {}
    assert seen == {
        **apart, "joined": ("gloo", joined), "seed": 31,
        "degrees": (layout.get("tensor", 1), layout["pipeline"]),
        "groups": {"virtual_pipeline_model_parallel_size": virtual,
                   "distributed_timeout_minutes": layout["timeout"] // 60,
                   "create_gloo_process_groups": False}}


@pytest.fixture
def begun(recipe, monkeypatch):
    """A Megatron engine of so many chunks on a rank of these stages, whose parts are stood in
    for."""
    def begin(chunks: int, overlaps: bool, first: bool = True, last: bool = True, tensor: int = 0,
              **sections) -> MegatronEngine:
        replace, group = partial(monkeypatch.setattr, megatron), partial(
            monkeypatch.setattr, megatron.ps)
        models = [SimpleNamespace(config=SimpleNamespace(), number=n) for n in range(chunks)]
        replace("build_model", lambda recipe, plan, weights: models)
        replace("_overlaps", lambda recipe, device: overlaps)
        replace("_data_parallel", lambda recipe, model, overlaps, first: SimpleNamespace(
            no_sync=("no sync", model.number, first), start_grad_sync=("sync", overlaps)))
        replace("_optimizer", lambda *_: SimpleNamespace(scale_loss="scale"))
        replace("OptimizerState", lambda optimizer, models, recipe: (models, recipe))
        monkeypatch.setattr(megatron.common, "make_scheduler", lambda *parts: parts)
        monkeypatch.setattr(megatron.common, "correct_newborn", lambda engine: None)
        for name, value in (("get_data_parallel_rank", 3), ("is_pipeline_first_stage", first),
                            ("is_pipeline_last_stage", last),
                            ("get_tensor_model_parallel_rank", tensor)):
            group(name, lambda value=value: value)
        made = recipe(**sections)
        engine = MegatronEngine(made, Plan.of(made), torch.device("cpu"))
        assert engine.state == (models, made) and engine.data_parallel_rank == 3
        assert engine.scheduler == (made, engine.optimizer) and engine.optimizer_steps == 0
        return engine
    return begin


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("overlaps", [False, True])
def test_the_whole_of_what_schedules_find_in_the_configuration(begun, chunks, overlaps):
    """One function for one chunk, and a list of them for several: Megatron-Core takes no other."""
    stops = [("no sync", number, number == 0) for number in range(chunks)]
    starts = [("sync", True)] * chunks
    one = chunks == 1
    assert vars(begun(chunks, overlaps).config) == {
        "finalize_model_grads_func": megatron.finalize_model_grads, "grad_scale_func": "scale",
        **({"no_sync_func": stops[0] if one else stops,
            "grad_sync_func": starts[0] if one else starts} if overlaps else {})}


@pytest.mark.parametrize(("first", "last", "reset", "reads"), [
    (True, False, False, True), (False, True, False, True), (False, False, False, False),
    (False, False, True, True), (True, True, False, True)])
@pytest.mark.parametrize("tensor", [0, 1])
def test_which_ranks_read_and_which_report(begun, first, last, reset, reads, tensor):
    """Between the first stage and the last, document boundaries alone are read."""
    engine = begun(1, False, first, last, tensor, data={"reset_attention": reset})
    assert engine.needs_batches == reads and engine._reports == (last and tensor == 0)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("reports", [False, True])
@pytest.mark.parametrize(("recompute", "forward_only"), [("none", False), ("full", True)])
def test_the_whole_of_what_a_schedule_is_handed(recipe, monkeypatch, chunks, reports, recompute,
                                                forward_only):
    made, seen, expanded = recipe(train={"recompute": recompute}), {}, []
    engine = SimpleNamespace(recipe=made, device=torch.device("cpu"), models=[7, 8][:chunks],
                             chunks=["a", "b"][:chunks], _reports=reports)
    losses = [{"loss": torch.tensor(loss)} for loss in (1.0, 2.0, 6.0)]
    monkeypatch.setattr(megatron, "get_forward_backward_func", lambda: (
        lambda **settings: seen.update(settings) or losses))
    monkeypatch.setattr(megatron, "expanded", lambda model, at_once: (
        expanded.append((model, at_once)) or nullcontext()))
    loss = MegatronEngine._run(engine, ["one", "two"], forward_only)
    assert loss == (3.0 if reports else 0.0)
    assert expanded == [(model, recompute == "full") for model in engine.models]
    batches, step = seen.pop("data_iterator"), seen.pop("forward_step_func")
    for batch in [batches] if chunks == 1 else batches:  # each chunk reads all micro-batches
        assert list(batch) == ["one", "two"]
    assert (step.func, step.args, step.keywords) == (megatron._forward_step, (engine.device,), {})
    assert seen == {"model": "a" if chunks == 1 else ["a", "b"], "num_microbatches": 4,
                    "seq_length": 32, "micro_batch_size": 2, "forward_only": forward_only}


@pytest.mark.parametrize("tensor", [0, 1])
def test_the_whole_of_what_deepspeed_is_handed(recipe, monkeypatch, tensor):
    made, asked = recipe(engine="deepspeed", parallel={"tensor": 2, "zero_stage": 2}), []
    plan, replace = Plan.of(made), partial(monkeypatch.setattr, deepspeed)

    def note(name: str, gives):
        return lambda *parts, **settings: asked.append((name, *parts, settings)) or gives
    zero, adam = SimpleNamespace(optimizer="wrapper"), SimpleNamespace()
    state = SimpleNamespace(attach=note("attach", None))
    replace("_import_deepspeed", note("import", SimpleNamespace(
        initialize=note("initialize", (zero, "others")))))
    replace("_accepted_settings", note("settings", "accepted"))
    replace("build_model", note("model", ["model"]))
    replace("_sum_partial_gradients", note("sums", None))
    replace("guarded", note("guard", adam))
    replace("ZeroState", note("state", state))
    monkeypatch.setattr(deepspeed.common, "build_optimizer", note("optimizer", "plain"))
    monkeypatch.setattr(deepspeed.common, "make_scheduler", note("scheduler", "scheduler"))
    monkeypatch.setattr(deepspeed.common, "correct_newborn", note("newborn", None))
    monkeypatch.setattr(deepspeed.ps, "get_data_parallel_rank", lambda: 3)
    monkeypatch.setattr(deepspeed.ps, "get_tensor_model_parallel_rank", lambda: tensor)
    monkeypatch.setitem(sys.modules, "deepspeed.comm.comm", SimpleNamespace(cdb="backend"))
    engine = DeepSpeedEngine(made, plan, torch.device("cpu"), "weights")
    assert asked == [
        ("import", torch.device("cpu"), {}), ("settings", made, {}),
        ("model", made, plan, "weights", {}),
        ("sums", "model", 2, {}), ("optimizer", made, "model", {}), ("guard", "plain", {}),
        ("state", "model", made, {}),
        ("initialize", {"model": "model", "optimizer": adam, "mpu": ModelParallelUnit,
                        "config": "accepted", "dist_init_required": False}),
        ("attach", adam, "wrapper", {}), ("scheduler", made, adam, {}), ("newborn", engine, {})]
    assert (engine.zero, engine.backend, engine.scheduler) == (zero, "backend", "scheduler")
    assert (engine.data_parallel_rank, engine._reports) == (3, tensor == 0)


def test_deepspeed_asks_for_groups_by_kind():
    """Of each kind its own size, rank and group: tensor-parallel ranks are its model-parallel
    ones."""
    asked = {name: getattr(ModelParallelUnit, name) for name in vars(ModelParallelUnit)
             if name.startswith("get_")}
    kinds = {"model": "tensor_model_parallel", "tensor_model": "tensor_model_parallel",
             "data": "data_parallel"}
    assert {name: function.__name__ for name, function in asked.items()} == {
        f"get_{kind}_parallel_{what}": f"get_{theirs}_{what}" for kind, theirs in kinds.items()
        for what in ("world_size", "rank", "group")}
