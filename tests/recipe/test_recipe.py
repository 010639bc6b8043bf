"""Recipes: the shipped ones are the paper's, the loader reads every written form, bad input says
what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_spdf.recipe.load import load_recipe, save_recipe
from megatron_spdf.recipe.recipe import Recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHIPPED = sorted(p for p in CONFIGS.rglob("*.yaml")
                 if p.parent.name not in ("continue", "finetune", "experiments"))

SMALL = {"layers": 12, "hidden": 768, "heads": 12, "ffn_hidden": 4 * 768}
XL = {"layers": 24, "hidden": 2048, "heads": 16, "ffn_hidden": 4 * 2048}
PAPER = {
    "gpt2_small": dict(shape=SMALL, batch=256, lr=6e-4, tokens=2_500_000_000, steps=4_768),
    "gpt3_xl": dict(shape=XL, batch=512, lr=2e-4, tokens=26_000_000_000, steps=24_796),
}
LEVELS = {"dense": 0.0, "s50": 0.5, "s75": 0.75}

TINY = """
output: run
model: {layers: 4, hidden: 64, heads: 4, vocab_size: 256, max_positions: 32}
train: {tokens: 2560, global_batch: 8, micro_batch: 2}
optimizer: {lr: 1.0e-3}
"""


@pytest.fixture
def write(tmp_path):
    """Writes a recipe file; returns its path."""
    def write_file(text: str = TINY, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path
    return write_file


def shipped(name: str) -> Recipe:
    return load_recipe(CONFIGS / "pretrain" / f"{name}.yaml")


def differences(one: Recipe, other: Recipe) -> set[str]:
    def leaves(values: dict, place: str = ""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{place}{key}.")
            else:
                yield f"{place}{key}", value
    there = dict(leaves(other.model_dump()))
    return {key for key, value in leaves(one.model_dump()) if there[key] != value}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipe_is_valid(path):
    assert load_recipe(path).steps > 0


def test_recipes_are_shipped():
    assert len(SHIPPED) >= 7


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", PAPER)
def test_recipe_is_the_papers(size, level):
    recipe, paper = shipped(f"{size}_{level}"), PAPER[size]
    assert recipe.model.model_dump(include=set(SMALL)) == paper["shape"]
    assert (recipe.model.vocab_size, recipe.model.max_positions,
            recipe.model.dropout) == (50257, 2048, 0.0)
    assert recipe.model.init_std == 0.02
    assert (recipe.sparsity.level, recipe.sparsity.rules) == (LEVELS[level], [])
    assert (recipe.train.global_batch, recipe.train.sequence_length) == (paper["batch"], 2048)
    assert (recipe.train.tokens, recipe.steps) == (paper["tokens"], paper["steps"])
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.min_lr_ratio, optimizer.decay) == (paper["lr"], 0.1, "cosine")
    assert optimizer.warmup_tokens == 375_000_000
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.1, 1.0)


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("level", ["s50", "s75"])
def test_sparse_and_dense_recipe_differ_in_sparsity_only(size, level):
    assert differences(shipped(f"{size}_{level}"),
                       shipped(f"{size}_dense")) == {"output", "sparsity.level"}


def test_the_two_sizes_differ_in_shape_batch_rate_length_and_layout_only():
    assert differences(shipped("gpt2_small_s75"), shipped("gpt3_xl_s75")) == {
        "output", "model.preset", *(f"model.{key}" for key in [*SMALL, "query_groups"]),
        "train.tokens", "train.global_batch", "train.micro_batch", "optimizer.lr", "parallel.data"}


def test_no_two_recipes_share_an_output():
    outputs = [load_recipe(path).output for path in SHIPPED]
    assert len(set(outputs)) == len(outputs)


def test_extends_is_a_chain_where_the_last_wins(write):
    write()
    write("extends: recipe.yaml\nseed: 1\noptimizer: {lr: 2.0e-3, beta2: 0.95}\n", "middle.yaml")
    recipe = load_recipe(write("extends: middle.yaml\nseed: 2\noptimizer: {beta2: 0.9}\n",
                               "last.yaml"))
    assert (recipe.seed, recipe.optimizer.lr, recipe.optimizer.beta2,
            recipe.model.layers) == (2, 2e-3, 0.9, 4)


def test_extends_is_relative_to_the_file_that_says_it(write, tmp_path):
    (tmp_path / "bases").mkdir()
    write(TINY, "bases/base.yaml")
    assert load_recipe(write("extends: bases/base.yaml\nseed: 5\n")).seed == 5


def test_circle_of_extends_is_refused(write):
    write("extends: b.yaml\n", "a.yaml")
    with pytest.raises(ValueError, match=r"a\.yaml -> b\.yaml; break the circle"):
        load_recipe(write("extends: a.yaml\n", "b.yaml").with_name("a.yaml"))


def test_override_wins_over_the_recipe(write):
    recipe = load_recipe(write(),
                         ["optimizer.lr=5e-4", "parallel.tensor=2", "log.tensorboard=false",
                          "output=b"])
    assert (recipe.optimizer.lr, recipe.parallel.tensor, recipe.log.tensorboard,
            recipe.output) == (5e-4, 2, False, "b")
    assert recipe.optimizer.beta1 == 0.9


def test_last_override_wins(write):
    assert load_recipe(write(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("text, tokens", [
    ("2.5B", 2_500_000_000), ("375M", 375_000_000), ("26b", 26_000_000_000), ("10k", 10_000),
    ("1T", 10**12), ("100_000", 100_000), ("2.5e9", 2_500_000_000), ('"2.5e9"', 2_500_000_000),
    ("2.5e+9", 2_500_000_000)])
def test_counts_are_read(write, text, tokens):
    found = load_recipe(write(), [f"train.tokens={text}"]).train.tokens
    assert found == tokens and type(found) is int


@pytest.mark.parametrize("text", ["2.5X", "B", "1.5", "many", ".inf", ".nan"])
def test_counts_that_are_none_are_refused(write, text):
    with pytest.raises(ValueError, match=r"train\.tokens="):
        load_recipe(write(), [f"train.tokens={text}"])


RULES = '[{weights: "*.mlp.*", level: 0.9}, {weights: "*", level: 0.5}]'


@pytest.mark.parametrize("form", ["sparsity: 0.75", "sparsity: {level: 0.75}", 'sparsity: "0.75"'])
@pytest.mark.parametrize("base", ["", "sparsity: 0.25\n", "sparsity: {seed: 3}\n"])
def test_sparsity_is_a_number_or_a_mapping(write, form, base):
    write(TINY + base)
    for recipe in (load_recipe(write(f"{TINY}{form}\n", "alone.yaml")),
                   load_recipe(write(f"extends: recipe.yaml\n{form}\n", "child.yaml")),
                   load_recipe(write(TINY + base), [form.replace(": ", "=", 1)])):
        assert (recipe.sparsity.level, recipe.sparsity.rules) == (0.75, [])


def test_sparsity_is_a_list_of_rules(write):
    for recipe in (load_recipe(write(f"{TINY}sparsity: {RULES}\n", "alone.yaml")),
                   load_recipe(write(), [f"sparsity={RULES}"])):
        assert [(r.weights, r.level) for r in recipe.sparsity.rules] == [("*.mlp.*", 0.9),
                                                                         ("*", 0.5)]
        assert recipe.sparsity.level == 0.0


def test_list_form_replaces_the_number_form(write):
    path = write(f"{TINY}sparsity: 0.75\n")
    with_seed = load_recipe(path, ["sparsity.seed=7"]).sparsity
    with_rules = load_recipe(path, [f"sparsity={RULES}"]).sparsity
    assert (with_seed.level, with_seed.seed) == (0.75, 7)
    assert (with_rules.level, len(with_rules.rules)) == (0.0, 2)


def test_number_form_replaces_rules_and_mapping_form_keeps_them(write):
    path = write(f"{TINY}sparsity: {{level: 0.25, rules: {RULES}, seed: 7}}\n")
    number = load_recipe(path, ["sparsity=0.5"]).sparsity
    mapping = load_recipe(path, ["sparsity.level=0.5"]).sparsity
    assert (number.level, len(number.rules), number.seed) == (0.5, 0, 7)
    assert (mapping.level, len(mapping.rules), mapping.seed) == (0.5, 2, 7)
    assert load_recipe(path, ["sparsity=0.5"]).sparsity.level == 0.5
    assert load_recipe(path, ["sparsity.level=0.5"]).sparsity.level == 0.5


def test_saved_recipe_reads_back_equal(write, tmp_path):
    recipe = load_recipe(write(), [f"sparsity={RULES}", "data.train=a"])
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert differences(load_recipe(tmp_path / "saved.yaml"), recipe) == set()


BAD = {
    "misspelt section": (["modle.layers=3"], "modle", "did you mean model?"),
    "misspelt key": (["optimizer.lrr=1"], "optimizer.lrr", "(value 1)",
                     "did you mean optimizer.lr?"),
    "unknown key": (["parallel.zzz=1"], "parallel.zzz", "known: data, interleave"),
    "misspelt sparsity key": (["sparsity.lvel=0.4"], "sparsity.lvel",
                              "did you mean sparsity.level?"),
    "misspelt rule key": (["sparsity=[{weights: a, level: 0.5}, {weights: b, levle: 0.5}]"],
                          "sparsity.rules.1.levle", "did you mean sparsity.rules.1.level?"),
    "misspelt glob key": (["sparsity=[{wieghts: a, level: 0.5}]"],
                          "did you mean sparsity.rules.0.weights?"),
    "rule without level": (["sparsity=[{weights: a}]"], "sparsity.rules.0.level is missing",
                           "set it"),
    "all sparse": (["sparsity=1.0"], "sparsity.level=1.0", "less than 1"),
    "negative sparsity": (["sparsity=-0.1"], "sparsity.level=-0.1", "greater than or equal to 0"),
    "sparsity in words": (["sparsity=abc"], "sparsity.level='abc'", "valid number"),
    "rule all sparse": (["sparsity=[{weights: a, level: 1.0}]"], "sparsity.rules.0.level=1.0",
                        "less than 1"),
    "unknown preset": (["model.preset=gpt9"], "model.preset='gpt9'", "'gpt3_xl'"),
    "unknown architecture": (["model.architecture=gtp"], "model.architecture='gtp'",
                             "there is no architecture 'gtp'; known: gpt"),
    "misspelt key of an architecture": (["model.heds=4"], "model.heds",
                                        "did you mean model.heads?"),
    "key of other architectures": (
        ["model.rotary_base=1e4"], "unknown key model.rotary_base (value '1e4'); "
        "model.architecture=gpt has no such key, and llama, mistral, qwen2, qwen3"),
    "more ranks than query groups": (
        ["model.architecture=llama", "model.ffn_hidden=96", "model.query_groups=2",
         "parallel.tensor=4"], "tensor may be [1, 2], or with model.slices one of [1, 2, 4]"),
    "width not divisible by heads": (["model.hidden=66"], "model.hidden=66", "model.heads=4",
                                     "heads may be [1, 2, 3,"),
    "heads not divisible by TP": (["parallel.tensor=3"], "heads=4", "parallel.tensor=3",
                                  "tensor may be [1, 2, 4]"),
    "layers not divisible by PP": (["parallel.pipeline=3"], "model.layers=4", "3 x 1 = 3",
                                   "may be [1, 2, 4]"),
    "layers not divisible by PP x interleave": (
        ["parallel.pipeline=2", "parallel.interleave=3"], "model.layers=4", "2 x 3 = 6",
        "may be [1, 2, 4]"),
    "batch not divisible": (["parallel.data=3"], "train.global_batch=8", "2 x 3 = 6",
                            "may be 6 or 12"),
    "sequence too long": (["train.sequence_length=64"], "train.sequence_length=64",
                          "model.max_positions=32", "lower"),
    "interleave without pipeline": (["parallel.interleave=2"], "parallel.interleave=2",
                                    "parallel.pipeline > 1", "set"),
    "interleave with too few micro-batches": (
        ["parallel.pipeline=2", "parallel.interleave=2", "train.micro_batch=8"],
        "1 micro-batches", "parallel.pipeline=2", "change train.global_batch"),
    "sequence parallel without TP": (
        ["parallel.sequence=true"], "parallel.sequence=true", "parallel.tensor > 1",
        "set sequence=false"),
    "sequence not divisible by TP": (
        ["parallel.sequence=true", "parallel.tensor=2", "train.sequence_length=31"],
        "train.sequence_length=31", "parallel.tensor=2", "change one"),
    "warm-up longer than the run": (
        ["optimizer.warmup_tokens=1M"], "optimizer.warmup_tokens=1,000,000", "train.tokens=2,560",
        "shorten"),
    "warm-up as long as the run": (
        ["optimizer.warmup_tokens=2560"], "optimizer.warmup_tokens=2,560 is not under"),
    "share of no decay": (["optimizer.decay=constant", "optimizer.decay_share=0.2"],
                          "optimizer.decay_share=0.2", "optimizer.decay=constant", "leave out"),
    "share of no step": (["optimizer.decay_share=0.01"], "optimizer.decay_share=0.01 of 10 steps",
                         "raise it"),
    "decay before the warm-up's end": (
        ["optimizer.decay_share=0.9", "optimizer.warmup_tokens=512"], "optimizer.decay_share=0.9",
        "end at step 2", "lower the share"),
    "decay of no known shape": (["optimizer.decay=sqrt"], "optimizer.decay='sqrt'", "minus_sqrt"),
    "base of another width under density": (
        ["parametrization=density", "mup_base.input_multiplier=2"], "mup_base.input_multiplier=2",
        "parametrization=density", "parametrization=mup"),
    "boundaries in other kernels": (
        ["data.reset_attention=true", "kernels.attention=transformer_engine"],
        "data.reset_attention=true needs kernels.attention=sdpa", "transformer_engine"),
    "override without value": (["parallel.tensor"], "'parallel.tensor'", "section.key=value",
                               "parallel.tensor=2"),
    "override without name": (["=3"], "'=3'", "section.key=value", "parallel.tensor=2"),
    "override with a key of many parts": ([".".join("a" * 5000) + "=1"], "has over 64 parts"),
    "override that is not YAML": (["parallel.tensor=[1"], "parallel.tensor=[1"),
    "override that empties a section": (["train=null"], "train=None"),
    "override that empties sparsity": (["sparsity=null"], "sparsity"),
    "sparsity is yes or no": (["sparsity=true"], "sparsity"),
}


@pytest.mark.parametrize("overrides, parts", [(case[0], case[1:]) for case in BAD.values()],
                         ids=BAD)
def test_bad_value_is_named_with_rule_and_remedy(write, overrides, parts):
    with pytest.raises(ValueError) as caught:
        load_recipe(write(), overrides)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("text, parts", [
    ("- 1\n- 2\n", ["must be a mapping", "not a list"]),
    ("a: b: c\n", ["line 1: not YAML"]),
    ("\x00\x01", ["line 1: not YAML"]),
    ("seed: 1\nseed: 2\n", ["line 2: the key 'seed' is given twice"]),
    ("", ["output is missing", "model is missing", "set it in the recipe"]),
    ("model: 3\n", ["model=3"]),
    ("output: 010\n", ["line 1: some read 010 by base 8", "a text in quotes"]),
    ("output: yes\n", ["output=True", "write it in quotes"]),
    ("output: 2026-01-31\n", ["output=2026-01-31:", "write it in quotes"]),
    ("data: {train: no}\n", ["data.train.0=False", "write it in quotes"]),
    ("checkpoint: {keep_at: 4}\n", ["checkpoint.keep_at=4", "write it in brackets"]),
    ("checkpoint: {keep_at: [yes]}\n", ["checkpoint.keep_at=[True]", "true is none"]),
    ("output: s3://bucket/run\n", ["output='s3://bucket/run'", "only files of this machine"]),
    ("extends: nowhere.yaml\n", ["there is no recipe", "nowhere.yaml", "holds recipe.yaml"]),
    ("extends: [recipe.yaml]\n", ["extends"]),
], ids=["list", "not YAML", "control characters", "a key twice", "empty",
        "section is a number", "octal", "truth", "date", "truth in a list", "number for a list",
        "truth for a number", "address", "base missing", "base is a list"])
def test_bad_file_is_named_with_rule_and_remedy(write, text, parts):
    with pytest.raises(ValueError) as caught:
        load_recipe(write(text))
    for part in ["recipe.yaml", *parts]:
        assert part in str(caught.value)


def test_keys_of_an_algorithm_that_does_not_exist_are_not_held_against_the_user(write):
    with pytest.raises(ValueError) as caught:
        load_recipe(write("sparsity: {level: 0.5, algorithm: off, update: {every: 3}}\n"))
    assert "sparsity.algorithm=False" in str(caught.value)
    assert "sparsity.update" not in str(caught.value)


def test_binary_file_is_named(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"weights\.bin"):
        load_recipe(tmp_path / "weights.bin")


def test_missing_file_names_those_that_are_there(write, tmp_path):
    write(name="there.yaml")
    with pytest.raises(ValueError,
                       match=r"there is no recipe .*missing\.yaml; .* holds there\.yaml"):
        load_recipe(tmp_path / "missing.yaml")
    for place in (tmp_path / "nowhere" / "r.yaml", tmp_path / "there.yaml" / "r.yaml"):
        with pytest.raises(ValueError, match=r"there is no recipe .*r\.yaml; .* no \.yaml file"):
            load_recipe(place)


def test_all_broken_rules_are_reported_at_once(write):
    with pytest.raises(ValueError) as caught:
        load_recipe(write(), ["parallel.tensor=3", "parallel.data=3", "train.sequence_length=64"])
    for part in ("parallel.tensor=3", "train.global_batch=8", "train.sequence_length=64"):
        assert part in str(caught.value)


def test_all_bad_fields_are_reported_at_once(write):
    with pytest.raises(ValueError) as caught:
        load_recipe(write(), ["sparsity=1.0", "optimizer.lrr=3", "model.layers=many"])
    for part in ("sparsity.level=1.0", "optimizer.lrr", "model.layers='many'"):
        assert part in str(caught.value)


def test_override_that_an_error_advises_works(write):
    overrides = ["sparsity=[{weights: '*'}]"]
    with pytest.raises(ValueError) as caught:
        load_recipe(write(), overrides)
    for name in re.findall(r"as (\S+)=VALUE", str(caught.value)):
        load_recipe(write(), [*overrides, f"{name}=0.5"])


@pytest.mark.parametrize("world, words, data", [
    (8, [], 8), (8, ["parallel.tensor=4"], 2), (6, ["parallel.pipeline=3"], 2),
    (8, ["parallel.data=5"], 5), (1, [], 1)])
def test_data_parallel_auto_goes_by_the_world(write, world, words, data):
    path = write()
    assert load_recipe(path,
                       ["train.global_batch=120", "train.micro_batch=1", "model.layers=6",
                        "parallel.data=auto",
                              *words], world).parallel.data == data


def test_data_parallel_auto_that_does_not_divide_is_refused(write):
    with pytest.raises(ValueError,
                       match=r"6 processes do not make up whole replicas .* 4 x 1 = 4; start a "
                             r"multiple"):
        load_recipe(write(), ["parallel.data=auto", "parallel.tensor=4"], world=6)


@pytest.mark.parametrize("key", [
    "model.layers", "model.hidden", "model.heads", "model.query_groups", "model.ffn_hidden",
    "model.vocab_size", "model.max_positions", "seed", "sparsity.seed", "train.tokens",
    "train.global_batch", "train.micro_batch", "train.sequence_length", "parallel.tensor",
    "parallel.pipeline", "parallel.interleave", "parallel.data", "parallel.timeout",
    "evaluate.every", "evaluate.batches", "evaluate.patience", "checkpoint.every",
    "checkpoint.keep", "checkpoint.keep_every", "log.every", "log.ranks_every", "data.workers",
    "fault_tolerance.max_skipped", "fault_tolerance.max_starts", "fault_tolerance.hang_seconds",
    "optimizer.warmup_tokens"])
@pytest.mark.parametrize("value", [10**19, -1, "1e400", ".nan", ".inf"])
def test_counts_have_bounds(key, value):
    path = Path(__file__).parents[2] / "configs/pretrain/gpt_tiny.yaml"
    with pytest.raises(ValueError, match=key):
        load_recipe(path, [f"{key}={value}"])


def test_a_model_of_more_weights_than_any_is_refused():
    path = Path(__file__).parents[2] / "configs/pretrain/gpt_tiny.yaml"
    with pytest.raises(ValueError, match="make over 1.8e.16 weights; take fewer than 1e.15"):
        load_recipe(path, ["model.layers=2048", "model.hidden=1048576", "model.heads=16",
                           "model.ffn_hidden=3145728"])
