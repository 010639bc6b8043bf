"""`sparsify` in anybody's PyTorch, against multiplied masks: optimizers, DDP, FSDP2, state_dict,
and back to dense."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from plain_cases import alone, batches, ddp, fsdp, make_model, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from megatron_spdf import densify, expanded, sparsify
from megatron_spdf.layers.compact import compact_of, sparse_modules

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}
PATTERNS = {"unstructured": {}, "tile": {"tile": 8, "slices": 2, "rules": {"head.*": 0.0}},
            "2:4": {"level": 0.5, "slices": 2, "rules": {"head.*": 0.0}}}
ALL = slice(None)


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Name of a sparse layer -> its mask."""
    return {name: compact_of(m)(torch.ones(compact_of(m).values_shape))
            for name, m in model.named_modules() if compact_of(m)}


class Multiplied(nn.Module):
    """A dense weight times its mask; so is its gradient."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.mask = mask

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask.to(weight.dtype)


def multiplied(model: nn.Module, dense: nn.Module) -> nn.Module:
    """The dense module with the masks of the sparse one multiplied in."""
    for name, mask in masks(model).items():
        layer = dense.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", Multiplied(mask.detach()))
    return dense


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.weight.detach() for name, m in model.named_modules()
            if isinstance(m, nn.Linear)}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_50_steps_equal_multiplied_masks(name, pattern):
    sparse = make_model(pattern=pattern, **PATTERNS[pattern])
    reference = multiplied(sparse, make_model(level=0))
    losses = [train(model, OPTIMIZERS[name], 50, ALL) for model in (sparse, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0][-1] < losses[0][0]
    for layer, weight in weights(reference).items():
        torch.testing.assert_close(weights(sparse)[layer], weight)


def test_bf16_equals_multiplied_masks_in_bf16():
    def run(model: nn.Module) -> Tensor:
        optimizer = torch.optim.SGD(model.bfloat16().parameters(), lr=0.1)
        for x in batches(5):
            optimizer.zero_grad()
            model(x.bfloat16()).float().square().mean().backward()
            optimizer.step()
        return model(batches(1)[0].bfloat16())

    sparse = make_model()
    reference = multiplied(sparse, make_model(level=0))
    found = run(sparse)
    assert found.dtype is torch.bfloat16 and torch.equal(found, run(reference))


def test_every_linear_layer_is_sparse_at_once():
    model = make_model()
    assert set(masks(model)) == {"head", *(f"layers.{i}.{part}" for i in (0, 1) for part in (
        "self_attn.out_proj", "linear1", "linear2"))}
    for layer, weight in weights(model).items():
        assert (weight == 0).double().mean() == 0.75, layer


def test_rules_decide_by_name_and_seeds_give_other_masks():
    model = make_model(rules={"head.weight": 0.0, "*.linear?.*": 0.9})
    zeros = {name: (w == 0).double().mean().item() for name, w in weights(model).items()}
    assert zeros["head"] == 0.0 and zeros["layers.0.self_attn.out_proj"] == 0.75
    assert zeros["layers.1.linear2"] == pytest.approx(0.9, abs=0.01)
    assert not torch.equal(masks(make_model(seed=1))["head"], masks(make_model())["head"])
    assert torch.equal(masks(make_model(seed=1))["head"], masks(make_model(seed=1))["head"])


def test_a_root_layer_is_cut_into_slices_of_whole_rows():
    for slices, shape in ((5, (5, 3)), (10, (5, 3)), (8, (1, 15))):
        layer = sparsify(nn.Linear(6, 5), 0.5, slices=slices)
        assert layer.parametrizations.weight.original.shape == shape


def test_a_weight_that_others_share_stays_dense():
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 8), "inner": nn.Linear(8, 8),
                           "head": nn.Linear(8, 16, bias=False)})
    model.head.weight = model.embedding.weight
    for name in ("embedding.weight", "head.weight"):  # known by either of its names
        with pytest.raises(ValueError, match="it matches only embeddings, .* which stay dense"):
            sparsify(model, 0.5, rules={name: 0.75})
    sparsify(model, 0.5)
    assert set(masks(model)) == {"inner"} and model.head.weight is model.embedding.weight


def test_parametrizations_of_others_are_left_alone():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    assert list(sparse_modules(model)) == [] and densify(model) is model
    assert hasattr(model[0], "parametrizations")
    with pytest.raises(ValueError, match=r"0\.weight has a parametrization already; call densify"):
        sparsify(model, 0.5)


@pytest.mark.parametrize("settings, said", [
    ({"level": 1.0}, "sparsify: level=1.0: input should be less than 1"),
    ({"pattern": "tiles"}, "there is no pattern 'tiles'; known: tile, "),
    ({"pattern": "tile", "tlie": 8}, r"unknown key tlie \(value 8\); did you mean tile\?"),
    ({"pattern": "tile", "tile": 48}, r"sparsity.tile=48 on .* tiles must divide both axes"),
    ({"pattern": "2:4"}, "level=0.75, and two of every four weights active are level 0.5"),
    ({"rules": {"nothing": 0.5}}, "'nothing' decides nothing: no weight has such a name"),
    ({"rules": {"*norm*": 0.5}}, "it matches only embeddings, norms or biases"),
    ({"algorithm": "rigl"}, "algorithm='rigl' is for runs of recipes"),
    ({"rules": {"*": 0.0}}, "no weight of this Decoder is made sparse")])
def test_bad_input_is_named(settings, said):
    model = make_model(level=0)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=said):
        sparsify(model, **{"level": 0.75, **settings})
    assert list(model.state_dict()) == before


def test_densified_modules_compute_the_same_with_all_parameters_back():
    model, x = make_model(), batches(1)[0]
    train(model, OPTIMIZERS["AdamW"], 3, ALL)
    before = model(x)
    assert densify(model) is model and torch.equal(model(x), before)
    assert model.state_dict().keys() == make_model(level=0).state_dict().keys()
    model.eval()(x)  # the layers' fused path, which reads weights itself
    model.train()(x).square().mean().backward()
    assert (model.head.weight.grad != 0).all()


def test_layers_that_are_evaluated_read_the_expanded_weight():
    model, x = make_model().eval(), batches(1)[0]
    with torch.no_grad():
        found = model(x)
        torch.testing.assert_close(found, densify(copy.deepcopy(model))(x))


def test_a_weight_is_expanded_once_in_a_context(monkeypatch):
    from megatron_spdf.kernels import dispatch

    model, xs, counted = make_model(), batches(3), []
    expand = dispatch.expand
    monkeypatch.setattr(dispatch, "expand",
                        lambda values, mask: counted.append(1) or expand(values, mask))
    with expanded(model):
        sum(model(x).square().mean() for x in xs).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert len(counted) == 7
    model.zero_grad()
    sum(model(x).square().mean() for x in xs).backward()
    assert len(counted) == 7 + 3 * 7
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def test_state_dict_has_the_size_of_the_active_weights(tmp_path):
    def of_linear_layers(model: nn.Module) -> int:
        state = {k: v for k, v in model.state_dict().items()
                 if any(part in k for part in ("linear", "out_proj", "head")) and "bias" not in k}
        torch.save(state, tmp_path / "state.pt")
        return sum(v.nbytes for v in state.values())

    sparse, dense = of_linear_layers(make_model()), of_linear_layers(make_model(level=0))
    assert sparse == dense * (0.25 + 1 / 32)  # fp32 values and a bit for each weight


def test_state_dict_loads_into_a_module_with_other_masks(tmp_path):
    model, other, x = make_model(), make_model(seed=5), batches(1)[0]
    train(model, OPTIMIZERS["Adam"], 3, ALL)
    assert not torch.equal(other(x), model(x))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(x), model(x))
    assert all(torch.equal(masks(other)[name], mask) for name, mask in masks(model).items())


def clear_one(bits: torch.Tensor) -> None:
    """Clears the first entry that is set in the last slice."""
    byte = int(bits[-1].nonzero()[0])
    bits[-1, byte] &= bits[-1, byte] - 1


@pytest.mark.parametrize("level", [0.5, 0.9, None], ids=["more", "fewer", "one fewer in a slice"])
def test_masks_that_are_no_such_masks_are_refused(level):
    state = make_model(**{} if level is None else {"level": level}).state_dict()
    given = {key: value.clone() for key, value in state.items() if "mask_bits" in key}
    if level is None:
        clear_one(next(iter(given.values())))
    with pytest.raises(ValueError, match="active entries in their masks instead of"):
        make_model().load_state_dict(given, strict=False)


def test_a_module_without_memory_is_filled_by_a_state_dict():
    model, x = make_model(), batches(1)[0]
    empty = copy.deepcopy(model).to("meta")
    assert empty(x.to("meta")).is_meta
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(x), model(x))


@pytest.mark.slow
def test_it_comes_without_any_engine():
    code = ("import sys, megatron_spdf; assert 'torch' not in sys.modules; "
            "from megatron_spdf import densify, expanded, sparsify; "
            "assert not {'megatron', 'deepspeed'} & sys.modules.keys(); megatron_spdf.nothing")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True,
                          text=True, check=False, timeout=300)
    assert "module 'megatron_spdf' has no attribute 'nothing'" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [ddp, fsdp])
def test_two_ranks_come_to_the_weights_of_one(ranks, parallel):
    expected = ranks(1).run(alone)
    for there in ranks(2).run_all(parallel):
        assert there["state"].keys() == expected.keys()
        for key, value in expected.items():  # gradients of half batches are summed in another order
            torch.testing.assert_close(there["state"][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_ddp_broadcasts_no_mask(ranks):
    assert ranks(2).run(ddp)["broadcast"] == 0


@pytest.mark.slow
def test_a_shard_is_half_of_the_active_weights(ranks):
    there = ranks(2).run(fsdp)
    compact = {name: share for name, share in there["held"].items() if name.endswith(".original")}
    assert len(compact) == 7 and set(compact.values()) == {0.5}
    assert "is sharded over ranks; load the full state" in there["refused"]


@pytest.mark.slow
def test_what_sharded_modules_save_loads_into_whole_and_sharded_ones(ranks):
    trained, *others = ranks(2).run(fsdp)["outputs"]
    assert all(torch.equal(found, trained) for found in others)
