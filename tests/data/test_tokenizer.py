"""Tokenizers: the same tokens as the reference, text that round-trips, files that say what is
wrong."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import textwrap
import warnings
from pathlib import Path

import pytest
import tokenizers
from backports import zstd
from byte_tokenizers import write_byte_tokenizer

from megatron_spdf.data.tokenizers.gpt2 import _before_last_blanks
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer

SHARED = Path(os.environ.get("SPDF_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
GPT2 = SHARED / "gpt2_tokenizer"
PILE = SHARED / "pile_sample" / "val.jsonl.zst"
needs_gpt2 = pytest.mark.skipif(not GPT2.exists(), reason="no GPT-2 BPE files in ../shared/data")

CORPUS = [
    "It was the best of times, it was the worst of times,\n\nit was the age of wisdom.\n",
    "def double(x):\n    if x is None:\n        return None\n\treturn 2 * x  # they'll halve it "
    "later\n",
    "Grüße, señor: 東京 and Ελλάδα cost 12,345.67 € — nothing's free 🙂🙂\n",
    *Path(textwrap.__file__).read_text(encoding="utf-8").split("\n\n"),
]
HARD = [
    "",
    " ",
    "a  b   c \n\n\n\t\td \r\n e",
    " " * 5000 + "x" + "\n" * 3000 + "\t" * 2000,
    "I'll we've they're he'd it's i'm DON'T 'tis",
    "👩‍👩‍👧‍👦 🇩🇪 é e\u0301 \ufeff \u200b \u00a0 \u3000 \u2028 \u0085",
    "漢字かな交じり文 한국어 العربية ไทย עברית",
    "for (int i = 0; i < n; ++i) { a[i] ^= ~0xFFu; } // <- $x->{y} != @z",
    "\x00\x01\x1b[0m\x7f\x1c\x1d\x1e\x1f",
    "0123456789 ½ ² Ⅻ ١٢٣ 1e-10",
    "<|endoftext|> before<|endoftext|>after </s> <s> <unk> <0x0A>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 300,
]
ROUND_TRIP = [text for text in HARD if text]


def reference_bpe(directory: Path) -> tokenizers.Tokenizer:
    """`tokenizers` over the same files: an implementation that shares no code with ours."""
    vocab = next(p for p in (directory / "encoder.json", directory / "vocab.json") if p.exists())
    merges = next(p for p in (directory / "vocab.bpe", directory / "merges.txt") if p.exists())
    reference = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = tokenizers.decoders.ByteLevel()
    return reference


def assert_same_tokens(tokenizer, reference: tokenizers.Tokenizer, texts: list[str]) -> None:
    for text in texts:
        expected = reference.encode(text).ids
        assert tokenizer.encode(text) == expected, text[:80]
        assert tokenizer.encode_array(text).tolist() == expected, text[:80]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Directories "bpe", "sentencepiece" and "tokenizers" with trained tokenizers of 400 ids."""
    root = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer("bpe", CORPUS, 400, root / "bpe")
    train_tokenizer("sentencepiece", CORPUS, 400, root / "sentencepiece")
    reference = reference_bpe(root / "bpe")
    reference.add_special_tokens(["<|endoftext|>"])
    (root / "tokenizers").mkdir()
    reference.save(str(root / "tokenizers" / "tokenizer.json"))
    return root


@needs_gpt2
def test_gpt2_tokens_are_those_of_tokenizers():
    gpt2 = load_tokenizer(GPT2)
    assert (gpt2.kind, gpt2.vocab_size, gpt2.eod) == ("gpt2-bpe", 50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    texts = list(HARD)
    if PILE.exists():
        lines = io.TextIOWrapper(zstd.open(PILE), encoding="utf-8")
        texts += [json.loads(line)["text"] for line in itertools.islice(lines, 40)]
    assert_same_tokens(gpt2, reference_bpe(GPT2), texts)


@pytest.mark.slow
@needs_gpt2
def test_gpt2_cuts_at_every_character_where_tokenizers_does():
    gpt2, reference = load_tokenizer(GPT2), reference_bpe(GPT2)
    characters = [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(characters), 4096):
        text = "".join(f"a{c}1 {c}!{c}  " for c in characters[start : start + 4096])
        assert gpt2.encode(text) == reference.encode(text).ids, (
            f"from U+{ord(characters[start]):04X}"
        )


def test_trained_bpe_tokens_are_those_of_tokenizers(trained):
    assert_same_tokens(load_tokenizer(trained / "bpe"), reference_bpe(trained / "bpe"),
                       HARD + CORPUS)


def test_bpe_trained_on_overlapping_runs_agrees_with_tokenizers(tmp_path):
    texts = ["".join(p) for p in itertools.product("ab ", repeat=7)] + ["a" * n for n in range(40)]
    train_tokenizer("bpe", texts, 670, tmp_path / "t")
    assert_same_tokens(load_tokenizer(tmp_path / "t"), reference_bpe(tmp_path / "t"), texts)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "tokenizers"])
def test_text_round_trips_and_special_names_are_text(trained, kind):
    tokenizer = load_tokenizer(trained / kind)
    for text in ROUND_TRIP + CORPUS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids
        assert 0 <= min(ids) and max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(tokenizer.encode("one") + tokenizer.encode("two")) == "onetwo"
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode_array("a\ud800b")) == "a\ufffdb"
    for known in (0, tokenizer.vocab_size - 1):  # the first and last row are no padding
        text = tokenizer.decode([known])
        for unknown in (-1, tokenizer.vocab_size):
            assert tokenizer.decode([known, unknown, known]) == f"{text}\ufffd{text}"


def test_sentencepiece_ends_documents_with_eos(trained):
    import sentencepiece

    tokenizer = load_tokenizer(trained / "sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(str(trained / "sentencepiece"
                                                         / "tokenizer.model"))
    assert tokenizer.kind == "sentencepiece"
    assert processor.id_to_piece(tokenizer.eod) == "</s>"
    assert tokenizer.encode(CORPUS[2]) == processor.encode(CORPUS[2])


def test_tokenizer_json_adds_nothing_and_cuts_nothing(trained, tmp_path):
    description = tokenizers.Tokenizer.from_file(str(trained / "tokenizers" / "tokenizer.json"))
    description.enable_truncation(4)
    description.enable_padding(length=500)
    eod = ("<|endoftext|>", description.token_to_id("<|endoftext|>"))
    description.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[eod]
    )
    description.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.kind == "tokenizers"
    assert_same_tokens(tokenizer, reference_bpe(trained / "bpe"), HARD + CORPUS)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "tokenizers"])
def test_saved_and_pickled_tokenizers_are_the_same(trained, tmp_path, kind):
    tokenizer = load_tokenizer(trained / kind)
    tokenizer.save(tmp_path / "copy")
    for copy in (load_tokenizer(tmp_path / "copy"), pickle.loads(pickle.dumps(tokenizer))):
        assert (copy.sha256, copy.kind, copy.vocab_size, copy.eod) == (
            tokenizer.sha256,
            tokenizer.kind,
            tokenizer.vocab_size,
            tokenizer.eod,
        )
        assert copy.encode(CORPUS[1]) == tokenizer.encode(CORPUS[1])
    with pytest.raises(ValueError, match="not empty"):
        tokenizer.save(tmp_path / "copy")


def test_fingerprint_follows_the_files_not_their_names(trained, tmp_path):
    vocab, merges = (trained / "bpe" / name for name in ("vocab.json", "merges.txt"))
    (tmp_path / "encoder.json").write_bytes(vocab.read_bytes())
    (tmp_path / "vocab.bpe").write_bytes(merges.read_bytes())
    original = load_tokenizer(trained / "bpe")
    assert load_tokenizer(tmp_path).sha256 == original.sha256
    (tmp_path / "vocab.bpe").write_bytes(merges.read_bytes() + b"\n")
    assert load_tokenizer(tmp_path).sha256 != original.sha256


def test_training_is_reproducible_and_exact(trained, tmp_path):
    for kind in ("bpe", "sentencepiece"):
        again = train_tokenizer(kind, iter(CORPUS), 400, tmp_path / kind)
        assert again.vocab_size == 400
        assert again.sha256 == load_tokenizer(trained / kind).sha256


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_training_names_the_largest_and_smallest_vocabulary(tmp_path, kind):
    with pytest.raises(ValueError, match=r"vocab_size 5000 is more than .* at most (\d+)") as error:
        train_tokenizer(kind, CORPUS, 5000, tmp_path / "t")
    largest = int(str(error.value).split("at most ")[1].split(".")[0])
    assert train_tokenizer(kind, CORPUS, largest, tmp_path / "largest").vocab_size == largest
    with pytest.raises(ValueError, match=r"vocab_size 100 is too small.* need (\d+)") as error:
        train_tokenizer(kind, CORPUS, 100, tmp_path / "t")
    least = int(str(error.value).rsplit("need ")[1].split()[0])
    assert train_tokenizer(kind, CORPUS, least, tmp_path / "least").vocab_size == least
    with pytest.raises(ValueError, match=f"vocab_size {least - 1} is too small"):
        train_tokenizer(kind, CORPUS, least - 1, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_training_refuses_unknown_kinds_used_directories_and_no_text(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match="'wordpiece'.*'bpe', 'sentencepiece'"):
        train_tokenizer("wordpiece", CORPUS, 400, tmp_path / "t")
    with pytest.raises(ValueError, match="used exists"):
        train_tokenizer("bpe", CORPUS, 400, tmp_path / "used")
    with pytest.raises(ValueError, match="texts are empty"):
        train_tokenizer("sentencepiece", [], 400, tmp_path / "t")


def test_load_names_what_it_found_and_what_it_takes(trained, tmp_path):
    with pytest.raises(FileNotFoundError,
                       match=r"no tokenizer at .*nowhere; accepted: .*tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no tokenizer; accepted.*Found: nothing"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_bytes((trained / "bpe" / "vocab.json").read_bytes())
    with pytest.raises(ValueError, match="no tokenizer; accepted.*Found: vocab.json"):
        load_tokenizer(tmp_path)
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes((trained / "sentencepiece" / "tokenizer.model").read_bytes())
    with pytest.raises(ValueError,
                       match="more than one tokenizer.*Found: a.model, b.model, vocab.json"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path / "a.model").vocab_size == 400
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt is not a tokenizer; accepted"):
        load_tokenizer(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_one_of_gpt2s_two_files_is_no_tokenizer(trained, name):
    with pytest.raises(ValueError, match=f"{name} is one of the two files .*; give the directory"):
        load_tokenizer(trained / "bpe" / name)


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("merges.txt",),
                                   ("tokenizer.json",)])
@pytest.mark.parametrize("change", [lambda text: b"\xef\xbb\xbf" + text,
                                    lambda text: text.replace(b"\n", b"\r\n")],
                         ids=["byte order mark", "CR LF"])
def test_byte_order_marks_and_ends_of_lines_change_no_tokenizer_and_are_not_kept(
        trained, tmp_path, names, change):
    plain = load_tokenizer(trained / "bpe")
    kept = tmp_path / "plain"
    if names == ("tokenizer.json",):
        write_byte_tokenizer(tmp_path, ["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>")
        plain = load_tokenizer(tmp_path / "tokenizer.json")
    plain.save(kept)
    before = {name: (kept / name).read_bytes() for name in names}
    for name, content in before.items():
        (kept / name).write_bytes(change(content))
    marked = load_tokenizer(kept)
    assert marked.sha256 == plain.sha256
    assert marked.encode("a b\r\n") == plain.encode("a b\r\n")
    marked.save(tmp_path / "copy")
    assert before == {name: (tmp_path / "copy" / name).read_bytes() for name in names}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_load_refuses_damaged_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"{tmp_path}.*not a (tokenizer.json|SentencePiece model)"):
        load_tokenizer(tmp_path)


def test_bpe_files_that_tiktoken_would_read_otherwise_are_refused(trained, tmp_path):
    vocab = json.loads((trained / "bpe" / "vocab.json").read_bytes())
    merges = (trained / "bpe" / "merges.txt").read_text(encoding="utf-8").splitlines()

    def load(vocab: dict, merges: list[str]):
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
        return load_tokenizer(tmp_path)

    assert load(vocab, merges).vocab_size == 400
    with pytest.raises(ValueError, match="not in GPT-2's form.*tokenizer.json"):
        load(vocab, [merges[0], merges[2], merges[1], *merges[3:]])
    with pytest.raises(ValueError, match="not in GPT-2's form"):
        load(vocab, merges[:-1])
    with pytest.raises(ValueError, match="without gaps"):
        load({**vocab, "zzz": 1000}, merges)
    with pytest.raises(ValueError, match=r"no <\|endoftext\|>"):
        load({token: i for token, i in vocab.items() if token != "<|endoftext|>"}, merges)


def test_a_published_directory_is_read_in_the_way_that_keeps_its_tokens(trained, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((trained / "bpe" / name).read_bytes())
    description = reference_bpe(tmp_path)
    description.add_special_tokens(["<|endoftext|>"])
    description.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).kind == "gpt2-bpe"

    description.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(),
         tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    description.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.kind == "tokenizers"
    assert tokenizer.encode("x1 2") == description.encode("x1 2").ids


def test_megatron_takes_it_without_warning_and_masks_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # Megatron-Core 0.19 warns where it has to guess it
    import numpy as np
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    tokenizer = load_tokenizer(trained / "bpe")
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.uint16)
    for text in CORPUS:
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "d.idx"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=16,
            blend=([str(tmp_path / "d")], None),
            split="1,0,0",
            path_to_cache=str(tmp_path / "cache"),
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        data = IndexedDataset(str(tmp_path / "d"))
        dataset = GPTDataset(data, str(tmp_path / "d"), np.arange(len(data)), 8, Split.train,
                             config)
        samples = [dataset[i] for i in range(len(dataset))]
    assert samples and all(sample["loss_mask"].min() == 1.0 for sample in samples)
    assert any((sample["labels"] == tokenizer.eod).any() for sample in samples)
    assert tokenizer.sha256 in dataset.unique_description
    assert str(tmp_path) not in json.dumps(tokenizer.unique_identifiers)


@pytest.mark.slow
@pytest.mark.parametrize("blank", [" ", "\n", "\u3000", "\t \u2028"])
def test_blanks_longer_than_the_regex_engine_can_stand(trained, blank):
    """tiktoken's pattern runs out of stack somewhere below a million; U+001C is no blank to it, to
    Python it is."""
    text = f"x\x1c{blank * 1_000_000}y {blank * 1_000_000}\x1cz{blank * 9000}"
    tokenizer = load_tokenizer(trained / "bpe")
    with pytest.raises(ValueError, match="stack"):
        tokenizer._encoding.encode_to_numpy(text, disallowed_special=())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    short = f"x\x1c{blank * 2000}y {blank * 3000}\x1cz{blank * 1500}"
    parts = _before_last_blanks(short)
    assert len(parts) == 3 and "".join(parts) == short
    assert [i for part in parts
            for i in tokenizer.encode(part)] == reference_bpe(trained / "bpe").encode(short).ids


def test_tokenizer_json_of_gpt2s_kind_is_run_by_tiktoken_and_others_are_not(trained, tmp_path):
    plain = load_tokenizer(trained / "tokenizers")
    assert plain.kind == "tokenizers" and plain.gpt2 is not None
    description = json.loads((trained / "tokenizers" / "tokenizer.json").read_bytes())
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {**description["pre_tokenizer"], "add_prefix_space": True}},
        {"model": {**description["model"], "ignore_merges": True}},
        {"added_tokens": [{**description["added_tokens"][0], "special": False}]},
        {"added_tokens": [*description["added_tokens"],
                          {**description["added_tokens"][0], "id": plain.vocab_size,
                           "content": "<x>"}]},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**description, **change}))
        tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
        assert tokenizer.gpt2 is None, change
        assert tokenizer.encode_array("one two").tolist() == tokenizer.encode("one two")


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "tokenizers"])
def test_bytes_of_text_without_the_ends_of_documents(trained, kind):
    tokenizer = load_tokenizer(trained / kind)
    for text in ROUND_TRIP + CORPUS:
        ids = tokenizer.encode(text)
        assert tokenizer.text_bytes([tokenizer.eod, *ids, tokenizer.eod]) == len(text.encode())
    ids = tokenizer.encode(CORPUS[2])
    halves = [tokenizer.text_bytes(half) for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :])]
    assert sum(halves) == pytest.approx(len(CORPUS[2].encode()), abs=0 if kind == "bpe" else 12)
