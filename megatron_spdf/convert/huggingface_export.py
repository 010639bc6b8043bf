"""Weights as a Hugging Face model: an architecture of theirs, dense with zeros, no code of ours to
load it.

    AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import yaml
from torch import Tensor

from megatron_spdf.architecture.forms import Form
from megatron_spdf.checkpoint.reader import CheckpointReader
from megatron_spdf.checkpoint.run_metadata import INITIAL, describe_masks
from megatron_spdf.checkpoint.writer import with_progress
from megatron_spdf.convert.huggingface_import import CONFIG
from megatron_spdf.convert.source import WeightSource
from megatron_spdf.data.tokenizers.base import ENDS
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.files import atomic_directory, new_file, write_file, write_json
from megatron_spdf.sparsity.slices import join_slices

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WEIGHTS, MASKS, CARD = "model.safetensors", "masks.safetensors", "README.md"
INDEX = f"{WEIGHTS}.index.json"
SHARD_GB = 5.0  # of a file of weights, as transformers cuts them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FORMAT = {torch.float32: "F32", torch.bfloat16: "BF16", torch.bool: "BOOL"}  # safetensors' names
# Texts on which an exported SentencePiece model must give our ids: spaces, lines, bytes that are no
# pieces.
_PROBES = ("def f(x):\n\treturn f(x)  # naïve 漢字 \U0001f600   end", " hello  world ", "\n\n\n  a",
           "a b", "")


@dataclass(frozen=True)
class _Tensor:
    """One tensor of an exported file: its name and shape there, and how to obtain it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def export(source: WeightSource, output: Path, dtype: str = "fp32", masks: bool = False,
           shard_size: float = SHARD_GB) -> None:
    """Writes a directory that `transformers` loads; it appears complete or not at all.

    One weight at a time is dense in memory.

    Args:
        output: must not exist.
        dtype: "fp32" or "bf16", of the weights in the file.
        masks: also write masks.safetensors: name of a sparse weight -> bool of its shape, true
            where it is active.
        shard_size: most of a file of weights, 1e9 bytes; more go to several files and an index.

    Raises:
        ValueError: `output` exists, `shard_size` is not over 0, transformers' architecture or
            tokenizers cannot express ours, or masks are wanted of weights that have none.
        DamagedCheckpoint: a weight is missing or not what the recipe says.
    """
    _check(source, masks)
    if not shard_size > 0.0:
        raise ValueError(f"a file of at most {shard_size:g} GB holds no weights; give a shard size "
                         "over 0")
    _require_same_tensors(source)
    with atomic_directory(output) as partial_:
        _save_tokenizer(source, partial_)
        _save_config(source, dtype, partial_)
        write_file(partial_ / CARD, model_card(source, dtype, masks))
        _save_weights(_tensors(source), DTYPES[dtype], partial_, int(shard_size * 1e9))
        if masks:
            _save_tensors(_masks(source), torch.bool, partial_ / MASKS)


def _check(source: WeightSource, masks: bool) -> None:
    source.model.huggingface_config()  # which says what cannot be exported
    if source.tokenizer is None:
        raise ValueError(f"{source.path} has no tokenizer to export with the weights")
    if masks and not _plan(source):
        raise ValueError(f"{source.path} is dense and has no masks; leave out --masks")


def _require_same_tensors(source: WeightSource) -> None:
    """Refuses a family whose tensors are not those of the model that transformers makes of its
    configuration: of a file it passes over what it does not know, and draws what is missing."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(source, "fp32"))
    theirs = {name: tuple(value.shape) for name, value in model.named_parameters()}
    ours = {tensor.name: tuple(tensor.shape) for tensor in _tensors(source)}
    if wrong := [name for name in ours | theirs if ours.get(name) != theirs.get(name)]:
        name, family = wrong[0], source.model.name
        raise ValueError(
            f"model.architecture={family} cannot be exported: {name} is "
            f"{ours.get(name, 'nothing')} here and {theirs.get(name, 'nothing')} in transformers' "
            f"{type(model).__name__}"
            f"{f', as are {len(wrong) - 1} more' * (len(wrong) > 1)}; mend huggingface, "
            "huggingface_config or huggingface_form of that architecture")


def _plan(source: WeightSource) -> dict:
    return source.plan.weights if isinstance(source, CheckpointReader) else {}


def _tensors(source: WeightSource) -> list[_Tensor]:
    """All tensors of the exported model; a tied LM head is the embedding and not listed again."""
    return _forms(source, source.weights, source.weight)


def _masks(source: CheckpointReader) -> list[_Tensor]:
    """The masks in the form of the weights they are of."""
    def read(name: str) -> Tensor:
        planned = source.plan.weights[name]
        active = np.unpackbits(source.mask_bits(name), axis=1,
                               count=math.prod(planned.slice_shape)).astype(bool)
        if planned.algorithm.holds:  # stored, and yet zero
            held = np.unpackbits(source.held_bits(name), axis=1, count=planned.active_per_slice)
            active[active] = ~held.astype(bool).reshape(-1)
        return join_slices(torch.from_numpy(active), planned)

    return _forms(source, source.plan.weights, read)


def _forms(source: WeightSource, names: Iterable[str],
           read: Callable[[str], Tensor]) -> list[_Tensor]:
    """The tensors that transformers has for weights of these names, which are to be read in this
    order: so each weight is read once and let go of."""
    parts: list[Tensor] = []
    tensors = []
    for name in names:
        form = source.model.huggingface_form(source.weights[name])

        def part(name: str = name, form: Form = form) -> Tensor:
            parts[:] = parts or form.split(read(name))
            return parts.pop(0)

        tensors += [_Tensor(there, shape, part)
                    for there, shape in zip(form.names, form.shapes, strict=True)]
    return tensors


def _save_weights(tensors: list[_Tensor], dtype: torch.dtype, directory: Path,
                  limit: int) -> None:
    """Writes one file, or several of at most `limit` bytes and an index of them."""
    shards: list[list[_Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += size
    if len(shards) == 1:
        return _save_tensors(tensors, dtype, directory / WEIGHTS)
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save_tensors(shard, dtype, directory / name)
        places |= {tensor.name: name for tensor in shard}
    total = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _save_tensors(tensors: Sequence[_Tensor], dtype: torch.dtype, path: Path) -> None:
    """The safetensors format, written tensor by tensor; its library wants all of them in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {"dtype": _FORMAT[dtype], "shape": tensor.shape,
                               "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in with_progress(tensors, len(tensors)):
            values = tensor.read().to(dtype).contiguous()
            assert values.shape == tensor.shape, (tensor.name, values.shape, tensor.shape)
            file.write(values.view(torch.uint8).numpy().data)


def _save_tokenizer(source: WeightSource, directory: Path) -> None:
    tokenizer = source.tokenizer
    end = tokenizer.end_token
    tokenizer.save(directory)  # first, to an empty directory
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end,
              "bos_token": tokenizer.begin_token or end,
              "model_max_length": source.model.max_positions, "clean_up_tokenization_spaces": False}
    if tokenizer.kind == "gpt2-bpe":
        config |= {"tokenizer_class": "GPT2Tokenizer", "unk_token": end, "add_prefix_space": False}
    elif tokenizer.kind == "sentencepiece":
        config |= {"tokenizer_class": "LlamaTokenizer",
                   "add_bos_token": tokenizer.begin_token is not None,
                   "add_prefix_space": tokenizer.adds_blank}
    declared = {key: said for key, said in tokenizer.declared.items() if key != ENDS}
    write_json(directory / "tokenizer_config.json", config | declared)
    if tokenizer.kind == "sentencepiece":
        _compare_ids(tokenizer, directory)


def _compare_ids(tokenizer: Tokenizer, directory: Path) -> None:
    """Refuses a SentencePiece model (unigram, normalizing, ...) that `transformers` does not run as
    we do. Where a text is read with a blank before it, transformers puts none before a blank."""
    from transformers import AutoTokenizer, LlamaTokenizer

    exported = AutoTokenizer.from_pretrained(directory)
    assert isinstance(exported, LlamaTokenizer)
    for text in (text.lstrip(" ") if tokenizer.adds_blank else text for text in _PROBES):
        ours, theirs = tokenizer.encode(text), exported(text, add_special_tokens=False)["input_ids"]
        if ours != theirs:
            raise ValueError("this SentencePiece model cannot be exported: transformers' "
                             f"LlamaTokenizer gives {text!r} the ids {theirs[:8]}, and the model "
                             f"was trained with {ours[:8]}")


def _save_config(source: WeightSource, dtype: str, directory: Path) -> None:
    from transformers import GenerationConfig

    begin, ends, end = _begin_and_ends(source.tokenizer)
    _config(source, dtype).save_pretrained(directory)
    written = directory / CONFIG
    config = json.loads(written.read_text()) | source.model.huggingface_legacy()
    write_json(written, config)
    padding = list(range(source.tokenizer.vocab_size, source.model.vocab_size))
    GenerationConfig(bos_token_id=begin, eos_token_id=ends, pad_token_id=end,
                     suppress_tokens=padding or None).save_pretrained(directory)


def _begin_and_ends(tokenizer: Tokenizer) -> tuple[int, int | list[int], int]:
    """The ids that configurations name: of the beginning, of all ends, and of a document's."""
    ends = tokenizer.ends
    return tokenizer.prefix, ends if len(ends) > 1 else tokenizer.eod, tokenizer.eod


def _config(source: WeightSource, dtype: str) -> PretrainedConfig:
    from transformers import AutoConfig

    model = source.model
    begin, ends, _ = _begin_and_ends(source.tokenizer)
    return AutoConfig.for_model(model.huggingface, **model.huggingface_config(),
                                bos_token_id=begin, eos_token_id=ends,
                                dtype=DTYPES[dtype])


def in_memory(source: WeightSource) -> PreTrainedModel:
    """The model that `export` writes, in float32 and for inference, without a directory in between.

    Raises:
        ValueError: transformers cannot express the model, or it has no tokenizer.
        DamagedCheckpoint: a weight is missing or not what the recipe says.
    """
    from transformers import AutoModelForCausalLM

    _check(source, masks=False)
    model = AutoModelForCausalLM.from_config(_config(source, "fp32"))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for tensor in _tensors(source):
            parameters.pop(tensor.name).copy_(tensor.read())
    assert not parameters, f"not in the source: {sorted(parameters)}"
    return model.eval()


def model_card(source: WeightSource, dtype: str, masks: bool) -> str:
    """README.md of the exported model: what it is, how it was made, how to load it."""
    model, parameters = source.model, sum(w.numel for w in source.weights.values())
    head = "tied embeddings" if model.tied else "an LM head of its own"
    lines = [f"- Architecture: {model.title}, {head}, {parameters:,} parameters (counted with the "
             "padding of the vocabulary, which is cut off here)."]
    recipe = ""
    if isinstance(source, CheckpointReader):
        lines += _history(source)
        kept = source.recipe.model_dump(include={"seed", "model", "sparsity", "train", "optimizer"})
        recipe = f"\n## Recipe\n\n```yaml\n{yaml.safe_dump(kept, sort_keys=False).strip()}\n```\n"
    lines += [f"- Weights: {dtype}."]
    if masks:
        lines += [f"- Masks: `{MASKS}` holds a bool for every entry of every sparse weight, under "
                  "the weight's name and in its shape; true is active. "
                  f"`safetensors.torch.load_file(\"{MASKS}\")` reads it."]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{model.huggingface}, sparse]
---
# {model.title}, {model.layers} layers x {model.hidden}

Made with megatron_spdf (sparse pre-training, dense fine-tuning, https://arxiv.org/abs/2303.10464).

{chr(10).join(lines)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this directory")
tokenizer = AutoTokenizer.from_pretrained("this directory")
```
{recipe}"""


def _history(source: CheckpointReader) -> list[str]:
    run, plan, active = source.run, source.plan, source.active()
    kind = "moving" if source.masks["kind"] == "moved" else "static"
    sparsity = (
        f"{1 - active / max(1, plan.numel):.2%} of the {plan.numel:,} weights in "
        f"{len(plan.weights)} matrices of the blocks are exactly zero ({kind} masks, "
        f"{describe_masks(source.masks)}), so {active:,} of them are active. The weights are "
        "stored dense, zeros included"
        if plan.weights
        else "none, the model is dense"
    )
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return [
        f"- Sparsity: {sparsity}.",
        f"- Training: step {run['state']['step']:,}, {run['tokens']:,} tokens, in "
        f"{source.recipe.train.precision}; saved {run['saved']}, written by {versions}.",
        f"- Begun from: {run.get('origin', INITIAL)}.",
    ]
