"""Invariant 7: models of transformers become runs that compute the same at any layout. Checkpoints
of those runs become models of transformers and of Megatron-LM, and runs again."""

import json
import shutil
import sys
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import converted, resharded, through_megatron
from mup import MUP
from safetensors.torch import load_file, save_file

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.inspect import verify
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.checkpoint.run_metadata import stored_masks
from megatron_spdf.convert.huggingface_export import MASKS, WEIGHTS, export, in_memory
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.megatron_lm import MegatronReader, save_for_megatron
from megatron_spdf.convert.source import open_weights
from megatron_spdf.data.preprocess.preprocess import preprocess
from megatron_spdf.data.tokenizers.gpt2 import END_OF_TEXT, Gpt2Bpe
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from megatron_spdf.evaluation.sampling import Prompt, SamplingSettings, continue_text
from megatron_spdf.recipe.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from huggingface_models import logits_of, save_gpt2, shape_of  # noqa: E402

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of logits with a spread near 1: some hundred roundings of fp32
GREEDY = 6
LAYOUTS = {"tp1": {"data": 4}, "tp2": {"tensor": 2, "data": 2}, "pp2": {"pipeline": 2, "data": 2},
           "tp4": {"tensor": 4}}
# Converted, trained for two steps and saved: shape, sparsity, layout.
RUNS = {f"{level:.0%} {layout}": ("narrow", level, layout)
        for level, layouts in ((0.0, ("tp1", "tp2", "pp2")), (0.75, LAYOUTS)) for layout in layouts}
RUNS |= {"75% twelve heads": ("twelve heads of 64", 0.75, "tp4"),
         "75% mup": ("narrow", 0.75, "tp2"),
         "0% odd vocabulary": ("odd vocabulary", 0.0, "tp2")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("conversion")


@pytest.fixture(scope="module")
def data_of(place):
    """Prefix of a small data set of real text, by size of the vocabulary; 50257 is mostly tokens of
    two bytes."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [(library / f"{name}.py").read_text()
             for name in ("argparse", "ast", "calendar", "datetime")]

    def make(vocabulary: int) -> str:
        prefix = place / f"data{vocabulary}"
        if not prefix.with_suffix(".bin").exists():
            (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n"
                                                      for text in texts))
            tokenizer = wide_tokenizer(vocabulary) if vocabulary > 1000 else train_tokenizer(
                "bpe", texts, vocabulary, place / f"tokenizer{vocabulary}")
            preprocess([place / "text.jsonl"], prefix, tokenizer, text_key="text", on_error="stop",
                       progress=False)
        return str(prefix)
    return make


def wide_tokenizer(vocabulary: int) -> Gpt2Bpe:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: vocabulary - 257]
    ids = {token: i for i, token in enumerate([*letters, *(a + b for a, b in pairs), END_OF_TEXT])}
    merges = "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in pairs)]) + "\n"
    return Gpt2Bpe(json.dumps(ids).encode(), merges.encode())


@pytest.fixture(scope="module")
def make_run(place, data_of, make_recipe):
    """A run converted from a model of transformers, and its recipe; `how` goes to
    `write_initial_checkpoint`."""
    def make(name: str, shape: str, level: float, layout: str, **how) -> dict:
        model = shape_of(shape)
        recipe = make_recipe(
            str(place / name), model=model, sparsity=level, parallel=LAYOUTS[layout],
            data={"train": [data_of(model["vocab_size"])], "valid": [], "workers": 0},
            **(MUP if "mup" in name else {}),
            train={"tokens": 8 * model["max_positions"] * 60, "micro_batch": 2,
                   "sequence_length": model["max_positions"]})
        if not (place / shape).exists():
            save_gpt2(shape, place / shape)
        tokenizer = load_tokenizer(f"{data_of(model['vocab_size'])}.tokenizer")
        write_initial_checkpoint(open_weights(place / shape), Recipe.model_validate(recipe),
                                 tokenizer, place / name, **how)
        return recipe
    return make


def ids_of(shape: str) -> torch.Tensor:
    model = shape_of(shape)
    return torch.from_numpy(np.random.default_rng(0).integers(0, model["vocab_size"],
                                                              (2, model["max_positions"] // 2)))


@pytest.fixture(scope="module")
def conversion(ranks, make_run):
    """What the last rank, which is on the last pipeline stage, gives of a run of RUNS."""
    @cache
    def of(name: str) -> dict:
        shape, level, layout = RUNS[name]
        return ranks(4).run_all(converted, make_run(name, shape, level, layout), 2, ids_of(shape),
                                GREEDY if layout in ("tp2", "pp2") else 0)[-1]
    return of


@pytest.fixture(scope="module")
def magnitude(ranks, make_run):
    """What each rank gives of a run whose masks are the largest magnitudes."""
    recipe = make_run("magnitude one", "narrow", 0.75, "tp1", select="magnitude")
    return ranks(4).run_all(converted, recipe, 6, ids_of("narrow"))


def close(engine: torch.Tensor, transformers: torch.Tensor) -> bool:
    assert transformers.std() > 0.1
    return float((engine[..., : transformers.size(-1)] - transformers).abs().max()) <= TOLERANCE


def masked(place: Path, shape: str, run: Path) -> Path:
    """The model of transformers with the run's masks multiplied into its weights."""
    directory = place / f"{run.name} masked"
    shutil.copytree(place / shape, directory)
    export(CheckpointReader(run / "checkpoints" / store.name_of(0)),
           place / f"{run.name} exported", masks=True)
    weights, masks = load_file(directory / WEIGHTS), load_file(place / f"{run.name} exported"
                                                               / MASKS)
    save_file(weights | {n: weights[n] * mask for n, mask in masks.items()}, directory / WEIGHTS,
              {"format": "pt"})
    return directory


@pytest.mark.parametrize("name", RUNS)
def test_a_converted_run_computes_what_transformers_does(conversion, place, name):
    shape, level, _ = RUNS[name]
    found = conversion(name)
    assert (found["before"] - found["after"]).abs().max() > 0.01  # it was trained
    reference = masked(place, shape, place / name) if level else place / shape
    assert close(found["before"], logits_of(reference, ids_of(shape)))


@pytest.mark.parametrize("name", RUNS)
def test_a_trained_run_exports_what_the_engine_computes(conversion, place, name):
    shape, level, _ = RUNS[name]
    after = conversion(name)["after"]
    newest = find_checkpoint(place / name)
    assert newest.name == store.name_of(2)
    export(CheckpointReader(newest), place / f"{name} trained")
    assert close(after, logits_of(place / f"{name} trained", ids_of(shape)))
    blocks = {n: w for n,
              w in load_file(place / f"{name} trained" / WEIGHTS).items() if ".h." in n and w.ndim
              == 2}
    zeros = [float((w == 0).float().mean()) for w in blocks.values()]
    assert len(zeros) == 4 * shape_of(shape)["layers"] and zeros == pytest.approx(
        [level] * len(zeros), abs=1e-3
    )


@pytest.mark.parametrize("name",
                         [name for name, (_, _, layout) in RUNS.items()
                          if layout in ("tp2", "pp2")])
def test_greedy_text_is_that_of_transformers(conversion, place, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (shape, *_), found = RUNS[name], conversion(name)
    exported = place / f"{name} at step 0"
    export(CheckpointReader(place / name / "checkpoints" / store.name_of(0)), exported)
    prompt = ids_of(shape)[:1]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(exported),
        AutoTokenizer.from_pretrained(exported),
    )
    tokens = model.generate(prompt, do_sample=False, max_new_tokens=GREEDY, min_new_tokens=GREEDY)
    assert tokens.shape == (1, prompt.size(1) + GREEDY)
    assert tokenizer.decode(tokens[0]) == found["text"]
    pieces: list[str] = []  # and of tools/sample.py, from the run itself
    ours = in_memory(CheckpointReader(place / name / "checkpoints" / store.name_of(0)))
    continue_text(ours, load_tokenizer(exported), Prompt(prompt[0].tolist(), []),
                  SamplingSettings(GREEDY), pieces.append)
    assert tokenizer.decode(prompt[0]) + "".join(pieces) == found["text"]


@pytest.mark.parametrize("level", ["0%", "75%"])
def test_a_converted_run_trains_alike_at_every_layout(conversion, level):
    losses = {layout: [loss for loss, _ in conversion(f"{level} {layout}")["curve"]]
              for layout in LAYOUTS
              if f"{level} {layout}" in RUNS}
    for layout in losses:
        assert losses[layout] == pytest.approx(losses["tp1"], rel=1e-5), layout


def test_given_masks_survive_training_resuming_and_resharding(ranks, conversion, magnitude, place,
                                                              make_run):
    ids, pruned = ids_of("narrow"), make_run("magnitude two", "narrow", 0.75, "tp1",
                                             select="magnitude")
    again = pruned | {"parallel": {"tensor": 2, "pipeline": 2, "interleave": 2},
                      "output": str(place / "magnitude resharded")}
    pieces = [ranks(4).run_all(converted, pruned, 2, ids),
              ranks(4).run_all(converted, pruned | {"parallel": LAYOUTS["tp4"]}, 4, ids),
              ranks(4).run_all(resharded, pruned["output"], again, 6, ids)]
    straight = magnitude[-1]
    losses = [loss for piece in pieces for loss, _ in piece[-1]["curve"]]
    assert losses == pytest.approx([loss for loss, _ in straight["curve"]],
                                   rel=1e-5) and len(losses) == 6
    for piece in (magnitude, *pieces):
        held = {chunk: mask for there in piece for chunk, mask in there["masks"].items()}
        assert held == straight["masks"]  # all of them, on its one model-parallel rank
    assert straight["masks"] != conversion("75% tp1")["masks"]
    for run in ("magnitude two", "magnitude resharded"):
        reader = CheckpointReader(find_checkpoint(place / run), checksums=True)
        assert reader.masks == stored_masks("the largest magnitudes in each slice of the Hugging "
                                            "Face model narrow")
        assert (
            "16 masks" in verify(reader) and reader.run["origin"] == "the Hugging Face model narrow"
        )


def test_a_converted_run_is_recorded_like_one_that_the_engine_saved(conversion, place):
    conversion("75% tp2")
    begun, saved = (json.loads((place / "75% tp2" / "checkpoints" / store.name_of(step)
                                / store.RUN).read_text())
                    for step in (0, 2))
    assert begun.keys() == saved.keys() and begun["state"].keys() == saved["state"].keys()
    assert begun["masks"] == saved["masks"] and begun["versions"] == saved["versions"]


def test_the_kept_weights_are_the_largest_of_each_chunk(magnitude, place):
    """By sorting, in GPT-2's own layout: chunks are heads, or their share of the feed-forward
    layer."""
    weights = load_file(place / "narrow" / WEIGHTS)
    reference = masked(place, "narrow", place / "magnitude one")
    assert close(magnitude[-1]["before"], logits_of(reference, ids_of("narrow")))
    masks = load_file(place / "magnitude one exported" / MASKS)
    assert len(masks) == 16
    for name, mask in masks.items():
        magnitudes = weights[name].abs()  # (in, out)
        if "attn.c_attn" in name:  # (in, 3, heads, head)
            chunks = [(t.view(64, 3, 4, 16)[:, :, h].flatten()) for h in range(4)
                      for t in (magnitudes, mask)]
        else:
            axis = 1 if "c_fc" in name else 0
            chunks = [c.flatten()
                      for pair in zip(magnitudes.chunk(4, axis), mask.chunk(4, axis), strict=True)
                      for c in pair]
        for values, kept in zip(chunks[::2], chunks[1::2], strict=True):
            assert kept.sum() == kept.numel() // 4
            assert values[kept].min() >= values[~kept].max(), name


def test_plain_megatron_loads_what_is_written_for_it_and_is_read_back(ranks, conversion, place):
    conversion("0% tp1")
    ids, dense = ids_of("narrow"), CheckpointReader(place / "0% tp1" / "checkpoints"
                                                    / store.name_of(0))
    save_for_megatron(dense, place / "megatron", torch.float32)
    found = ranks(4).run_all(through_megatron, str(place / "megatron"),
                             str(place / "megatron saved"),
                             shape_of("narrow") | {"rows": 384}, ids)[-1]
    assert found.shape[-1] == 384
    assert close(found, logits_of(place / "narrow", ids))
    theirs = MegatronReader(place / "megatron saved", dense.model)
    assert theirs.path.name == "iter_0000005"
    for name in dense.weights:
        assert torch.equal(theirs.weight(name), dense.weight(name)), name
