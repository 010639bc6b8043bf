"""Megatron-LM's checkpoints of the weights, against the names of core_v0.16.1;
tests/distributed/test_conversion.py holds both ways against megatron-core itself."""

import math
import pickle

import pytest
import torch
from small_models import MODEL

from megatron_spdf.architecture.gpt import Gpt
from megatron_spdf.checkpoint.reader import stored_name
from megatron_spdf.checkpoint.tensors import TensorFiles
from megatron_spdf.checkpoint.writer import StoredTensor, whole, write_tensors
from megatron_spdf.convert.megatron_lm import MegatronReader, save_for_megatron
from megatron_spdf.convert.source import open_weights

EMBEDDING = "embedding.word_embeddings.weight"
SHAPE = Gpt.model_validate(MODEL)


@pytest.fixture
def source(gpt2):
    return open_weights(gpt2)


@pytest.fixture
def saved(source, tmp_path):
    save_for_megatron(source, tmp_path / "megatron", torch.float32)
    return tmp_path / "megatron"


def rewrite(saved, directory, **changes):
    """The tensors of the release in another directory, some changed, left out (None) or new."""
    files = TensorFiles(saved / "release", objects=True)
    tensors = {name: files.tensor(name) for name in files.shapes} | changes
    directory.mkdir()
    write_tensors(directory,
                  [StoredTensor(name, tuple(t.shape), t.dtype, whole(tuple(t.shape)), lambda t=t: t)
                              for name, t in tensors.items() if t is not None])
    return directory


def test_names_and_shapes_are_those_of_megatron(source, saved):
    files = TensorFiles(saved / "release", objects=True)
    rows = source.weights[EMBEDDING].shape[0]
    assert files.shapes == {
        EMBEDDING: (rows, 12), "embedding.position_embeddings.weight": (10, 12),
        "decoder.final_layernorm.weight": (12,), "decoder.final_layernorm.bias": (12,),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 12),
        "decoder.layers.self_attention.linear_qkv.layer_norm_bias": (2, 12),
        "decoder.layers.self_attention.linear_qkv.weight": (2, 36, 12),
        "decoder.layers.self_attention.linear_qkv.bias": (2, 36),
        "decoder.layers.self_attention.linear_proj.weight": (2, 12, 12),
        "decoder.layers.self_attention.linear_proj.bias": (2, 12),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (2, 12),
        "decoder.layers.mlp.linear_fc1.layer_norm_bias": (2, 12),
        "decoder.layers.mlp.linear_fc1.weight": (2, 30, 12),
        "decoder.layers.mlp.linear_fc1.bias": (2, 30),
        "decoder.layers.mlp.linear_fc2.weight": (2, 12, 30),
        "decoder.layers.mlp.linear_fc2.bias": (2, 12)}
    index = pickle.loads((saved / "release" / ".metadata").read_bytes())
    extra = {name for name in index.state_dict_metadata if "_extra_state" in name}
    assert (
        len(extra) == 2 * 5 + 1 and "decoder.layers.mlp.linear_fc1._extra_state/shard_1_2" in extra
    )
    common = torch.load(saved / "release" / "common.pt", weights_only=True)
    assert common["checkpoint_version"] == 3.0 and "args" not in common
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "release"


def test_its_arguments_make_megatrons_model_of_these_shapes(source, saved):
    """Also its padding of the vocabulary: to a multiple of the argument and the tensor degree."""
    lines = (saved / "arguments.txt").read_text().splitlines()
    words = dict(line.split() for line in lines)
    rows = source.weights[EMBEDDING].shape[0]
    for tensor in (1, 2, 4):
        multiple = int(words["--make-vocab-size-divisible-by"]) // tensor * tensor
        assert math.ceil(259 / multiple) * multiple == rows == 384
    del words["--make-vocab-size-divisible-by"]
    assert words == {"--ckpt-format": "torch_dist", "--num-layers": "2", "--hidden-size": "12",
                     "--ffn-hidden-size": "30", "--num-attention-heads": "6",
                     "--max-position-embeddings": "10",
                     "--position-embedding-type": "learned_absolute"}


def test_what_was_written_is_read_back(source, saved):
    (saved / "release" / "common.pt").unlink()  # its pickled arguments are not needed
    reader = MegatronReader(saved, SHAPE)
    assert (
        reader.tokenizer is None and reader.origin == "the Megatron-LM checkpoint megatron/release"
    )
    assert all(torch.equal(reader.weight(name), source.weight(name)) for name in source.weights)


def test_layers_under_names_of_their_own_are_read_too(source, saved, tmp_path):
    directory = tmp_path / "iter_0000007"
    directory.mkdir()
    write_tensors(directory, [
        StoredTensor(stored_name(name), weight.shape, torch.float32, whole(weight.shape),
                     lambda name=name: source.weight(name)) for name,
        weight in source.weights.items()])
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    reader = MegatronReader(tmp_path, SHAPE)
    assert reader.path == directory
    assert all(torch.equal(reader.weight(name), source.weight(name)) for name in source.weights)


@pytest.mark.parametrize("rows", [259, 300, 384, 512])
def test_the_padding_of_the_vocabulary_may_differ(source, saved, tmp_path, rows):
    embedding = torch.randn(rows, 12)
    reader = MegatronReader(rewrite(saved, tmp_path / "padded", **{EMBEDDING: embedding}), SHAPE)
    ours = reader.weight(EMBEDDING)
    assert ours.shape == source.weights[EMBEDDING].shape and torch.equal(ours[:259],
                                                                         embedding[:259])
    assert torch.equal(ours[259:], embedding[:259].mean(0).expand(125, -1))


def test_padding_cannot_win_megatrons_softmax(source, tmp_path):
    """Ours is never trained, whatever it holds."""
    assert len(source.weights[EMBEDDING].shape) == 2 and source.weights[EMBEDDING].shape[0] > 259
    save_for_megatron(source, tmp_path / "out", torch.float32)
    embedding = TensorFiles(tmp_path / "out/release", objects=True).tensor(EMBEDDING)
    assert torch.equal(embedding[:259], source.weight(EMBEDDING)[:259])
    assert torch.equal(embedding[259:], embedding[:259].mean(0).expand(len(embedding) - 259, -1))


def test_the_tied_head_may_be_there(saved, tmp_path):
    head = TensorFiles(saved / "release", objects=True).tensor(EMBEDDING)
    optimizer = {"optimizer.state.exp_avg.decoder.final_layernorm.bias": torch.zeros(12)}
    MegatronReader(rewrite(saved, tmp_path / "tied", **{"output_layer.weight": head}, **optimizer),
                   SHAPE)
    with pytest.raises(ValueError,
                       match="has output_layer.weight, which the recipe's model has not"):
        MegatronReader(rewrite(saved, tmp_path / "untied", **{"output_layer.weight": head + 1}),
                       SHAPE)


def test_other_models_are_refused(saved, tmp_path):
    with pytest.raises(ValueError,
                       match=r"linear_fc1.weight is \(2, 30, 12\) there and \(2, 48, 12\) in the "
                             r"recipe's"):
        MegatronReader(saved, SHAPE.model_copy(update={"ffn_hidden": 48}))
    with pytest.raises(ValueError,
                       match=r"word_embeddings.weight is \(384, 12\) there and \(500, 12\) in the "
                             r"recipe"):
        MegatronReader(saved, SHAPE.model_copy(update={"vocab_size": 500}))
    with pytest.raises(ValueError,
                       match=r"word_embeddings.weight is \(384, 16\) there and \(259, 12\) in the "
                             r"recipe"):
        MegatronReader(rewrite(saved, tmp_path / "wider", **{EMBEDDING: torch.ones(384, 16)}),
                       SHAPE)
    with pytest.raises(ValueError,
                       match="has decoder.layers.self_attention.q_layernorm.weight, which"):
        MegatronReader(rewrite(saved, tmp_path / "more", **{
            "decoder.layers.self_attention.q_layernorm.weight": torch.ones(2, 4)}), SHAPE)
    with pytest.raises(ValueError,
                       match="no tensor embedding.position_embeddings.weight, which the recipe's "
                             "model"):
        MegatronReader(rewrite(saved, tmp_path / "rotary",
                               **{"embedding.position_embeddings.weight": None}), SHAPE)


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_other_directories_are_refused(saved, tmp_path):
    with pytest.raises(ValueError,
                       match="neither latest_checkpointed_iteration.txt nor .metadata.*mp_rank"):
        MegatronReader(tmp_path, SHAPE)
    with pytest.raises(ValueError,
                       match="make a run of it with tools/convert_checkpoint.py from-megatron"):
        open_weights(saved)
    (saved / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(ValueError,
                       match="names '12', but .*iter_0000012 is no distributed checkpoint"):
        MegatronReader(saved, SHAPE)
    (saved / "release" / ".metadata").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match="it wants 'builtins.print'"):
        MegatronReader(saved / "release", SHAPE)
