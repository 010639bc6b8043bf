"""The model that lm-eval asks: likelihoods and texts against plain forward passes, one token at a
time. Where lm-eval is not installed, stand-ins have what is used of it."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from huggingface_models import make_talkative_gpt2
from small_models import make_tokenizer

from megatron_spdf.resilience.world import Ranks

NAME = "megatron_spdf.evaluation.harness_model"
MOST, WINDOW = 48, 20  # tokens that the model can read, and that it is given
TOKENIZER = make_tokenizer(8)


class TemplateLM:
    """Stands in for lm-eval's base of models."""


def normalize_gen_kwargs(settings: dict, new: int) -> dict:
    found = {"until": [], "max_gen_toks": new, "temperature": 0.0, **settings}
    return {"do_sample": found["temperature"] > 0.0, **found}


def postprocess_generated_text(text: str, stops: list[str], _) -> str:
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


STAND_INS = {
    "lm_eval": {}, "lm_eval.api": {}, "lm_eval.models": {},
    "lm_eval.api.instance": {"Instance": object}, "lm_eval.api.model": {"TemplateLM": TemplateLM},
    "lm_eval.models.utils": {
        "handle_stop_sequences": lambda until, eos: [*until, eos],
        "normalize_gen_kwargs": normalize_gen_kwargs,
        "postprocess_generated_text": postprocess_generated_text}}


@pytest.fixture(scope="module")
def model():
    return make_talkative_gpt2(TOKENIZER, MOST)


@pytest.fixture
def asked(model):
    """What lm-eval would ask; prompts are decoded two at a time."""
    with pytest.MonkeyPatch.context() as patched:
        if find_spec("lm_eval") is None:
            for name, content in STAND_INS.items():
                patched.setitem(sys.modules, name, SimpleNamespace(**content))
        made = importlib.import_module(NAME)
        yield made.HarnessModel(model, TOKENIZER, WINDOW, 2, Ranks(0, 1, 0, "python"))
        sys.modules.pop(NAME)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)


@torch.no_grad()
def likelihood(model, ids: list[int], count: int) -> tuple[float, bool]:
    """Of the last tokens, and whether each is the most likely."""
    logits = model(torch.tensor([ids[:-1]])).logits[0, -count:].double()
    labels = torch.tensor(ids[-count:])
    nats = logits.log_softmax(-1).gather(-1, labels[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == labels).all())


@torch.no_grad()
def greedy(model, ids: list[int], new: int, *stops: str) -> str:
    """The likeliest text, up to a stop string or the end of the document."""
    added: list[int] = []
    for _ in range(new):
        row = model(torch.tensor([ids + added])).logits[0, -1, : TOKENIZER.vocab_size]
        if (token := int(row.argmax())) == TOKENIZER.eod:
            break
        added.append(token)
        if any(stop in TOKENIZER.decode(added) for stop in stops):
            break
    return postprocess_generated_text(TOKENIZER.decode(added), list(stops), None)


def test_continuations_have_the_likelihood_of_the_model(asked, model):
    context, likeliest = ids_of("the pub"), None
    with torch.no_grad():
        likeliest = int(model(torch.tensor([context])).logits[0, -1].argmax())
    pairs = [(context, ids_of(" is")), (context, [likeliest]), (ids_of("a"), ids_of("b cheap")),
             (ids_of("x" * 30), ids_of("abcde")), ([5], ids_of("y" * WINDOW))]
    found = asked._loglikelihood_tokens([(("", ""), *pair) for pair in pairs], disable_tqdm=True)
    # what is too long loses its beginning; the last token is a label only
    expected = [likelihood(model, (one + other)[-WINDOW - 1:], len(other)) for one, other in pairs]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    assert [best for _, best in found] == [best for _, best in expected]
    assert [best for _, best in found][:2] == [False, True]
    with pytest.raises(ValueError, match="'y+' has 21 tokens and does not fit the window of 20"):
        asked._loglikelihood_tokens([(("", "y" * 21), [5], ids_of("y" * 21))])


def test_texts_have_the_likelihood_of_every_token_within_its_window(asked, model):
    texts = ["the pub is cheap", "z" * (WINDOW + 9), "b"]
    found = asked.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts],
                                        disable_tqdm=True)
    for text, nats in zip(texts, found, strict=True):
        ids, expected = [asked.prefix_token_id, *ids_of(text)], 0.0
        for place in range(1, len(ids)):
            end = min((place - 1) // WINDOW * WINDOW + WINDOW, len(ids) - 1)
            expected += likelihood(model, ids[max(0, end - WINDOW): place + 1], 1)[0]
        assert nats == pytest.approx(expected, rel=1e-5), text


@pytest.mark.slow
def test_texts_are_the_likeliest_up_to_a_stop_and_in_the_order_of_the_requests(asked, model):
    contexts = ["the pub", "a", "b cheap cat", "", "q" * 40]
    plain = {context: greedy(model, ids_of(context)[-WINDOW + 7:] or [TOKENIZER.eod], 7)
             for context in contexts}
    stop = next(c for text in plain.values() for c in text[1:] if c.isascii() and c.isprintable())
    requests = [(context, {"until": [stop] if stopped else [], "max_gen_toks": 7})
                for context in contexts for stopped in (False, True)]
    found = asked.generate_until([SimpleNamespace(args=request) for request in requests],
                                 disable_tqdm=True)
    assert found[::2] == list(plain.values()) and len(set(found[::2])) == 5
    assert found[1::2] == [text.split(stop)[0] for text in plain.values()]
    assert found[1::2] != found[::2]


def test_what_transformers_is_asked_for(asked, model, monkeypatch):
    calls = []

    def generate(ids, **given):
        calls.append((ids.tolist(), given))
        return torch.cat([ids, torch.tensor([[7, TOKENIZER.eod, 9]] * len(ids))], 1)

    monkeypatch.setattr(model, "generate", generate)
    settings = [{"until": ["x"], "max_gen_toks": 3, "temperature": 0.0},
                {"until": [], "max_gen_toks": 5, "temperature": 0.5, "do_sample": True,
                 "top_p": 0.75}]
    for own in settings:
        assert asked._complete([ids_of("ab"), ids_of("c")], own) == [TOKENIZER.decode([7])] * 2
    (ids, one), (_, other) = calls
    assert ids == [ids_of("ab"), [TOKENIZER.eod, *ids_of("c")]]
    assert one["attention_mask"].tolist() == [[1, 1], [0, 1]]
    for given, own in zip((one, other), settings, strict=True):
        config = given["generation_config"]
        assert config.max_new_tokens == own["max_gen_toks"]
        assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (
            TOKENIZER.ends, TOKENIZER.eod, TOKENIZER.prefix)
        assert config.suppress_tokens == list(range(TOKENIZER.vocab_size,
                                                    TOKENIZER.vocab_size + 7))
        assert bool(config.do_sample) == own.get("do_sample", False)
    assert (config.temperature, config.top_p) == (0.5, 0.75)
    (stopping,) = one["stopping_criteria"]
    rows = torch.tensor([[*ids_of("xx"), *ids_of("axb")], [*ids_of("xx"), *ids_of("aab")]])
    assert stopping(rows, None).tolist() == [True, False]  # of what is new alone
    with pytest.raises(ValueError, match="asks for 256 new tokens, which leaves no room"):
        asked._complete([[5]], {"until": []})


def test_tokens_of_texts_begin_and_end_as_the_tokenizer_says(asked, monkeypatch):
    assert asked.tok_encode("ab") == ids_of("ab") and asked.eot_token_id == TOKENIZER.ends[-1]
    begins = SimpleNamespace(encode=ids_of, begin_token="<s>", bod=3, prefix=4, ends=[8, 9])
    monkeypatch.setattr(asked, "_tokenizer", begins)
    assert (asked.eot_token_id, asked.prefix_token_id) == (9, 4)
    for asks, begin in ((None, [3]), (True, [3]), (False, [])):
        assert asked.tok_encode("ab", add_special_tokens=asks) == [*begin, *ids_of("ab")]
