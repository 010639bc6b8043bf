"""Text to select weights by is checked before weights are read, and cut as it should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_models import make_recipe, make_tokenizer

from megatron_spdf.convert.calibration import Calibration, check_text
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.source import open_weights
from megatron_spdf.data.preprocess.preprocess import preprocess


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Prefix of a data set of 1,001 tokens."""
    place = tmp_path_factory.mktemp("data")
    (place / "text.txt").write_text("0123456789" * 100)
    preprocess([place / "text.txt"], place / "text", make_tokenizer(), text_key="text",
               on_error="stop", progress=False)
    return str(place / "text")


def checked(asked: Calibration, tokenizer, **sections):
    return check_text(asked, make_recipe(**sections), tokenizer)


def test_sequences_lie_at_even_distances_and_the_last_tenth_is_held_out(data, tokenizer):
    text = checked(Calibration(data, samples=30), tokenizer)  # 100 sequences of 10 tokens
    assert text.calibrate.length == text.evaluate.length == 10
    assert text.calibrate.starts.tolist() == [i * 90 // 30 * 10 for i in range(30)]
    assert text.evaluate.starts.tolist() == list(range(900, 1000, 10))
    shorter = checked(Calibration(data, samples=5, length=6), tokenizer)  # 166 of them
    assert shorter.calibrate.starts.tolist() == [i * 30 * 6 for i in range(5)]
    assert shorter.evaluate.starts.tolist() == [(150 + i * 16 // 5) * 6 for i in range(5)]
    assert (shorter.evaluate.starts + 6 < 1001).all()


def test_other_text_is_evaluated_whole_and_nothing_is_held_out(data, tokenizer):
    text = checked(Calibration(data, data, samples=100), tokenizer)
    assert np.array_equal(text.calibrate.starts, np.arange(0, 1000, 10))
    assert np.array_equal(text.evaluate.starts, text.calibrate.starts)
    only = checked(Calibration(evaluate=data, samples=100), tokenizer)
    assert only.calibrate is None and len(only.evaluate.starts) == 100
    assert checked(Calibration(), tokenizer) is None


@pytest.mark.parametrize(("asked", "said"), [
    ({}, "holds 100 sequences of 10 tokens, the last 10 of them held out for the perplexity, and "
         "--calibration-samples=128 are more than the 90 there are; give fewer"),
    ({"length": 11}, "--sequence-length=11 is more than model.max_positions=10"),
    ({"evaluate": "nowhere"}, "data set nowhere has no file nowhere.bin"),
    ({"calibrate": "nowhere"}, "data set nowhere has no file nowhere.bin"),
])
def test_what_cannot_be_is_refused(data, tokenizer, asked, said):
    with pytest.raises(ValueError, match=said):
        checked(Calibration(**{"calibrate": data, **asked}), tokenizer)


def test_text_without_one_sequence_is_refused(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text("01234")
    preprocess([tmp_path / "text.txt"], tmp_path / "text", tokenizer, text_key="text",
               on_error="stop", progress=False)
    with pytest.raises(ValueError, match="holds 6 tokens, which is not one sequence of 10"):
        checked(Calibration(str(tmp_path / "text")), tokenizer)


def test_text_of_another_tokenizer_is_refused(data):
    other = make_tokenizer(merges=3)
    with pytest.raises(ValueError, match=f"was made with the tokenizer .* uses {other.sha256}"):
        checked(Calibration(data), other)


@pytest.mark.parametrize(("select", "sections", "said"), [
    ("wanda", {"sparsity": 0.5}, "select=wanda looks at the inputs of weights; give --calibration"),
    ("sparsegpt", {}, "select=sparsegpt has nothing to select: sparsity.level=0 "),
    ("magnitude", {}, "select=magnitude has nothing to select: sparsity.level=0 "),
    ("magnitude", {"stages": [{"share": 0.5, "sparsity": 0}, {"share": 0.5, "sparsity": 0.5}]},
     "select=magnitude has nothing to select"),
    ("wanda", {"sparsity": {"level": 0.5, "algorithm": "gmp", "update": {"every": 2}}},
     "sparsity.level=0.5 with algorithm=gmp begins with dense weights; set "
     "sparsity.update.initial to the share of the level"),
    ("magnitude", {"sparsity": {"level": 0.5, "algorithm": "acdc"}},
     "algorithm=acdc begins with dense weights; set sparsity.update.start=0, so that"),
    ("sparsegpt", {"sparsity": {"level": 0.5, "algorithm": "ste"}},
     "select=sparsegpt looks at the inputs of weights; give --calibration"),
    ("wnada", {"sparsity": 0.5}, "there is no selector 'wnada'; known: wanda, "),
])
def test_a_selector_without_what_it_needs_is_refused_before_weights_are_read(
        gpt2, tokenizer, tmp_path, monkeypatch, select, sections, said):
    source = open_weights(gpt2)
    monkeypatch.setattr(source, "weight", lambda name: pytest.fail("a weight was read"))
    with pytest.raises(ValueError, match=said):
        write_initial_checkpoint(source, make_recipe(**sections), tokenizer, tmp_path / "run",
                                 select)
    assert not Path(tmp_path / "run").exists()


def test_as_many_sequences_are_read_as_there_are(data, tokenizer):
    assert len(checked(Calibration(data, samples=90), tokenizer).calibrate.starts) == 90
    with pytest.raises(ValueError, match="samples=91 are more than the 90 there are"):
        checked(Calibration(data, samples=91), tokenizer)
    # 1,001 is 143 times 7, and the last of them has no label
    every = checked(Calibration(data, data, samples=142, length=7), tokenizer)
    assert np.array_equal(every.calibrate.starts, np.arange(0, 142 * 7, 7))
    with pytest.raises(ValueError, match="holds 142 sequences of 7 tokens, and .* than the 142"):
        checked(Calibration(data, data, samples=143, length=7), tokenizer)
    model = {"max_positions": 1001}
    text = checked(Calibration(evaluate=data, samples=1, length=1000), tokenizer, model=model)
    assert text.evaluate.starts.tolist() == [0]
    with pytest.raises(ValueError, match="holds 1,001 tokens, which is not one sequence of 1,001"):
        checked(Calibration(evaluate=data, samples=1, length=1001), tokenizer, model=model)
