"""Fixtures for runs on real ranks: a small corpus and recipes for it, as nested values."""

import copy
import sys
import sysconfig
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from harness import Ranks  # noqa: E402

SMALL = {
    "seed": 7,
    "model": {"layers": 2, "hidden": 64, "heads": 4, "vocab_size": 300, "max_positions": 32},
    "sparsity": 0.75,
    "data": {"workers": 0},
    "train": {"tokens": 8 * 32 * 60, "global_batch": 8, "micro_batch": 4, "precision": "fp32"},
    "optimizer": {"lr": 1e-3, "warmup_tokens": 1024},
    "evaluate": {"batches": 2},
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Prefix of a small data set of real text, with a byte-level BPE of 300 tokens."""
    from megatron_spdf.data.preprocess.preprocess import preprocess
    from megatron_spdf.data.tokenizers.tokenizer import train_tokenizer

    directory = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [str(library / f"{name}.py")
             for name in ("argparse", "ast", "calendar", "codecs", "datetime", "heapq")]
    texts = [Path(f).read_text() for f in files]
    inputs = []
    for file, text in zip(files, texts, strict=True):
        inputs.append(directory / f"{Path(file).stem}.txt")
        inputs[-1].write_text(text)
    tokenizer = train_tokenizer("bpe", texts, 300, directory / "tokenizer")
    preprocess(inputs, directory / "text", tokenizer, text_key="text", on_error="stop",
               progress=False)
    return str(directory / "text")


@pytest.fixture(scope="session")
def make_recipe(corpus):
    """A small recipe as nested values, with sections changed by keyword. Without `output` every
    call on ranks has a directory of its own."""
    def make(output: str | None = None, **sections) -> dict:
        recipe = copy.deepcopy(SMALL)
        recipe["data"] |= {"train": [corpus], "valid": [corpus]}
        recipe["output"] = output
        for name, change in sections.items():
            before = recipe.get(name, {})
            recipe[name] = (
                {**before, **change}
                if isinstance(change, dict) and isinstance(before, dict)
                else change
            )
        return recipe
    return make


@pytest.fixture(scope="session")
def make_deep_recipe(make_recipe):
    """The same with four layers, which two interleaved stages take."""
    def make(output: str | None = None, model: dict | None = None, **sections) -> dict:
        return make_recipe(output, model={"layers": 4, **(model or {})}, **sections)
    return make


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    """Number -> so many ranks, see harness.py; warm until the test file ends. They load what
    `PLUGINS` names in the test file."""
    with ExitStack() as stack:
        @cache
        def of(world: int, gpu: bool = False) -> Ranks:
            made = Ranks(world, tmp_path_factory.mktemp(f"{world}ranks"),
                         getattr(request.module, "PLUGINS", ""), gpu)
            stack.callback(made.stop)
            return made

        yield of
