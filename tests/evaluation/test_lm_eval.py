"""tools/evaluate.py --harness: figures of a run equal those of lm-eval's own model on its export;
and --text: perplexity of files against transformers, one token at a time."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from byte_tokenizers import write_byte_tokenizer
from small_models import make_recipe, make_tokenizer, write_gpt2

from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.huggingface_export import export, in_memory
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.source import open_weights
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_spdf.evaluation import harness
from megatron_spdf.evaluation.token_likelihood import window_within, windows_of
from megatron_spdf.resilience.world import Ranks

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2,
         "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
         "intermediate_size": 24, "vocab_size": 300, "max_position_embeddings": 40,
         "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
         "hidden_act": "silu"}
TEXTS = ["The cat sat on the mat, and the dog sat on the cat; nobody sat on the dog.", "Ab", "ü 12",
         "x" * 81, "One line.\nAnother line.\n\nA third."]
TASKS = {
    "roll": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
             "metric_list": [{"metric": name} for name in (
                 "word_perplexity", "byte_perplexity", "bits_per_byte")]},
    "choose": {"output_type": "multiple_choice", "doc_to_text": "{{text[:20]}} ",
               "doc_to_choice": ["the cat", "a dog", "no", "\n"], "doc_to_target": 1,
               "num_fewshot": 1, "fewshot_split": "test",
               "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "say": {"output_type": "generate_until", "doc_to_text": "{{text[:9]}}", "doc_to_target": "a",
            "generation_kwargs": {"until": ["a"], "max_gen_toks": 7},
            "metric_list": [{"metric": "chrf"}]},
}


def bytes_with_begin(directory: Path) -> Tokenizer:
    """A tokenizer of bytes that puts <s> before texts, as Llama 3's does."""
    write_byte_tokenizer(directory, ["<unk>", "<s>", "</s>"], "<s>", "</s>", puts_begin=True)
    return load_tokenizer(directory)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def run(request, tmp_path_factory) -> Path:
    """A run of half of a model's weights, far from uniform."""
    place = tmp_path_factory.mktemp(request.param)
    if request.param == "gpt2":
        from small_models import gpt2_tensors

        tensors = gpt2_tensors()
        generator = torch.Generator().manual_seed(1)
        tensors["transformer.wpe.weight"] = torch.randn(40, 12, generator=generator)
        model = write_gpt2(place / "model", tensors, n_positions=40)
        for name, content in zip(("vocab.json", "merges.txt"), make_tokenizer()._files,
                                 strict=True):
            (model / name).write_bytes(content)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(2)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))
        for parameter in made.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        model = place / "model"
        made.save_pretrained(model)
        bytes_with_begin(model)
    source = open_weights(model)
    recipe = make_recipe(model=source.model.model_dump(), sparsity=0.5,
                         train={"precision": "fp32", "sequence_length": 32})
    write_initial_checkpoint(source, recipe, source.tokenizer, place / "run", "magnitude")
    return place / "run"


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """The tool; returns its exit code and what it printed."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    tool = importlib.import_module("evaluate")

    def call(*words) -> tuple[int, str]:
        try:
            code = tool.main(list(map(str, words)))
        except SystemExit as ended:  # of the parser
            code = ended.code
        said = capsys.readouterr()
        return code, said.out + said.err
    yield call
    sys.modules.pop("evaluate", None)  # transformers' package of that name may be imported yet


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Task files, with their data."""
    place = tmp_path_factory.mktemp("tasks")
    data = place / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, task in TASKS.items():
        (place / f"{name}.yaml").write_text(json.dumps({
            "task": name, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(data)},
                               "cache_dir": str(place / "cache")},
            "metadata": {"version": 1.0}, **task}))
    return place


@pytest.fixture
def lm_eval(monkeypatch):
    for package in ("lm_eval", "accelerate"):  # the second is for lm-eval's own model
        pytest.importorskip(package, reason="lm-eval is not installed: pip install 'lm_eval[hf]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("lm_eval")
def test_figures_of_a_run_are_those_of_lm_evals_model_on_its_export(run, tasks, evaluate, tmp_path):
    code, said = evaluate(run, "--harness", "roll,choose", tasks / "say.yaml", "--include", tasks)
    assert code == 0, said
    place = run / "evaluation" / "harness_roll_choose_say"
    found = json.loads((place / "scores.json").read_text())
    assert found["tasks"] == ["roll", "choose", str(tasks / "say.yaml")]
    assert "lm_eval" in found["versions"] and f"wrote {place}" in said
    export(CheckpointReader(find_checkpoint(run)), tmp_path / "exported")
    expected = theirs(tmp_path / "exported", tasks)
    scores = found["scores"]["all"]
    assert scores.keys() == expected.keys() and len(scores) == 6
    for name, value in expected.items():  # sums of float32 in another order
        assert scores[name] == pytest.approx(value, rel=2e-5), name
    assert "5 of 5 documents, 1 examples" in found["signatures"]["choose acc"]
    assert evaluate(run, "--harness", "roll,choose", tasks / "say.yaml", "--include",
                    tasks)[0] == 2  # what is there is kept


def theirs(exported: Path, tasks: Path) -> dict[str, float]:
    """What lm-eval says of a directory by its own model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(str(exported), device="cpu", batch_size=2)
    found = simple_evaluate(model, tasks=list(TASKS), log_samples=False, bootstrap_iters=0,
                            task_manager=TaskManager(include_path=str(tasks),
                                                     include_defaults=False))
    return {f"{task} {key.partition(',')[0]}": value for task, values in found["results"].items()
            for key, value in values.items() if "," in key and "_stderr" not in key}


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.parametrize(("words", "said"), [
    (["--harness", "no_such_task"], "--harness=no_such_task: no such task; give"),
    (["--harness", "no.yaml"], "--harness=no.yaml: no such file; give"),
    (["--harness", "roll", "--include", "/no/such/place"], "is no directory"),
    (["--harness", "{tasks}/bad.yaml"], "cannot be loaded (FileNotFoundError"),
    (["--harness", "{tasks}/roll.yaml", "--window", "41"], "more than the 40 tokens"),
    (["--harness", "{tasks}/roll.yaml", "--beams", "4"], "--beams is not of --harness"),
    (["--harness", "{tasks}/roll.yaml", "--task", "e2e"], "not allowed with argument"),
])
def test_what_cannot_be_is_refused_before_the_model_is_made(run, tasks, evaluate, monkeypatch,
                                                            words, said):
    monkeypatch.setattr(harness, "in_memory", lambda source: pytest.fail("the model was made"))
    bad = json.loads((tasks / "roll.yaml").read_text())
    bad["dataset_kwargs"]["data_files"]["test"] = "/no/such/file"
    (tasks / "bad.yaml").write_text(json.dumps(bad))
    code, printed = evaluate(run, *(word.format(tasks=tasks) for word in words))
    assert code == 2 and said in printed


def test_without_the_package_its_installation_is_named(run, evaluate, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    code, printed = evaluate(run, "--harness", "roll")
    assert code == 2 and "pip install lm_eval==0.4.13" in printed


def test_perplexity_of_texts_is_that_of_transformers(run, evaluate, tmp_path):
    lines, plain = tmp_path / "some.jsonl", tmp_path / "other.txt"
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS[1:]) + "no\n")
    plain.write_text(TEXTS[0])
    words = (run, "--text", lines, plain, "--text-key", "body", "--window", "16")
    code, said = evaluate(*words)
    assert code == 2 and "line 5" in said and "--on-error skip" in said
    code, said = evaluate(*words, "--on-error", "skip")
    assert code == 0, said
    place = run / "evaluation" / "text_some.jsonl_other.txt"
    found = json.loads((place / "scores.json").read_text())
    assert (found["skipped"], found["window"]) == (1, 16)
    source = CheckpointReader(find_checkpoint(run))
    model, tokenizer = in_memory(source), source.tokenizer
    assert tokenizer.decode([tokenizer.bod]) == ("<s>" if "llama" in str(run) else "<|endoftext|>")
    nats = tokens = 0
    for text in TEXTS:
        ids = [tokenizer.bod, *tokenizer.encode(text)]
        for place in range(1, len(ids)):
            begin = (place - 1) // 16 * 16  # of its window, which the last one fills up
            end = min(begin + 16, len(ids) - 1)
            context = ids[max(0, end - 16) : place]
            with torch.no_grad():
                logits = model(torch.tensor([context])).logits[0, -1].double()
            nats -= float(logits.log_softmax(-1)[ids[place]])
            tokens += 1
    size = sum(len(text.encode()) for text in TEXTS)
    scores = found["scores"]["all"]
    assert scores["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert f"of the {tokens:,} tokens, {size:,} bytes, of 5 documents" in said


@pytest.mark.parametrize("length", [0, 1, 4, 5, 8, 9, 30])
def test_every_token_of_a_text_is_a_label_once(length):
    ids = list(range(1, length + 1))
    windows = list(windows_of(ids, 0, 4))
    assert [token for tokens, start in windows for token in tokens[start:]] == ids
    for tokens, start in windows:
        assert 1 <= start < len(tokens) <= 5
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
    if length > 4:  # as much before the labels as the window holds
        assert {len(tokens) for tokens, _ in windows} == {5}


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.jsonl", '{"body": "x"}\n', "no key 'text'"), ("a.jsonl", "\n", "the file holds no record"),
    ("a.jsonl", '{"text": ""}\n', "no document in the inputs"),
    ("a.bin", "x", "no known format"), (None, "", "matches no file")])
def test_texts_that_cannot_be_read_are_refused_before_the_model_is_made(
        run, evaluate, monkeypatch, tmp_path, name, content, said):
    from megatron_spdf.evaluation import text_perplexity

    monkeypatch.setattr(text_perplexity, "in_memory", lambda _: pytest.fail("a model was made"))
    if name:
        (tmp_path / name).write_text(content)
    code, printed = evaluate(run, "--text", tmp_path / (name or "none.txt"), "--force")
    assert code == 2 and said in printed


class Documents:
    """A task of lm-eval as far as its examples and documents go."""

    def __init__(self, count: int, examples: int | None):
        self.eval_docs, self.settings = [None] * count, {"num_fewshot": examples}

    def get_config(self, key: str) -> int | None:
        return self.settings[key]

    def set_config(self, key: str, value: int) -> None:
        self.settings[key] = value

    def set_fewshot_seed(self, seed: int) -> None:
        self.settings["seed"] = seed


@pytest.mark.parametrize(("own", "asked", "examples"), [
    (None, None, 0), (5, None, 5), (5, 2, 2), (None, 2, 2), (0, 2, 0), (5, 0, 0)])
def test_a_task_has_the_examples_that_are_asked_for_unless_it_may_have_none(own, asked, examples):
    task = Documents(2, own)
    harness._prepare("it", task, Ranks(0, 1, 0, "python"), harness.HarnessSettings(examples=asked))
    assert task.settings == {"num_fewshot": examples, "seed": 1234}


@pytest.mark.parametrize(("documents", "limit", "world", "fit"), [
    (2, None, 2, True), (1, None, 2, False), (9, 2, 2, True), (9, 1, 2, False), (1, 9, 2, False)])
def test_every_rank_has_a_document(documents, limit, world, fit):
    def prepare() -> None:
        harness._prepare("it", Documents(documents, 0), Ranks(0, world, 0, "torchrun"),
                         harness.HarnessSettings(limit=limit))

    if fit:
        prepare()
    else:
        with pytest.raises(ValueError, match=r"the task it has 1 document to share between 2 "):
            prepare()


@pytest.mark.parametrize(("can", "asked", "most", "window"), [
    (8, 8, None, 8), (8, 7, 4, 7), (8, None, None, 8), (8, None, 4, 4), (4, None, 8, 4)])
def test_a_window_is_what_is_asked_for_up_to_all_that_a_model_reads(can, asked, most, window):
    assert window_within(can, asked, most) == window


def test_a_model_is_not_given_more_than_it_reads():
    with pytest.raises(ValueError, match="--window=9 is more than the 8 tokens that the model"):
        window_within(8, 9)
