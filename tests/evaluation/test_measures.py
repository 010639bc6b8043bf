"""Distances, exponents, scores and the texts of an evaluation, by hand and by numpy."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import nn

from megatron_spdf.data.finetuning.task import TASKS, Example
from megatron_spdf.evaluation import (
    coordinate_check,
    evaluate,
    scores,
    subspace,
    text_perplexity,
)
from megatron_spdf.evaluation.coordinate_check import plot_sizes, scaling_exponents
from megatron_spdf.evaluation.decoding import Decoded, DecodingSettings, Likelihood
from megatron_spdf.evaluation.evaluate import Evaluated, _joined, scores_of
from megatron_spdf.evaluation.metrics import ngrams
from megatron_spdf.evaluation.metrics.metric import Figure, Unavailable, by_part
from megatron_spdf.evaluation.metrics.nist import _brevity
from megatron_spdf.evaluation.perplexity import (
    Validation,
    bits_per_byte,
    perplexity,
    validation_loss,
)
from megatron_spdf.evaluation.references import (
    References,
    in_official_form,
    read_references,
    write_official,
)
from megatron_spdf.evaluation.scores import Scores, _add
from megatron_spdf.evaluation.scores_file import describe, write_scores, write_texts
from megatron_spdf.evaluation.subspace import cosine_distance
from megatron_spdf.evaluation.text_perplexity import TextLikelihood, evaluate_text
from megatron_spdf.processes import ProcessDied
from megatron_spdf.resilience.world import Ranks

RANDOM = np.random.default_rng(3)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0])
def test_a_cosine_distance_is_numpys(scale):
    a = RANDOM.standard_normal((7, 5))
    b = 3.0 * (a + scale * RANDOM.standard_normal((7, 5)))
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    wanted = 2 * np.sin(np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))) ** 2
    assert cosine_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(wanted, rel=1e-9)
    assert cosine_distance(torch.tensor(a), torch.tensor(-b)) == pytest.approx(2 - wanted)


def test_a_cosine_distance_of_zeros():
    zero, one = torch.zeros(3), torch.tensor([0.0, 2.0, 0.0])
    assert cosine_distance(zero, zero) == 0.0
    assert cosine_distance(zero, one) == cosine_distance(one, zero) == 1.0
    assert cosine_distance(one, torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1.0)


class Source:
    """A model of two layers of two matrices."""

    def __init__(self, path: str, factor: float, **shape):
        self.path, self.model, self.factor, self.shape = path, self, factor, shape
        self.layers = 2

    def differences(self, other):
        return {k: (v, other.shape[k]) for k, v in self.shape.items() if other.shape[k] != v}

    def weight(self, name):
        raise NotImplementedError

    def matrices(self, weight, layer):
        base = torch.arange(1.0, 5.0)
        turned = base * torch.tensor([1.0, -1.0, 1.0, -1.0])
        yield "W_Q", base + (layer + 1) * self.factor * turned
        yield "W_O", base if layer else turned * (1 if self.factor else -1)


def test_distances_of_every_layer_and_matrix():
    before, after = Source("a", 0.0, hidden=4, vocab_size=9), Source("b", 0.5, hidden=4,
                                                                     vocab_size=8)
    found = subspace.distances(before, after)
    assert len(found) == 2 and list(found[0]) == ["W_Q", "W_O"]
    base, turned = np.arange(1.0, 5.0), np.arange(1.0, 5.0) * [1, -1, 1, -1]
    for layer in (0, 1):
        moved = base + (layer + 1) * 0.5 * turned
        cosine = base @ moved / np.linalg.norm(base) / np.linalg.norm(moved)
        assert found[layer]["W_Q"] == pytest.approx(1 - cosine)
    assert [row["W_O"] for row in found] == pytest.approx([2.0, 0.0])
    text = subspace.render(found).splitlines()
    mean = (found[0]["W_Q"] + found[1]["W_Q"]) / 2
    assert text[-1].split() == ["mean", f"{mean:.3e}", "1.000e+00"]
    assert text[-2].split()[0] == "1" and text[-3].split()[0] == "0"
    with pytest.raises(ValueError, match="a and b are different models: hidden is 4 and 8"):
        subspace.distances(before, Source("b", 0.5, hidden=8, vocab_size=9))


def test_a_heat_map_has_layers_along_x(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(subspace, "save_figure", lambda figure, path: drawn.append(figure))
    subspace.draw([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}, {"a": 5.0, "b": 6.0}],
                  tmp_path / "m.png", "title")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[1, 3, 5], [2, 4, 6]]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_xlabel() == "layer" and axes.get_title() == "title"
    assert not pyplot.get_fignums()


def test_exponents_are_the_slopes_of_numpy():
    scales = [64.0, 16.0, 24.0, 200.0]
    sizes = {s: {"a": s**-0.5 * f, "b": 3.0} for s, f in zip(scales, (1.0, 1.1, 0.9, 1.2),
                                                             strict=True)}
    found = scaling_exponents(sizes)
    slope = np.polyfit(np.log(scales), np.log([sizes[s]["a"] for s in scales]), 1)[0]
    assert found == {"a": pytest.approx(slope), "b": pytest.approx(0.0, abs=1e-12)}


class Tiny(nn.Module):
    """A decoder of one layer, of which attention gives a bias too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head_weight = nn.Identity(), torch.eye(3)

        class Biased(nn.Module):
            def forward(self, x):
                return -x, torch.full_like(x, 0.5)

        class NoBias(nn.Module):
            def forward(self, x):
                return 2 * x, None

        class Head(nn.Module):
            def forward(self, x, weight):
                return x @ weight.T, None

        layer = nn.Module()
        layer.self_attention, layer.mlp = Biased(), NoBias()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList([layer])
        self.decoder.final_layernorm, self.output_layer = nn.Identity(), Head()

    def forward(self, x):
        x = self.embedding(x)
        x = x + sum(self.decoder.layers[0].self_attention(x))
        x = x + self.decoder.layers[0].mlp(x)[0]
        return self.decoder.final_layernorm(x)


def test_sizes_are_means_of_what_parts_give_with_their_biases():
    """Of the logits only columns of tokens count."""
    model, x = Tiny(), torch.tensor([[1.0, -2.0, 6.0]])
    with coordinate_check._recorded(model, vocab_size=2) as sizes:
        model(x)
        model(2 * x)
    attention = [float((-factor * x + 0.5).abs().mean()) for factor in (1, 2)]
    assert sizes == {"embedding": [3.0, 6.0], "layer 0 attention": pytest.approx(attention),
                     "layer 0 mlp": [1.0, 1.0], "logits": [1.5, 1.5]}
    model(x)
    assert len(sizes["embedding"]) == 2  # no longer recorded


def test_a_coordinate_check_takes_the_first_steps_of_the_run(monkeypatch, recipe):
    """By their number, and by the tokens of the schedule, from which its learning rates follow."""
    made, model, taken, looked = recipe(model={"vocab_size": 250}), Tiny(), [], []
    recorded = coordinate_check._recorded
    monkeypatch.setattr(coordinate_check, "_recorded", lambda model, tokens: (
        looked.append(tokens), recorded(model, tokens))[1])

    def step(batch, number, tokens, stop_requested):
        model(batch)
        taken.append((number, tokens, stop_requested))

    def batches(first):
        return (torch.full((1, 3), float(n)) for n in range(first + 1, 9))

    for name, value in {"make_engine": SimpleNamespace(models=[model], step=step),
                        "TokenData": SimpleNamespace(training_batches=batches),
                        "check_corpus": None, "find_ranks": None, "init_distributed": None,
                        "destroy": None}.items():
        monkeypatch.setattr(coordinate_check, name, lambda *_, made=value, **__: made)
    found = coordinate_check.activation_sizes(made, 3)
    assert [sizes["embedding"] for sizes in found] == [1.0, 2.0, 3.0]
    assert taken == [(n, n * made.tokens_per_step, False) for n in (1, 2, 3)]
    assert looked == [250] and made.model.padded_vocab == 256  # rows that are no token


def test_sizes_are_plotted_against_scales(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(coordinate_check, "save_figure", lambda figure, path: drawn.append(figure))
    sizes = {4.0: {"a": 1.0, "b": 2.0}, 2.0: {"a": 3.0, "b": 4.0}}
    plot_sizes({"mup": {"width": sizes}, "standard": {"width": {2.0: {"c": 5.0}}}}, tmp_path / "p")
    first, second = drawn[0].axes
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in first.lines] == [
        ([2, 4], [3, 1]), ([2, 4], [4, 2])]
    assert (first.get_title(), second.get_title()) == ("mup, width", "standard, width")
    assert first.get_xscale() == first.get_yscale() == "log" and first.get_legend()


def test_perplexity_and_bits_per_byte():
    assert perplexity(2.0) == pytest.approx(math.e**2) and perplexity(0.0) == 1.0
    assert perplexity(709.0) == pytest.approx(math.exp(709.0))
    assert perplexity(710.0) is None and perplexity(float("nan")) is None
    assert perplexity(float("inf")) is None
    assert bits_per_byte(math.log(2), 0.25) == pytest.approx(0.25)
    losses = iter([(1.0, False), (4.0, False), (7.0, True)])
    engine = SimpleNamespace(evaluate=lambda batch, stop: next(losses))
    assert validation_loss(engine, [[], []], lambda: False) == (
        2.5, pytest.approx(1.5))
    assert validation_loss(engine, [[], []], lambda: False) is None
    for losses in ([2.0], [2.0, float("nan")], [2.0, math.inf]):  # no spread is known
        assert Validation.of(losses).standard_error is None


def test_shares_of_ranks_are_put_together():
    settings = DecodingSettings(beams=3)
    assert settings == DecodingSettings(3, 0.8, 4, 64, 32) and DecodingSettings().beams == 10
    shares = [(Likelihood(3.0, 2, 1), Decoded({1: "b"}, 5, 2.0, 1)),
              (Likelihood(4.5, 4, 1), Decoded({0: "a", 2: "c"}, 9, 4.04, 2))]
    found = _joined(shares, settings, torch.device("cpu"), "padding")
    assert found.predictions == ["a", "b", "c"] and found.padding == "padding"
    assert found.likelihood == Likelihood(7.5, 6, 1)
    assert found.facts == {"beams": 3, "length_penalty": 0.8, "no_repeat_ngram": 4,
                           "max_new_tokens": 64, "batch_size": 32, "inputs": 3, "ranks": 2,
                           "device": "cpu", "tokens": 14, "seconds": 4.0, "tokens_per_second": 3.5,
                           "truncated_prompts": 3}


EXAMPLES = [Example("a", ("x y z w", "y"), "p"), Example("b", ("v",), "q")]


@pytest.mark.parametrize(("nats", "value"), [(6.0, math.e**1.5), (4e4, None)])
def test_scores_have_the_perplexity_of_the_references(nats, value):
    evaluated = Evaluated(["x y z w", "u"], Likelihood(nats, 4), "2 rows are padding", {})
    found = scores_of("jsonl", EXAMPLES, evaluated)
    assert found.values["all"]["perplexity"] == (value and pytest.approx(value))
    assert found.signatures["perplexity"] == (
        "of the references' 4 tokens after context and end of document, in fp32; 2 rows are "
        "padding, but they are part of the softmax")
    assert ("perplexity" in found.missing) == (value is None)
    assert set(found.values) >= {"all", "p", "q"}
    bare = scores_of("jsonl", EXAMPLES, Evaluated(["x", "u"], Likelihood(1.0, 4), "", {}))
    assert bare.signatures["perplexity"].endswith("in fp32")
    some = scores_of("jsonl", EXAMPLES, Evaluated(["x", "u"], Likelihood(1.0, 4, 3), "", {}))
    assert some.signatures["perplexity"].endswith(
        "; 3 references that alone do not fit the window are left out")
    none = scores_of("jsonl", EXAMPLES, Evaluated(["x", "u"], Likelihood(0.0, 0, 3), "", {}))
    assert none.missing["perplexity"] == "no reference fits the window"


def test_a_figure_that_is_no_number_is_missing():
    found = Scores()
    _add(found, {"all": {"A": Figure(1.0, "how"), "B": Figure(math.nan, "why")},
                 "seen": {"A": Figure(math.inf, "how")}})
    assert found.values == {"all": {"A": 1.0}} and found.signatures == {"A": "how", "B": "why"}
    assert found.missing == {"B": "it is nan on the part 'all'",
                             "A": "it is inf on the part 'seen'"}


def test_scores_as_text():
    found = Scores({"all": {"A": 0.5, "B": 2e12}, "unseen": {"A": 0.25}, "seen": {"C": 3.0}},
                   {"A": "how"}, {"D": "no Java"}, 1200)
    lines = scores.render(found).splitlines()
    assert lines[0].split() == ["metric", "all", "seen", "unseen"]
    assert [line.split() for line in lines[2:5]] == [
        ["A", "0.500000", "-", "0.250000"], ["B", "2.000000e+12", "-", "-"],
        ["C", "-", "3.000000", "-"]]
    assert lines[5:] == ["D: missing (no Java)",
                         "1,200 inputs without a reference, not scored", "  A: how"]
    assert "999999999999.000000" in scores.render(Scores({"all": {"B": 999999999999.0}}))


def test_parts_are_scored_by_themselves_and_all_together():
    measure = by_part(lambda outputs, texts: {"N": Figure(len(outputs) + len(texts) / 10, "s")})
    refs = References((("a",), ("b",), ("c",)), ("q", "p", "q"))
    assert {k: v["N"].value for k, v in measure(["1", "2", "3"], refs).items()} == {
        "p": 1.1, "q": 2.2, "all": 3.3}
    alone = measure(["1", "2"], References((("a",), ("b",)), ("q", "q")))
    assert list(alone) == ["all"]


@pytest.mark.parametrize("count", [64, 65, 130])
def test_edits_of_many_inputs_are_summed_over_processes(monkeypatch, count):
    monkeypatch.setattr(ngrams, "map_in_processes", lambda edits, items, _: list(map(edits, items)))
    pieces, whole = [], ngrams._edits
    monkeypatch.setattr(ngrams, "_edits", lambda pairs: pieces.append(len(pairs)) or whole(pairs))
    outputs = [f"a b {i}" for i in range(count)]
    references = [[f"a c {i} {j}" for j in range(1 + i % 3)] for i in range(count)]
    edits, length, _ = ngrams.ter_edits(outputs, references)
    assert pieces == [64] * (count // 64) + [count % 64] * (count % 64 > 0)
    # c for b, and the last word, in every reference of four words
    assert (edits, length) == (2.0 * count, 4.0 * count)


def test_a_process_that_is_killed_leaves_the_other_figures(monkeypatch):
    def die(*_):
        raise ProcessDied("a process ended with exit code -9")

    monkeypatch.setattr(ngrams, "map_in_processes", die)
    with pytest.raises(Unavailable, match="exit code -9; if memory ran out, score where more is"):
        ngrams.ter_edits(["a b"] * 65, [["a c"]] * 65)


def test_the_penalty_of_short_outputs():
    assert _brevity(1.0) == _brevity(1.2) == 1.0 and _brevity(0.0) == 0.0
    assert _brevity(2 / 3) == pytest.approx(0.5) and _brevity(4 / 9) == pytest.approx(0.5**4)


def write(path, text):
    path.write_text(text)
    return path


def test_references_of_one_file_or_several(tmp_path):
    one = write(tmp_path / "one.txt", "a\nb\n\n\n")
    assert read_references("dart", [one]) == References((("a",), ("b",)), ("", ""), True)
    many = write(tmp_path / "many.txt", "a\n b \n\nc\n")
    assert read_references("scitldr", [many]).texts == (("a", "b"), ("c",))
    assert read_references("scitldr", [many]).official is False
    for i, text in ((10, "k\nl\n"), (0, "a\nb\n"), (2, "c\n\n")):
        write(tmp_path / f"reference{i}", text)
    wanted = (("a", "c", "k"), ("b", "l"))
    assert read_references("e2e", [tmp_path / "reference"]).texts == wanted
    both = [tmp_path / "reference0", tmp_path / "reference2"]
    assert read_references("e2e", both).texts == (("a", "c"), ("b",))
    with pytest.raises(ValueError, match="different numbers of lines: .'.*reference0': 2, "):
        read_references("e2e", [both[0], write(tmp_path / "one.txt", "a\n")])
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="different numbers of lines: .*reference0': 2, .*other/"):
        read_references("e2e", [both[0], write(tmp_path / "other/reference0", "a\n")])
    (tmp_path / "link").symlink_to("reference0")
    for again in (both[0], tmp_path / "./reference0", tmp_path / "link"):
        with pytest.raises(ValueError, match="are one file; name each once"):
            read_references("e2e", [*both, again])
    with pytest.raises(ValueError, match="input 2 has no reference; scoring needs"):
        read_references("e2e", [both[1], write(tmp_path / "two.txt", "x\n\n")])
    with pytest.raises(ValueError, match="has no reference at all"):
        read_references("e2e", [write(tmp_path / "none.txt", "\n")])


@pytest.mark.parametrize("task", ["jsonl", "squad", "cola", "stsb"])
@pytest.mark.parametrize("without", [{0}, {2}, {1, 4}, {5}])
def test_inputs_without_references_leave_the_others_with_their_own(task, without):
    texts = [f"{i}.5" if task == "stsb" else TASKS.get(task).labels[i % 2] if task == "cola"
             else f"the {word} fox runs over it" for i, word in enumerate("abcdef")]
    outputs = [*texts[:4], texts[0], texts[1]]
    refs = References(tuple(() if i in without else (text,) for i, text in enumerate(texts)),
                      ("p", "q") * 3)
    kept = [i for i in range(6) if i not in without]
    alone = scores.score(task, [outputs[i] for i in kept], refs.of(kept))
    found = scores.score(task, outputs, refs)
    assert found.values == alone.values and found.missing == alone.missing
    assert found.values["all"] and (found.left_out, alone.left_out) == (len(without), 0)


def test_some_inputs_of_references():
    refs = References((("a",), ("b",), ("c",)), ("p", "q", "r"), True)
    assert refs.of([2, 0]) == References((("c",), ("a",)), ("r", "p"), True)


@pytest.mark.parametrize("task", ["webnlg", "dart", "scitldr"])
def test_texts_are_written_as_official_scripts_read_them(tmp_path, task):
    known = TASKS.get(task)
    predictions, texts = ["Ab (c).", "d\ne"], (("X-y.", "z", "A B"), ("v w",))
    write_official(known, predictions, References(texts, ("", "")), tmp_path)
    assert (tmp_path / "predictions.txt").read_text() == "Ab (c).\nd e\n"
    if known.form is None:
        assert (tmp_path / "references.txt").read_text() == "X-y.\nz\nA B\n\nv w\n\n"
        return
    form = known.form
    lines = (tmp_path / "predictions.official.txt").read_text().splitlines()
    assert lines == [form.output(p) for p in predictions]
    count = min(3, form.most or 3)
    for i in range(count):
        assert (tmp_path / f"reference{i}").read_text().splitlines() == [
            form.reference(texts[0][i]), form.reference(texts[1][0]) if i == 0 else ""]
    assert not (tmp_path / f"reference{count}").exists()
    outputs, official = in_official_form(known, predictions, References(texts, ("", "")))
    assert official.official and outputs == lines
    # what is in their form already stays as it is
    assert in_official_form(known, outputs, official)[1] == official


@pytest.mark.parametrize("task, references, output, reference", [
    ("dart", ("A-b (C)",), "Ab (c).", "A-b (C)"),  # scored as they are
    ("webnlg", ("A-b (\u00bd)",), "Ab (c).", "A-b (\u00bd)"),  # files of another script
    ("webnlg", ("a - b",), "ab ( c ) .", "a - b"),
    ("e2e", ("A-b",), "Ab (c).", "A-b")])
def test_references_of_files_are_taken_as_they_are(task, references, output, reference):
    given = References((references,), ("",), official=True)
    assert in_official_form(TASKS.get(task), ["Ab (c)."], given) == ([output], given)
    assert given.texts == ((reference,),)


def test_the_file_of_scores_says_what_was_scored(tmp_path):
    found = describe("e2e", "test", Scores({"all": {"A": 1.0}}, {"A": "s"}, {"B": "w"}, 2), beams=3)
    assert {k: found[k] for k in ("task", "split", "beams", "scores", "missing", "signatures",
                                  "without_reference")} == {
        "task": "e2e", "split": "test", "beams": 3, "scores": {"all": {"A": 1.0}},
        "missing": {"B": "w"}, "signatures": {"A": "s"}, "without_reference": 2}
    assert {"torch", "sacrebleu", "megatron_spdf"} <= set(found["versions"])
    assert "without_reference" not in describe("e2e", "test", Scores())
    write_scores(tmp_path / "a" / "b", found)
    assert json.loads((tmp_path / "a/b/scores.json").read_text()) == found
    write_texts(tmp_path / "a/b", "scitldr", ["x", "y"], EXAMPLES)
    assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == [
        "inputs.txt", "predictions.txt", "references.txt"]
    assert (tmp_path / "a/b/inputs.txt").read_text().splitlines() == [
        example.context for example in EXAMPLES]


@pytest.fixture
def two_ranks(monkeypatch):
    """Runs a function as rank 1 and rank 0 of two, without processes; gives what both return."""
    sent = []

    def gather(share, shares):
        sent.append(share) if shares is None else shares.__setitem__(slice(None), [share, *sent])

    def run(function) -> tuple:
        sent.clear()
        other = function(Ranks(1, 2, 1, "torchrun"))
        return function(Ranks(0, 2, 0, "torchrun")), other

    for module in (evaluate, text_perplexity):
        monkeypatch.setattr(module.dist, "gather_object", gather)
        monkeypatch.setattr(module, "init_gloo", lambda ranks: torch.device("cpu"))
        monkeypatch.setattr(module, "in_memory", lambda source: nn.Identity())
        monkeypatch.setattr(module, "tokenizer_of", lambda source: "tokenizer")
    return run


def test_documents_are_read_together_up_to_so_many_characters(monkeypatch):
    monkeypatch.setattr(text_perplexity, "_TOGETHER", 10)
    texts = ["abcd", "efgh", "ij", "k", "l" * 30, "m", ""]
    assert list(text_perplexity._together(iter(texts))) == [texts[:3], texts[3:5], texts[5:]]
    assert not list(text_perplexity._together(iter([])))


def test_ranks_share_the_documents_and_rank_0_has_the_sum(two_ranks, monkeypatch):
    read = []

    def likelihood_of(model, tokenizer, texts, window):
        read.append((list(texts), window, tokenizer))
        size = sum(map(len, texts))
        return TextLikelihood(0.5 * size, size, 2 * size, len(texts))

    monkeypatch.setattr(text_perplexity, "likelihood_of", likelihood_of)
    texts = SimpleNamespace(read=lambda: iter(["a", "bb", "ccc", "dddd", "eeeee"]))
    found, other = two_ranks(lambda ranks: evaluate_text("source", texts, 8, ranks))
    assert read == [(["bb", "dddd"], 8, "tokenizer"), (["a", "ccc", "eeeee"], 8, "tokenizer")]
    assert other is None and found == TextLikelihood(7.5, 15, 30, 5)
    assert evaluate_text("source", texts, 8, Ranks(0, 1, 0, "python")) == found


def test_ranks_share_the_prompts_and_rank_0_has_all(two_ranks, monkeypatch):
    asked, settings = [], DecodingSettings(beams=2)

    def likelihood(model, tokenizer, pairs, rank, world, **given):
        asked.append((tokenizer, pairs, rank, world, given))
        return Likelihood(1.5, 2, 3)

    def decode(model, tokenizer, contexts, *given):
        asked.append((tokenizer, contexts, *given))
        return Decoded({given[1]: "ab"[given[1]]}, 4, 1.0, given[1])

    monkeypatch.setattr(evaluate, "likelihood", likelihood)
    monkeypatch.setattr(evaluate, "decode", decode)
    source = SimpleNamespace(model=SimpleNamespace(max_positions=99, vocab_size=5))
    monkeypatch.setattr(evaluate, "render_padding", lambda *given: repr(given))
    for task, end in (("cnn_dailymail", "end"), ("jsonl", "beginning")):
        found, other = two_ranks(lambda ranks, task=task: evaluate.evaluate(
            source, task, EXAMPLES, settings, ranks))
        pairs = [("a", "x y z w"), ("a", "y"), ("b", "v")]
        for rank in (1, 0):
            assert asked.pop(0) == ("tokenizer", pairs, rank, 2, {"loses": end})
            assert asked.pop(0) == ("tokenizer", ["a", "b"], settings, rank, 2, end)
        assert other is None and found.predictions == ["a", "b"]
        assert found.likelihood == Likelihood(3.0, 4, 3) and found.padding == "('tokenizer', 5)"
        assert (found.facts["tokens"], found.facts["truncated_prompts"]) == (8, 1)
