"""Sampling: greedy text is that of evaluation and of transformers, draws follow the distribution
that is asked for, and what is streamed is the whole text."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_models import make_talkative_gpt2
from small_models import make_recipe, make_tokenizer, write_gpt2

from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.source import open_weights
from megatron_spdf.data.tokenizers.huggingface import HuggingFace
from megatron_spdf.data.tokenizers.tokenizer import train_tokenizer
from megatron_spdf.evaluation import sampling
from megatron_spdf.evaluation.decoding import DecodingSettings, decode
from megatron_spdf.evaluation.sampling import (
    Pieces,
    Prompt,
    SamplingSettings,
    context_prompt,
    continue_text,
    generation_config,
    text_prompt,
)

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 48
DRAWS = 3000
# of one, two, three and four bytes, with blanks at both ends and inside
HARD = " a  naïve 漢字\U0001f600é \n\tend 漢"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(8)


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_talkative_gpt2(tokenizer, WINDOW)


def said(model, tokenizer, prompt: Prompt, **settings) -> tuple[str, str, int]:
    """What is added to a prompt, why it ends, and the number of pieces."""
    pieces: list[str] = []
    ending = continue_text(model, tokenizer, prompt, SamplingSettings(**settings), pieces.append)
    return "".join(pieces), ending, len(pieces)


@pytest.mark.parametrize("context", ["the pub", "漢字 a"])
def test_a_completion_is_that_of_evaluation(model, tokenizer, context):
    settings = DecodingSettings(beams=1, max_new_tokens=20, no_repeat_ngram=0)
    decoded = decode(model, tokenizer, [context], settings).texts[0]
    text, *_ = said(model, tokenizer, context_prompt(tokenizer, context), tokens=20)
    assert text.strip() == decoded and decoded


@pytest.mark.parametrize("text", ["the pub", "漢字 a", ""])
def test_greedy_text_is_that_of_transformers(model, tokenizer, text):
    ids = torch.tensor([tokenizer.encode(text) or [tokenizer.eod]])
    rows = list(range(tokenizer.vocab_size, model.config.vocab_size))
    out = model.generate(ids, do_sample=False, max_new_tokens=20, suppress_tokens=rows)
    new = [token for token in out[0, ids.size(1):].tolist() if token != tokenizer.eod]
    found, _, pieces = said(model, tokenizer, text_prompt(tokenizer, text), tokens=20)
    assert found == tokenizer.decode(new) and pieces > 1


@pytest.mark.parametrize("asked", [{"temperature": 0.7}, {"temperature": 1.6, "top_p": 0.8},
                                   {"top_p": 0.35}, {"top_k": 3}, {"top_p": 1.0},
                                   {"top_k": 5, "top_p": 0.7, "temperature": 2.0}])
def test_draws_follow_the_distribution(model, tokenizer, asked):
    prompt = text_prompt(tokenizer, "the")
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0, -1].double().numpy()
    expected = distribution(logits[: tokenizer.vocab_size], **asked)
    config = generation_config(model, tokenizer, prompt, SamplingSettings(1, **asked), 1)
    torch.manual_seed(0)
    ids = torch.tensor([prompt.ids]).repeat(DRAWS, 1)
    drawn = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    counts = np.bincount(drawn[:, -1].numpy(), minlength=model.config.vocab_size)
    assert not counts[tokenizer.vocab_size:].any()
    assert not counts[: len(expected)][expected == 0].any()
    # five standard deviations of a share, and one draw
    spread = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(counts[:len(expected)] / DRAWS - expected) <= 5 * spread + 1 / DRAWS).all()


def distribution(logits: np.ndarray, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0) -> np.ndarray:
    """Probabilities in float64, one token after another."""
    scaled = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-scaled)[: top_k or None]
    whole, kept, mass = scaled[order].sum(), [], 0.0
    for token in order:
        if mass / whole >= top_p:
            break
        kept.append(token)
        mass += scaled[token]
    found = np.zeros_like(scaled)
    found[kept] = scaled[kept] / mass
    return found


def test_prompts_and_settings_have_the_ids_that_the_tokenizer_says():
    """Each of another number: of a beginning that is put there, of one that is declared, of a
    document's end, and of all ends of texts."""
    tokenizer = SimpleNamespace(begin_token=None, bod=3, prefix=4, eod=5, ends=[6, 5],
                                vocab_size=40, encode=lambda text: [10 + len(text)] * bool(text))
    assert text_prompt(tokenizer, "abc") == Prompt([13], [6, 5])
    assert text_prompt(tokenizer, "") == Prompt([4], [6, 5])
    assert context_prompt(tokenizer, "abc") == Prompt([13, 5], [5, 12])  # 12 is a blank line
    tokenizer.begin_token = "<s>"
    assert text_prompt(tokenizer, "abc") == Prompt([3, 13], [6, 5])
    assert text_prompt(tokenizer, "") == Prompt([3], [6, 5])
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=42))
    for tokens, room, most in ((7, 9, 7), (9, 7, 7)):
        config = generation_config(model, tokenizer, Prompt([1], [6, 5]), SamplingSettings(tokens),
                                   room)
        assert (config.max_new_tokens, config.num_beams, config.do_sample) == (most, 1, False)
        assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ([6, 5], 5, 4)
        assert config.suppress_tokens == [40, 41]


def test_a_seed_repeats_a_text(model, tokenizer):
    def text(seed: int) -> str:
        torch.manual_seed(seed)
        return said(model, tokenizer, text_prompt(tokenizer, "a"), tokens=12, temperature=1.0)[0]
    assert text(1) == text(1) != text(2)


def test_the_end_of_a_document_ends_a_text(model, tokenizer):
    prompt, new = text_prompt(tokenizer, "the"), []
    with torch.no_grad():
        for _ in range(12):  # without a cache
            row = model(torch.tensor([prompt.ids + new])).logits[0, -1, : tokenizer.vocab_size]
            new.append(int(row.argmax()))
    first = new.index(new[6])
    assert said(model, tokenizer, prompt, tokens=12)[:2] == (tokenizer.decode(new), "tokens")
    ending = Prompt(prompt.ids, [tokenizer.eod, new[6]])
    assert said(model, tokenizer, ending, tokens=12)[:2] == (tokenizer.decode(new[:first]), "end")


def test_a_text_ends_where_the_window_does(model, tokenizer):
    prompt = Prompt([5] * (WINDOW - 4), [])
    text, ending, _ = said(model, tokenizer, prompt, tokens=9)
    assert ending == "window" and text == said(model, tokenizer, prompt, tokens=4)[0]
    assert said(model, tokenizer, Prompt([5] * (WINDOW - 1), []), tokens=1)[1] == "tokens"
    with pytest.raises(ValueError, match="has 48 tokens.* reads 48 at once.* at most 47 tokens"):
        said(model, tokenizer, Prompt([5] * WINDOW, []), tokens=1)


def sentencepiece(directory: Path):
    return train_tokenizer("sentencepiece", [HARD, "the pub is cheap", "a naïve cat"], 290,
                           directory / "sentencepiece")


def pieces_with_bytes(directory: Path):
    """Of Hugging Face, which reads a run of bytes as a whole or not at all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["\u2581", *"abdentv", "\u2581a"]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{b:02X}>", -9.0) for b in range(256)),
              *((letter, -1.0) for letter in letters)]
    made = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return HuggingFace(made.to_str().encode())


@pytest.mark.parametrize("make", [lambda _: make_tokenizer(8), sentencepiece, pieces_with_bytes])
def test_pieces_are_the_whole_text_and_whole_characters(make, tmp_path):
    tokenizer = make(tmp_path)
    ids = tokenizer.encode(HARD)
    draw = np.random.default_rng(0)
    rows = [ids, ids[:-1], [*ids, *ids[-2:]], *draw.integers(2, tokenizer.vocab_size, (40, 30))]
    for row in (list(map(int, row)) for row in rows):
        stream = Pieces(tokenizer)
        pieces = [stream.add(token) for token in row]
        assert "".join(pieces) + stream.rest() == tokenizer.decode(row)
        assert not any(piece.endswith("\ufffd") for piece in pieces)
    stream = Pieces(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert sum(map(bool, pieces)) > 8  # and not all at the end


def test_a_blank_between_prompt_and_text_is_kept(tmp_path):
    """SentencePiece drops the blank that a text begins with."""
    tokenizer = sentencepiece(tmp_path)
    ids = tokenizer.encode("the pub is cheap")
    text = "".join(map(Pieces(tokenizer, ids[:-3]).add, ids[-3:]))
    assert tokenizer.decode(ids[:-3]) + text == "the pub is cheap"


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """A model of Hugging Face's, and a sparse run of it."""
    place, tokenizer = tmp_path_factory.mktemp("sampled"), make_tokenizer()
    given = write_gpt2(place / "given")
    for name, content in zip(("vocab.json", "merges.txt"), tokenizer._files, strict=True):
        (given / name).write_bytes(content)
    write_initial_checkpoint(open_weights(given), make_recipe(sparsity=0.5), tokenizer,
                             place / "run")
    (place / "run/checkpoints/step_00000001.partial").mkdir()
    (place / "unfinished/checkpoints/step_00000001.partial").mkdir(parents=True)
    return {name: place / name for name in ("given", "run", "unfinished", "nowhere")} | {
        "save": place / "run/checkpoints/step_00000001.partial",
        "step": place / "run/checkpoints/step_00000000"}


@pytest.fixture
def sample(monkeypatch, capsys):
    """Runs the tool; returns exit code, output and errors."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "sample", raising=False)
    import sample

    def run(*words: object, lines: str | bytes = "",
            terminal: bool = False) -> tuple[int, str, str]:
        given = SimpleNamespace(isatty=lambda: True) if terminal else io.TextIOWrapper(
            io.BytesIO(lines if isinstance(lines, bytes) else lines.encode()))
        monkeypatch.setattr(sys, "stdin", given)
        try:
            code = sample.main([str(word) for word in words])
        except SystemExit as ended:  # of the parser
            code = ended.code
        return code, *capsys.readouterr()
    return run


def test_the_tool_goes_on_from_runs_checkpoints_and_exports(sample, directories):
    from megatron_spdf.convert.huggingface_export import in_memory

    for name in ("given", "run", "step"):
        source = open_weights(directories[name])
        text, ending, _ = said(in_memory(source), source.tokenizer,
                               text_prompt(source.tokenizer, "ab"), tokens=5)
        code, out, err = sample(directories[name], "ab", "--tokens", 5)
        assert (code, out, ending) == (0, f"ab{text}\n", "tokens") and "greedy" in err
    for words in (("--tokens", 5, "ab"), ("--tokens", 5, "--", "ab")):  # the text after an option
        assert sample(directories["step"], *words)[:2] == (0, out)


@pytest.mark.slow
def test_the_tool_goes_on_from_lines(sample, directories):
    run, seed = directories["run"], ("--temperature", 2, "--seed", 7)
    alone = sample(run, "ab", "--tokens", 4, *seed)[1]
    code, out, _ = sample(run, "--tokens", 4, *seed, lines="ab\r\n\ncd")
    assert code == 0 and out.startswith(alone) and "\ncd" in out
    code, out, err = sample(run, "--tokens", 4, *seed, lines=f"{'x' * 10}\nab\n")
    assert code == 2 and out.endswith(alone)  # what is wrong draws nothing
    assert "the prompt has 10 tokens" in err and "at most 9 tokens" in err


@pytest.mark.parametrize(("words", "settings"), [
    ((), SamplingSettings(128)), (("--tokens", 3), SamplingSettings(3)),
    (("--temperature", 0.5), SamplingSettings(128, 0.5)),
    (("--top-k", 4), SamplingSettings(128, None, 4)),
    (("--tokens", 9, "--top-p", 0.25, "--top-k", 2, "--temperature", 2, "--device", "cpu"),
     SamplingSettings(9, 2.0, 2, 0.25))])
def test_options_of_the_tool_are_settings(sample, directories, monkeypatch, words, settings):
    asked = []
    monkeypatch.setattr(sampling, "continue_text", lambda model, tokenizer, prompt, given, write: (
        asked.append((given, torch.initial_seed(), str(model.device))), "window")[1])
    seed = [] if settings.greedy else ["--seed", 11]
    code, _, err = sample(directories["run"], "ab", *words, *seed)
    assert code == 0 and asked[0][0] == settings and asked[0][2] == "cpu"
    assert "(the model reads no more than 10 tokens)" in err
    assert settings.greedy or (asked[0][1] == 11 and "--seed 11" in err)
    if not settings.greedy:  # a seed of its own each time, which repeats the text
        seeds = [sample(directories["run"], "ab", *words)[2] for _ in range(2)]
        assert [f"--seed {seed}" in said for (_, seed, _), said in zip(
            asked[1:], seeds, strict=True)] == [True, True] and asked[1][1] != asked[2][1]


def test_a_line_ends_at_its_line_feed_and_nowhere_else(sample, directories):
    """One that is no text is said, as an argument is, and the others are gone on from."""
    from sample import lines_in

    texts = ["a\u2028b\x0bc\x85d\re", "", "f"]
    code, _, err = sample(directories["run"], "--tokens", 1, lines=b"a\nb\xff\nab\n")
    assert code == 2 and err.count("error:") == 1
    assert r"error: the text is not UTF-8 where it says b\udcff; convert it" in err
    code, out, err = sample(directories["nowhere"], "b\udcff", "--tokens", 1)
    assert (code, out) == (2, "") and r"where it says b\udcff;" in err  # no model is looked for
    sys.stdin = io.TextIOWrapper(io.BytesIO("\r\n".join(texts).encode()))  # `sample` resets it
    assert list(lines_in()) == texts


def test_the_tool_converses(sample, directories, monkeypatch):
    """Ctrl-C at the prompt or in a text is no end, nor is a text that is too long; Ctrl-D is."""
    typed = iter(["ab", KeyboardInterrupt, "x" * 10, "ab", EOFError])

    def ask(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", ask)
    _, alone, _ = sample(directories["run"], "ab", "--tokens", 4)
    handler = signal.getsignal(signal.SIGINT)
    code, out, err = sample(directories["run"], "--tokens", 4, terminal=True)
    signal.signal(signal.SIGINT, handler)
    assert code == 0 and out.count(alone) == 2 and next(typed, None) is None
    assert "at most 9 tokens" in err and "Ctrl-D" in err


def test_a_terminal_obeys_no_text(sample, directories, monkeypatch, capsys):
    import sample as tool

    for terminal, shown in ((True, "a\\x1b[2Jb\n\té"), (False, "a\x1b[2Jb\n\té")):
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda _, it=terminal: it, raising=False)
        printer = tool.Printer()
        printer.write("a\x1b[2Jb\n\té")
        printer.end()
        assert capsys.readouterr().out == f"{shown}\n"


def test_the_tool_completes_what_a_fine_tuning_run_was_trained_on(sample, directories):
    run = directories["run"]
    _, text, _ = sample(run, "ab", "--tokens", 5)
    code, asked, _ = sample(run, "ab", "--tokens", 5, "--as", "context")
    (run / "recipe.yaml").write_text("data: {task: jsonl, path: x}\n")
    assert sample(run, "ab", "--tokens", 5)[1] == asked != text and code == 0
    assert sample(run, "ab", "--tokens", 5, "--as", "text")[1] == text
    assert not asked.startswith((" ", "ab"))


@pytest.mark.parametrize(("where", "words", "parts"), [
    ("nowhere", (), ("holds no weights", "give a run directory",
                      "model of the Hugging Face hub is downloaded first")),
    ("unfinished", (), ("no complete checkpoint", "start it again")),
    ("save", (), ("did not finish", "use a complete checkpoint")),
    ("run", ("--temperature", "0"), ("'0'", "at least 0.001", "leave out --temperature")),
    ("run", ("--temperature", "-1"), ("'-1'", "at least 0.001")),
    ("run", ("--temperature", "nan"), ("'nan'", "a finite number")),
    ("run", ("--top-p", "1.1"), ("'1.1'", "at most 1.0")),
    ("run", ("--top-p", "0"), ("'0'", "over 0.0")),
    ("run", ("--top-k", "0"), ("'0'", "at least 1")),
    ("run", ("--tokens", "0"), ("'0'", "at least 1")),
    ("run", ("--seed", "1"), ("greedy text has none", "leave out --seed")),
])
def test_bad_input_is_refused(sample, directories, where, words, parts):
    code, out, err = sample(directories[where], "ab", *words)
    assert code == 2 and out == "" and "Traceback" not in err
    for part in parts:
        assert part in err


def test_the_tool_is_one_process(sample, directories, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = sample(directories["run"], "ab")
    assert code == 2 and "2 were started; start it without a launcher" in err
