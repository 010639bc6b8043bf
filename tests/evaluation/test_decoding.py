"""Decoding: the same text at every batch size and on every rank; beam search and perplexity against
plain ones."""

from __future__ import annotations

import itertools
import math
import random
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_spdf.evaluation import decoding
from megatron_spdf.evaluation.decoding import DecodingSettings, decode, likelihood

WORDS = "name eatType food area near price the a pub cheap riverside".split()


class Characters:
    """A tokenizer of one token per character."""

    eod, vocab_size = 0, 97

    def encode(self, text: str) -> list[int]:
        return [1 + ord(c) % 96 for c in text]

    def decode(self, ids) -> str:
        return "".join(chr(32 + (i + 63) % 96) for i in ids)


TOKENIZER = Characters()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4,
                        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        # far from uniform, so that prompts and positions matter
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        model.lm_head.weight[0] *= 2.5  # so that some completions end by themselves
    return model


@pytest.fixture(scope="module")
def contexts():
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 6))) for _ in range(21)]


def texts(model, contexts, **settings) -> list[str]:
    chosen = DecodingSettings(
        **{"beams": 4, "max_new_tokens": 12, "length_penalty": 1.5, **settings})
    found = decode(model, TOKENIZER, contexts, chosen).texts
    return [found[i] for i in range(len(contexts))]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 4])
def test_batch_size_changes_no_text(model, contexts, beams):
    alone = texts(model, contexts, beams=beams, batch_size=1)
    assert texts(model, contexts, beams=beams, batch_size=32) == alone
    assert len(set(alone)) > 10 and len(set(map(len, alone))) > 1


def test_ranks_share_the_work(model, contexts):
    settings = DecodingSettings(beams=2, max_new_tokens=8, batch_size=4)
    whole = decode(model, TOKENIZER, contexts, settings)
    shares = [decode(model, TOKENIZER, contexts, settings, rank, 3) for rank in range(3)]
    assert sorted(i for share in shares for i in share.texts) == list(range(len(contexts)))
    assert {i: text for share in shares for i, text in share.texts.items()} == whole.texts
    assert sum(share.tokens for share in shares) == whole.tokens


def greedy(model, prompt: list[int], steps: int, ngram: int) -> list[int]:
    """One token after another, without a cache; no n-gram twice in what is new."""
    new: list[int] = []
    with torch.no_grad():
        for _ in range(steps):
            logits = model(torch.tensor([prompt + new])).logits[0, -1]
            seen = [new[i : i + ngram] for i in range(len(new) - ngram + 1)]
            for token in range(len(logits)):
                if ngram and [*new[len(new) - ngram + 1 :], token] in seen:
                    logits[token] = -math.inf
            new.append(int(logits.argmax()))
            if new[-1] == TOKENIZER.eod:
                return new[:-1]
    return new


@pytest.mark.parametrize("ngram", [0, 1, 2])
def test_greedy_decoding_against_a_plain_loop(model, contexts, ngram):
    contexts = contexts[:8]
    decoded = texts(model, contexts, beams=1, no_repeat_ngram=ngram)
    expected = [TOKENIZER.decode(greedy(model, TOKENIZER.encode(c) + [0], 12, ngram)).strip()
                for c in contexts]
    assert decoded == expected
    if ngram == 1:  # the prompt's own tokens stay allowed
        assert all(len(set(text)) == len(text) for text in decoded)
        assert any(set(text) & set(context) for text,
                   context in zip(decoded, contexts, strict=True))


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_a_beam_as_wide_as_the_tree_finds_the_best(model, penalty):
    """Every completion of up to two tokens, scored one by one."""
    prompt = TOKENIZER.encode("a pub") + [0]
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        both = torch.tensor([[*prompt, token] for token in range(97)])
        second = first[:, None] + model(both).logits[:, -1].log_softmax(-1)
    scores = {(a, b): float(second[a, b]) / 2**penalty for a,
              b in itertools.product(range(1, 97), range(97))}
    scores[(0,)] = float(first[0])
    best = [token for token in max(scores, key=scores.get) if token]
    found = texts(model, ["a pub"], beams=97, length_penalty=penalty, max_new_tokens=2,
                  no_repeat_ngram=0)
    assert found == [TOKENIZER.decode(best).strip()]


def test_the_length_penalty_is_the_one_that_is_asked_for(model, contexts):
    """Long completions are favored more, the larger it is; 1 is the default of transformers."""
    found = [texts(model, contexts, length_penalty=penalty) for penalty in (-4.0, 1.0, 4.0)]
    lengths = [sum(map(len, chosen)) for chosen in found]
    assert lengths == sorted(lengths) and len(set(lengths)) == 3


class Scripted(GPT2LMHeadModel):
    """Says a text after every prompt, one token a step."""

    def __init__(self, said: list[int]):
        super().__init__(GPT2Config(vocab_size=97, n_positions=64, n_embd=4, n_layer=1, n_head=1,
                                    bos_token_id=0, eos_token_id=0))
        self.said, self.step = said, 0

    def forward(self, *arguments, **keywords):
        found = super().forward(*arguments, **keywords)
        found.logits[:, -1] = torch.eye(97)[self.said[self.step]] * 100
        self.step += 1
        return found


@pytest.mark.parametrize(("end", "blank"), [([0], True), ([90], True), ([0], False)])
def test_a_completion_ends_at_the_end_of_document_or_at_a_blank_line(end, blank):
    class WithBlankLine(Characters):
        """Its token 90 is a blank line, or it has none."""

        def encode(self, text: str) -> list[int]:
            return [90] if blank and text == "\n\n" else super().encode(text)

    words = TOKENIZER.encode("  a pub ")
    settings = DecodingSettings(beams=1, max_new_tokens=12, no_repeat_ngram=0)
    said = [*words, *([] if blank else [90]), *end, *words]
    found = decode(Scripted(said).eval(), WithBlankLine(), ["x"], settings)
    assert found.texts == {0: TOKENIZER.decode(said[: said.index(end[0])]).strip()}
    assert found.tokens == said.index(end[0]) + 1


def test_a_long_prompt_loses_its_beginning(model):
    settings = DecodingSettings(beams=1, max_new_tokens=10, no_repeat_ngram=0)
    # 64 = 53 + end of document + 10
    long, kept = "x" * 30 + "y" * 30 + "z" * 23, "y" * 30 + "z" * 23
    decoded = decode(model, TOKENIZER, [long, kept], settings)
    assert decoded.texts[0] == decoded.texts[1] and decoded.truncated == 1
    with pytest.raises(ValueError,
                       match="max_new_tokens=63 leaves no room for a prompt in the window of 64 "
                             "tokens"):
        decode(model, TOKENIZER, ["x"], DecodingSettings(max_new_tokens=63))


def test_a_long_prompt_of_news_loses_its_end(model):
    settings = DecodingSettings(beams=1, max_new_tokens=10, no_repeat_ngram=0)
    kept = "z" * 23 + "y" * 30
    decoded = decode(model, TOKENIZER, [kept + "x" * 30, kept, "y" * 53], settings, loses="end")
    assert decoded.texts[0] == decoded.texts[1] != decoded.texts[2] and decoded.truncated == 1
    # 64 = 54 of the context + end of document + " ab" and end of document, the last a label only
    pairs = [("z" * 24 + "y" * 30 + "x", "ab ab ab"), ("z" * 24 + "y" * 30, "ab ab ab")]
    one, other = (likelihood(model, TOKENIZER, [pair], loses="end") for pair in pairs)
    assert one == other != likelihood(model, TOKENIZER, pairs[:1])


def test_perplexity_is_the_loss_of_transformers(model, contexts):
    pairs = [(context, "text " * (1 + i % 5)) for i, context in enumerate(contexts)]
    nats, tokens = 0.0, 0
    for context, completion in pairs:
        context = TOKENIZER.encode(context) + [0]
        target = TOKENIZER.encode(f" {completion}") + [0]
        ids = torch.tensor([context + target])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(context), -100)
        with torch.no_grad():
            nats += float(model(ids, labels=labels).loss) * len(target)
        tokens += len(target)
    for batch_tokens in (1, 200, 10_000):
        found = likelihood(model, TOKENIZER, pairs, batch_tokens=batch_tokens)
        # sums of float32
        assert found.tokens == tokens and found.nats == pytest.approx(nats, rel=1e-5)
    shares = [likelihood(model, TOKENIZER, pairs, rank, 2) for rank in range(2)]
    assert sum(s.nats for s in shares) == pytest.approx(nats,
                                                        rel=1e-5) and sum(s.tokens
                                                                          for s in shares) == tokens


def test_perplexity_within_the_window(model):
    longest = "y" * 62  # " " + 62 + end of document = 64, all the window
    whole = likelihood(model, TOKENIZER, [("x" * 9, longest)])
    assert whole == likelihood(model, TOKENIZER, [("", longest)]) and whole.tokens == 64
    fitting = likelihood(model, TOKENIZER, [("x", "ab")])
    for rank in range(2):  # a longer one is left out, and no rank counts another
        found = likelihood(model, TOKENIZER, [("x", longest + "y"), ("x", "ab")], rank, 2)
        assert found.left_out == 1 and found.tokens == (fitting.tokens if rank == 0 else 0)
    assert fitting.left_out == 0


@pytest.mark.parametrize("batch_tokens", [40, 100, 8192])
def test_pairs_are_read_longest_first_in_batches_as_large_as_may_be(model, monkeypatch,
                                                                    batch_tokens):
    """Of `batch_tokens` with padding, or of one pair; the last token is a label only."""
    read, forward = [], type(model.base_model).forward
    monkeypatch.setattr(type(model.base_model), "forward", lambda self, ids: read.append(
        tuple(ids.shape)) or forward(self, ids))
    pairs = [("x" * n, "y" * (n % 7)) for n in range(1, 50, 3)]
    likelihood(model, TOKENIZER, pairs, batch_tokens=batch_tokens)
    lengths = sorted((n + n % 7 + 3 for n in range(1, 50, 3)), reverse=True)
    wanted = []
    while lengths:
        count = max(1, batch_tokens // lengths[0])
        wanted.append((len(lengths[:count]), lengths[0] - 1))
        lengths = lengths[count:]
    assert read == wanted


def test_prompts_are_decoded_longest_first_and_their_tokens_counted(model, monkeypatch):
    """Of every completion, its end included."""
    asked = []

    def complete(model, tokenizer, prompts, settings):
        asked.append([len(prompt) for prompt in prompts])
        return [[1] * len(prompt) for prompt in prompts]

    monkeypatch.setattr(decoding, "_complete", complete)
    contexts = ["x" * n for n in (3, 5, 2, 5, 9, 1, 4)]
    settings = DecodingSettings(batch_size=2)
    with monkeypatch.context() as patched:
        patched.setattr(decoding, "window_of", lambda model: 70)
        found = decode(model, TOKENIZER, contexts, settings)
        whole, asked = asked, []
        shares = [decode(model, TOKENIZER, contexts, settings, rank, 3) for rank in range(3)]
    assert [share.truncated for share in shares] == [0, 0, 1]
    assert sum(share.tokens for share in shares) == found.tokens
    assert sorted(n for share in shares for n in share.texts) == list(range(7))
    asked = whole
    # room for 70 - 64 - 1 = 5 tokens of context, and the end of document
    assert asked == [[6, 6], [6, 5], [4, 3], [2]]
    assert found.tokens == sum(map(sum, asked)) + 7 and found.truncated == 1
    assert sorted(found.texts) == list(range(7)) and found.seconds >= 0.0


def test_what_transformers_is_asked_for(model, monkeypatch):
    """Left padding that attention does not see, ends, no row without a token, and the penalty of a
    beam."""
    asked = []

    class Fewer(Characters):
        vocab_size = 95

    def generate(ids, attention_mask, generation_config, logits_processor):
        asked.append((ids, attention_mask, generation_config, logits_processor))
        return torch.cat([ids, torch.tensor([[7, 0, 9], [8, 8, 0]])], 1)

    monkeypatch.setattr(model, "generate", generate)
    for settings in (DecodingSettings(beams=3, max_new_tokens=5), DecodingSettings(
            beams=1, no_repeat_ngram=0)):
        found = decoding._complete(model, Fewer(), [[5, 6, 0], [7, 0]], settings)
        assert found == [[7], [8, 8]]
    (ids, mask, beam, processors), (_, _, greedy, none) = asked
    assert ids.tolist() == [[5, 6, 0], [0, 7, 0]] and mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert (beam.num_beams, beam.length_penalty, beam.max_new_tokens, beam.do_sample) == (
        3, 0.8, 5, False)
    assert (beam.eos_token_id, beam.pad_token_id, beam.bos_token_id) == ([0], 0, 0)
    assert beam.suppress_tokens == [95, 96]
    assert (greedy.num_beams, greedy.max_new_tokens) == (1, 64) and not none
    (processor,) = processors
    assert (processor.ngram_size, processor._prompt_length) == (4, 3)


@pytest.mark.parametrize(("new", "fits"), [(62, True), (63, False)])
def test_a_prompt_needs_room_for_one_token(new, fits):
    settings = DecodingSettings(max_new_tokens=new)
    if fits:
        assert decoding.room_for_prompts(64, settings) == 1
    else:
        with pytest.raises(ValueError, match="give at most 62"):
            decoding.room_for_prompts(64, settings)


@pytest.mark.parametrize(("rank", "terminal", "shown"), [(0, True, True), (0, False, False),
                                                         (1, True, False), (1, False, False)])
def test_progress_is_shown_by_rank_0_on_a_terminal(model, monkeypatch, capsys, rank, terminal,
                                                   shown):
    monkeypatch.setattr(decoding, "_complete", lambda *given: [[1]] * len(given[2]))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    decode(model, TOKENIZER, ["x", "y"], DecodingSettings(max_new_tokens=4), rank, 2)
    assert ("decode, rank 0 of 2" in capsys.readouterr().err) == shown
    likelihood(model, TOKENIZER, [("x", "y"), ("y", "x")], rank, 2)
    assert ("rank 0 of 2" in capsys.readouterr().err) == shown
