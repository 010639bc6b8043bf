"""The least of text that does, and the most that is taken."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType

from megatron_spdf.data.indexed.index_file import _DTYPES
from megatron_spdf.data.preprocess.documents import sample_texts
from megatron_spdf.data.preprocess.encode import split_bounds
from megatron_spdf.data.pretraining.corpus import _check_sizes


def source(tokens: int) -> SimpleNamespace:
    return SimpleNamespace(tokens=tokens, prefix="text")


@pytest.mark.parametrize(("train", "valid", "said"), [
    (17, [], None), (16, [], "text holds 16 tokens, which is not one sequence"),
    (17, [8 * 16 + 1], None), (17, [8 * 16], "hold 7 sequences of 16 tokens, fewer than one batch"),
    (17, [4 * 16 + 1, 4 * 16 + 1], None), (17, [16], "text holds 16 tokens")])
def test_a_source_has_a_sequence_and_its_label_and_validation_a_batch(recipe, train, valid, said):
    made = recipe(train={"sequence_length": 16, "global_batch": 8, "micro_batch": 1})
    if said is None:
        _check_sizes(made, [source(train)], [source(n) for n in valid])
    else:
        with pytest.raises(ValueError, match=said):
            _check_sizes(made, [source(train)], [source(n) for n in valid])


@pytest.mark.parametrize(("size", "taken"), [(10, ["aaaaa", "ccccc"]),
                                             (11, ["aaaaa", "ccccc", "ddddd"]),
                                             (12, ["aaaaa", "bbbbb", "ccccc"])])
def test_of_every_file_as_much_text_is_taken_as_is_its_share(tmp_path, size, taken):
    """Five bytes of each of two files; a byte more is the second one's, two are one of each."""
    for name, texts in (("1", "ab"), ("2", "cd")):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{t * 5}"}}\n' for t in texts))
    paths = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    assert list(sample_texts(paths, size, "text", "stop")) == taken


def test_codes_of_an_index_are_megatrons():
    assert {code: np.dtype(name) for code, name in _DTYPES.items()} == {
        each.value: np.dtype(DType.dtype_from_code(each.value)) for each in DType}


@pytest.mark.parametrize("shares", [[1], [1, 2, 3, 4], [0, 1, 1], [1, -1, 1], [1, float("nan")],
                                    [1, float("inf")], []])
def test_shares_that_are_no_split_are_refused(shares):
    with pytest.raises(ValueError, match=r"is not train,valid\[,test\]"):
        split_bounds(shares)


def test_a_split_may_have_nothing_but_training_data():
    assert split_bounds([1, 0]) == [2**64, 2**64]
    assert split_bounds([1, 0, 1]) == [2**63, 2**63, 2**64]
