"""Text that spells a tokenizer's special tokens stays text, whatever kind of tokenizer it is; one
that cannot promise it, or that loses more than text can spare, is refused or said to at load."""

from __future__ import annotations

import io
import json
import pickle

import pytest
import sentencepiece
import tokenizers
from byte_tokenizers import write_byte_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["the quick brown fox, jumps over < / s > and [ SEP ] or [ PAD ] of | endoftext |",
         "a text that spells </s> and <unk> and [SEP] and <|endoftext|> and <|eod|> again</s>",
         "</s> at the start, in mid</s>word, twice </s></s>, and at the end</s>"] * 9
SPECIALS = ["<unk>", "</s>", "[SEP]", "<|eod|>"]
SPELLED = [part.format(name) for name in SPECIALS
           for part in ("{}", " {}", "{} ", "a {} b", "a{}b", "{0}{0}", "{0} {0}", "\n{}\n")]


def bare(model, cut, decoder=None, normalizer=None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = cut
    if decoder:
        made.decoder = decoder
    if normalizer:
        made.normalizer = normalizer
    return made


BLANKS, BYTES = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)
COMMON = {"special_tokens": SPECIALS, "show_progress": False}
KINDS = {
    "byte-level BPE": (lambda: bare(models.BPE(), BYTES, decoders.ByteLevel()),
                       lambda: trainers.BpeTrainer(vocab_size=400, **COMMON, initial_alphabet=(
                           pre_tokenizers.ByteLevel.alphabet()))),
    "byte-level BPE of whole words": (
        lambda: bare(models.BPE(ignore_merges=True), pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(r"\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
            decoders.ByteLevel()),
        lambda: trainers.BpeTrainer(vocab_size=400, **COMMON, initial_alphabet=(
            pre_tokenizers.ByteLevel.alphabet()))),
    "byte-level BPE with special tokens apart": (
        lambda: bare(models.BPE(), pre_tokenizers.Sequence([pre_tokenizers.Digits(), BYTES]),
                     decoders.ByteLevel()),
        lambda: trainers.BpeTrainer(vocab_size=262, show_progress=False, initial_alphabet=(
            pre_tokenizers.ByteLevel.alphabet()))),
    "BPE of words": (lambda: bare(models.BPE(unk_token="<unk>"), BLANKS),
                     lambda: trainers.BpeTrainer(vocab_size=150, **COMMON)),
    "BPE with word ends": (
        lambda: bare(models.BPE(unk_token="<unk>", end_of_word_suffix="@"), BLANKS,
                     decoders.BPEDecoder("@")),
        lambda: trainers.BpeTrainer(vocab_size=150, end_of_word_suffix="@", **COMMON)),
    "BPE with marks inside words": (
        lambda: bare(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"), BLANKS,
                     decoders.WordPiece()),
        lambda: trainers.BpeTrainer(vocab_size=250, continuing_subword_prefix="##", **COMMON)),
    "Unigram": (lambda: bare(models.Unigram(), pre_tokenizers.Metaspace(), decoders.Metaspace()),
                lambda: trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", **COMMON)),
    "Unigram, normalized": (
        lambda: bare(models.Unigram(), pre_tokenizers.Metaspace(prepend_scheme="never"),
                     decoders.Metaspace(prepend_scheme="never"),
                     normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
        lambda: trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", **COMMON)),
    "WordLevel": (lambda: bare(models.WordLevel(unk_token="<unk>"), BLANKS),
                  lambda: trainers.WordLevelTrainer(**COMMON)),
    "WordPiece": (lambda: bare(models.WordPiece(unk_token="<unk>"), BLANKS, decoders.WordPiece()),
                  lambda: trainers.WordPieceTrainer(vocab_size=150, **COMMON)),
    "WordPiece as BERT cuts": (
        lambda: bare(models.WordPiece(unk_token="<unk>"), pre_tokenizers.BertPreTokenizer(),
                     decoders.WordPiece(), normalizers.BertNormalizer()),
        lambda: trainers.WordPieceTrainer(vocab_size=150, **COMMON)),
}


@pytest.fixture(scope="module")
def trained():
    """Kind -> a tokenizer of it, trained on texts that spell its special tokens."""
    made = {}
    for kind, (make, trainer) in KINDS.items():
        made[kind] = make()
        made[kind].train_from_iterator(TEXTS, trainer())
        made[kind].add_special_tokens(SPECIALS)
    return made


def load(directory, description: dict | tokenizers.Tokenizer, end: str | None = None):
    directory.mkdir(exist_ok=True)
    text = (description.to_str() if isinstance(description, tokenizers.Tokenizer)
            else json.dumps(description))
    (directory / "tokenizer.json").write_text(text)
    return load_tokenizer(directory, end)


@pytest.mark.parametrize("kind", KINDS)
def test_spelled_special_tokens_stay_text(trained, tmp_path, kind):
    tokenizer, reference = load(tmp_path, trained[kind]), trained[kind]
    ids = {reference.token_to_id(name) for name in SPECIALS} - {reference.token_to_id("<unk>")}
    for text in SPELLED + TEXTS:
        for found in (tokenizer.encode(text), tokenizer.encode_array(text).tolist(),
                      *tokenizer.encode_batch([text])):
            assert found and not ids & set(found), (text, found)
    assert tokenizer.eod == reference.token_to_id("</s>")
    assert tokenizer.vocab_size == max(reference.get_vocab().values()) + 1
    assert tokenizer.end_token in tokenizer.decode([tokenizer.eod])
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert [copy.encode(t) for t in SPELLED] == [tokenizer.encode(t) for t in SPELLED]


@pytest.mark.parametrize("kind", KINDS)
def test_other_text_has_the_ids_of_the_library(trained, tmp_path, kind):
    tokenizer, reference = load(tmp_path, trained[kind]), trained[kind]
    for text in (TEXTS[0], "fox over  the quick text", "it\n\nis 漢字", "x" * 300, ""):
        expected = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == expected == tokenizer.encode_batch([text])[0], text


@pytest.mark.parametrize("kind", ["byte-level BPE", "byte-level BPE of whole words"])
def test_what_keeps_every_byte_keeps_spelled_tokens(trained, tmp_path, caplog, kind):
    tokenizer = load(tmp_path, trained[kind])
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in SPELLED + TEXTS)
    assert "does not keep" not in caplog.text


@pytest.mark.parametrize("how", ["special", "not special", "not added"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_documents_may_be_named(trained, tmp_path, kind, how):
    description = json.loads(trained[kind].to_str())
    for token in list(description["added_tokens"]):
        if token["content"] == "<|eod|>" and how != "special":
            token["special"] = False
            if how == "not added":
                description["added_tokens"].remove(token)
    usual = load(tmp_path / "one", description)
    if how == "not added" and "apart" in kind:  # then there is no such token
        with pytest.raises(ValueError, match=r"has no token '<\|eod\|>'"):
            load(tmp_path / "two", description, "<|eod|>")
        return
    tokenizer = load(tmp_path / "two", description, "<|eod|>")
    assert tokenizer.eod == trained[kind].token_to_id("<|eod|>") != usual.eod
    assert not any(tokenizer.eod in tokenizer.encode(text) for text in SPELLED + TEXTS)
    assert tokenizer.sha256 != usual.sha256
    assert load(tmp_path / "two", description, "</s>").sha256 == usual.sha256
    tokenizer.save(tmp_path / "saved")
    for copy in (load_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
        assert (copy.eod, copy.sha256) == (tokenizer.eod, tokenizer.sha256)
        assert copy.encode(SPELLED[-1]) == tokenizer.encode(SPELLED[-1])


def test_an_end_of_documents_without_a_name_is_refused(trained, tmp_path):
    """It is not the usual one."""
    with pytest.raises(ValueError, match="the vocabulary has no token '' to end documents with"):
        load(tmp_path, trained["byte-level BPE"], "")


def test_added_tokens_that_are_not_special_are_found_as_before(trained, tmp_path):
    made = tokenizers.Tokenizer.from_str(trained["byte-level BPE"].to_str())
    made.add_tokens([AddedToken("<tool>", special=False), AddedToken("    ", normalized=False)])
    tokenizer = load(tmp_path, made)
    for text in ("call <tool> now", "x    y", "<tool>"):
        assert tokenizer.encode(text) == made.encode(text).ids
    assert tokenizer.encode("<tool>") == [made.token_to_id("<tool>")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_named_end_may_be_an_added_token_that_is_not_special(trained, tmp_path, kind):
    made = tokenizers.Tokenizer.from_str(trained[kind].to_str())
    made.add_tokens(["<the end>"])
    if kind == "WordLevel":  # trained on its special tokens, `tokenizers` gives a word's id away
        with pytest.raises(ValueError, match="gives '<the end>' and '.*' the id"):
            load(tmp_path, made, "<the end>")
        return
    tokenizer = load(tmp_path, made, "<the end>")
    assert tokenizer.eod == made.token_to_id("<the end>") in made.encode("a <the end> b").ids
    assert tokenizer.eod not in tokenizer.encode("a <the end> b<the end>")


def test_a_full_width_name_is_no_special_token_after_normalization(trained, tmp_path):
    tokenizer = load(tmp_path, trained["Unigram, normalized"])
    assert tokenizer.eod not in tokenizer.encode("a ＜/ｓ＞ b </S>")


def test_bytes_stand_for_rare_characters_even_where_they_are_called_special(tmp_path):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{b:02X}>", -9.0) for b in range(256)),
              ("a", -1.0), ("\u2581", -1.0)]
    made = bare(models.Unigram(pieces, 0, byte_fallback=True), pre_tokenizers.Metaspace(),
                decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))
    made.add_special_tokens([piece for piece, _ in pieces[:258]])
    tokenizer = load(tmp_path, made)
    assert tokenizer.encode("a\u6f22") == [259, 258, 2 + 0xE6, 2 + 0xBC, 2 + 0xA2]
    assert tokenizer.decode(tokenizer.encode("a </s>\n\u6f22")).endswith("</s>\n\u6f22")


def test_one_without_a_token_for_what_it_does_not_know_is_refused(tmp_path):
    made = bare(models.Unigram([("</s>", 0.0), ("a", -1.0), ("\u2581", -1.0)], None),
                pre_tokenizers.Metaspace(), decoders.Metaspace())
    with pytest.raises(ValueError, match="cannot encode .*token for what it does not know"):
        load(tmp_path, made)


def test_dropout_of_a_description_is_left_out(trained, tmp_path):
    """Preprocessing is to give the same ids at every call."""
    description = json.loads(trained["byte-level BPE"].to_str())
    sure = load(tmp_path / "sure", description)
    description["model"]["dropout"] = 0.9
    tokenizer = load(tmp_path / "random", description)
    assert all(tokenizer.encode(text) == sure.encode(text) for text in TEXTS)


def test_a_description_of_before_models_had_types(trained, tmp_path):
    description = json.loads(trained["byte-level BPE"].to_str())
    del description["model"]["type"]
    tokenizer = load(tmp_path, description)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in SPELLED)
    assert tokenizer.eod not in tokenizer.encode("".join(SPELLED))
    description["model"]["unk_token"] = "</s>"  # as GPT-2's tokenizers are published
    assert load(tmp_path / "unknown", description).encode(SPELLED[3]) == tokenizer.encode(
        SPELLED[3])


def test_what_cannot_be_promised_is_refused_at_load(trained, tmp_path):
    words = json.loads(trained["WordLevel"].to_str())
    for name, description, end, said in (
        ("unknown", words, "<unk>", "is the token of unknown text, which would end documents"),
        ("unigram", json.loads(trained["Unigram"].to_str()), "<unk>", "token of unknown text"),
        ("none", {**words, "model": {**words["model"], "unk_token": "<gone>"}}, None,
         "cannot encode 'a  b'.*token for what it does not know"),
        ("missing", words, "<|end|>", r"no token '<\|end\|>' to end documents with; .*eod"),
        ("letter", json.loads(trained["Unigram"].to_str()), "x", "'x' cannot end documents"),
    ):
        with pytest.raises(ValueError, match=said):
            load(tmp_path / name, description, end)


SENTENCEPIECE = {
    "eos": {}, "named": {"user_defined_symbols": ["<|eod|>"]}, "unigram": {"model_type": "unigram"},
    "control": {"control_symbols": ["<|eod|>", "[SEP]"]},
    "user's </s>": {"user_defined_symbols": ["</s>"], "eos_id": -1},
    "bytes": {"byte_fallback": True, "vocab_size": 400, "user_defined_symbols": ["<|eod|>"]},
    "words": {"model_type": "word"}, "characters": {"model_type": "char"},
}


def sentence_piece(directory, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, hard_vocab_limit=False,
        **{"vocab_size": 80, "model_type": "bpe", **options})
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("piece", ["<unk>", "<unknown>"])
def test_the_piece_of_unknown_text_ends_no_documents_of_sentencepiece(tmp_path, piece):
    sentence_piece(tmp_path, unk_piece=piece)
    with pytest.raises(ValueError, match=f"'{piece}' is the piece of unknown text"):
        load_tokenizer(tmp_path, piece)
    assert load_tokenizer(tmp_path).end_token == "</s>"


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_keeps_spelled_tokens_text(tmp_path, kind):
    reference = sentence_piece(tmp_path / "model", **SENTENCEPIECE[kind])
    ends = ["</s>"] + ["<|eod|>"] * (reference.piece_to_id("<|eod|>") != reference.unk_id())
    for end in ends:
        tokenizer = load_tokenizer(tmp_path / "model", end)
        assert tokenizer.eod == reference.piece_to_id(end)
        for text in SPELLED + TEXTS:
            ids = tokenizer.encode(text)
            assert tokenizer.eod not in ids, (text, ids)
            if end not in text:
                assert ids == reference.encode(text)
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert (copy.eod, copy.sha256) == (tokenizer.eod, tokenizer.sha256)
        assert copy.encode(SPELLED[-1]) == tokenizer.encode(SPELLED[-1])


def test_what_a_tokenizer_loses_is_said_at_load(trained, tmp_path, caplog):
    sentence_piece(tmp_path / "lossy")
    load_tokenizer(tmp_path / "lossy")
    for what in ("runs of blanks", "line breaks", "compatibility characters", "rare characters"):
        assert what in caplog.text
    caplog.clear()
    load_tokenizer(tmp_path / "lossy")
    assert not caplog.text  # once
    load(tmp_path / "low", trained["Unigram, normalized"])
    assert "capitals" in caplog.text
    for place in (tmp_path / "lossy", tmp_path / "low"):
        caplog.clear()
        (file,) = place.iterdir()
        load_tokenizer(file)  # a file alone is asked as its directory is
        assert "does not keep" in caplog.text
    caplog.clear()
    train_tokenizer("sentencepiece", TEXTS, 330, tmp_path / "ours")
    train_tokenizer("bpe", TEXTS, 300, tmp_path / "bytes")
    for name in ("ours", "bytes"):
        load_tokenizer(tmp_path / name)
    assert not caplog.text


def test_a_token_of_another_id_than_its_file_says_is_refused(tmp_path):
    """The library numbers tokens without gaps; the model was trained with the file's number."""
    write_byte_tokenizer(tmp_path, ["<|endoftext|>", "<|tool|>"], "<|tool|>", "<|endoftext|>")
    path = tmp_path / "tokenizer.json"
    said = json.loads(path.read_text())
    load_tokenizer(tmp_path)
    said["added_tokens"][-1]["id"] += 10
    said["model"]["vocab"].pop("<|tool|>", None)
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="gives the token '<.tool.>' the id .* "
                                         "or write the id that it has"):
        load_tokenizer(tmp_path)
