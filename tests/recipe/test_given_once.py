"""A key is given once on a command line; where a script puts words together, the stronger one
overrules the weaker."""

from __future__ import annotations

import pytest

from megatron_spdf.command_line import make_parser
from megatron_spdf.recipe.words import (
    add_overrides,
    first_given,
    overruled_by,
    require_given_once,
    values_of,
)


@pytest.mark.parametrize(("words", "key"), [
    (["train.tokens=1M", "seed=3", "train.tokens=2M"], "train.tokens"),
    (["seed=3", "seed=3"], "seed"),
    (["sparsity=0.5", "sparsity.level=0.75"], "sparsity.level"),
    (["sparsity.rules=[{level: 0.5}]", "sparsity=0.75"], "sparsity.rules"),
    (["model={layers: 2, hidden: 64}", "model.hidden=32"], "model.hidden"),
    (["sparsity.update=null", "sparsity.update.every=100"], "sparsity.update.every"),
    (["data.blend=[{path: a, epochs: 1}]", "data={blend: []}"], "data.blend"),
    (["output='[a'", "output=[b"], "output"),
])
def test_a_key_in_two_words_is_refused_with_both(words, key, capsys):
    with pytest.raises(ValueError, match=f"^{key} is given twice, by ") as refused:
        require_given_once(words)
    assert words[0][:80] in str(refused.value) and words[-1][:80] in str(refused.value)
    parser = make_parser("x")
    add_overrides(parser)
    with pytest.raises(SystemExit) as ended:
        parser.parse_intermixed_args(words)
    assert ended.value.code == 2 and "; give it once" in capsys.readouterr().err


def test_words_of_one_section_are_no_such_words():
    words = ["sparsity=0.5", "sparsity.algorithm=rigl", "sparsity.update.every=100", "seed=1",
             "sparsity.seed=1", "data.train=a", "data.train_more=b", "model={layers: 2}",
             "model.hidden=32"]
    require_given_once(words)
    assert overruled_by(words, ["log.every=1"]) == [*words, "log.every=1"]


def test_the_stronger_word_is_left():
    assert overruled_by(["seed=1", "output=base", "log.every=2"], ["output=base/x", "seed=2"]) == [
        "log.every=2", "output=base/x", "seed=2"]
    part = overruled_by(["model={layers: 2, hidden: 64}"], ["model.hidden=32"])
    assert part == ["model.layers=2", "model.hidden=32"]
    require_given_once(overruled_by(["sparsity=0.5"], ["sparsity=0.75"]))


def test_what_a_word_gives_is_found_in_whatever_form():
    assert values_of("sparsity=0.5") == {"sparsity.level": 0.5, "sparsity.rules": []}
    assert first_given(["optimizer={lr: 1}"], {"optimizer.lr", "seed"}) == "optimizer.lr"
    assert first_given(["optimizer.lr_more=1"], {"optimizer.lr"}) == ""
