"""stories260K, a small trained Llama of A. Karpathy's tinyllamas (MIT), from llama2.c's form to
that of transformers."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHARED = Path(os.environ.get("SPDF_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
STORIES = SHARED / "stories260k"
NO_STORIES = "no stories260k in ../shared/data; SPDF_DATA names another place"
# What llama2.c's test expects of it, greedily: test_all.py.
TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She "
    "said, \"I want to play with your ball, but I can't find it.\"\nLily was sad and didn't know "
    "what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\nLily didn't want to "
    "help her mom, so she")


def write_stories(directory: Path) -> Path:
    """Writes it as transformers' LlamaForCausalLM, with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    content = (STORIES / "stories260K.bin").read_bytes()
    width, inner, layers, heads, groups, vocabulary, length = struct.unpack("<7i", content[:28])
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        max_position_embeddings=length, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 10000.0}, bos_token_id=1, eos_token_id=2))
    values, place = torch.from_numpy(np.frombuffer(content, np.float32, offset=28).copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        count = int(np.prod(shape))
        place += count
        return values[place - count:place].view(shape)

    def halves(rows: Tensor) -> Tensor:
        """Rows of W_Q or W_K from pairs (2i, 2i + 1) to (i, i + d/2), layer by layer."""
        head = width // heads
        pairs = rows.view(layers, -1, head // 2, 2, width)
        return pairs.transpose(2, 3).reshape(rows.shape)

    keys = width * groups // heads
    state = {"model.embed_tokens.weight": take(vocabulary, width)}
    stacked = {"input_layernorm": take(layers, width),
               "self_attn.q_proj": halves(take(layers, width, width)),
               "self_attn.k_proj": halves(take(layers, keys, width)),
               "self_attn.v_proj": take(layers, keys, width),
               "self_attn.o_proj": take(layers, width, width),
               "post_attention_layernorm": take(layers, width),
               "mlp.gate_proj": take(layers, inner, width),
               "mlp.down_proj": take(layers, width, inner),
               "mlp.up_proj": take(layers, inner, width)}
    state |= {f"model.layers.{i}.{name}.weight": rows[i]
              for name, rows in stacked.items() for i in range(layers)}
    state["model.norm.weight"] = take(width)
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    model.save_pretrained(directory)
    _write_tokenizer(directory)
    return directory


def _write_tokenizer(directory: Path) -> None:
    """tok512.bin as a SentencePiece model of BPE with bytes, as it was."""
    from sentencepiece import sentencepiece_model_pb2 as form

    content, place = (STORIES / "tok512.bin").read_bytes(), 4
    proto, kinds = form.ModelProto(), form.ModelProto.SentencePiece
    proto.trainer_spec.model_type = form.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    special = {0: ("<unk>", kinds.UNKNOWN), 1: ("<s>", kinds.CONTROL), 2: ("</s>", kinds.CONTROL)}
    for number in range(512):
        score, length = struct.unpack("<fi", content[place:place + 8])
        text = content[place + 8:place + 8 + length].decode()
        place += 8 + length
        name, kind = special.get(number, (text.replace(" ", "\u2581"), kinds.NORMAL))
        if number not in special and text.startswith("<0x") and len(text) == 6:
            kind = kinds.BYTE
        proto.pieces.add(piece=name, score=score, type=kind)
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "add_bos_token": True}))
