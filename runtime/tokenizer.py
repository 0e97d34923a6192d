"""Text to token ids and back, from the files of a checkpoint or from GGUF metadata alone."""
from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sbedge.errors import InputError, TokenizerError

from .detokenizer import StreamDecoder
from .vocabulary import (
    MAX_VOCABULARY,
    BpeVocabulary,
    SentencePieceVocabulary,
    TokenType,
    Vocabulary,
    write_bytes,
    write_text,
)

_MAX_FILE = 256 << 20  # bytes; the largest real tokenizer.json has about 35 MB
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json",
                     "special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja")
# Chat models end their turn with ChatML's marker whether or not their config says so.
_ALWAYS_ENDS = ("<|im_end|>", "<|endoftext|>")
# Slow tokenizers (vocab.json + merges.txt) name their splitting rule only by class.
_PRE_OF_CLASS = {None: "qwen2", "Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}


@dataclass
class Tokenizer:
    """Encodes text to token ids and decodes them.

    Special tokens (`<|im_end|>`) written in a text become their ids only with `parse_special`.
    """

    vocabulary: Vocabulary
    bos_id: int | None = None
    eos_id: int | None = None                      # the one chat templates call eos_token
    eos_ids: frozenset[int] = frozenset()          # generation stops at any of these
    add_bos: bool = False                          # whether encode puts bos_id first
    chat_template: str | None = None               # Jinja source
    files: dict[str, Path] = field(default_factory=dict)  # originals, copied by save_to_folder

    def __post_init__(self) -> None:
        texts = sorted(self.vocabulary.special, key=len, reverse=True)  # the longest match wins
        self._special = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        self.special_ids = frozenset(self.vocabulary.special.values())
        always = {self.vocabulary.special[text] for text in _ALWAYS_ENDS if text in self.vocabulary.special}
        self.eos_ids = frozenset(self.eos_ids | always | ({self.eos_id} if self.eos_id is not None else set()))

    # --- reading -----------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """From `tokenizer.json`, else `vocab.json` + `merges.txt`, else sentencepiece's `tokenizer.model`.

        Raises TokenizerError naming the file that is missing or damaged.
        """
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json")
        vocabulary = _vocabulary_of_folder(folder, config)
        bos_id, eos_id = (_id_of(vocabulary, config.get(key)) for key in ("bos_token", "eos_token"))
        ends: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            value = _read_json(folder / name).get("eos_token_id")
            ends.update(_ids(value if isinstance(value, list) else [value], f"{name}: eos_token_id"))
        add_bos = config.get("add_bos_token")
        if add_bos is None:
            # Llama's tokenizer class adds it by default; a tokenizer.json says so in its post-processor.
            add_bos = vocabulary.prepends(bos_id) if isinstance(vocabulary, BpeVocabulary) else bos_id is not None
        files = {name: folder / name for name in _VOCABULARY_FILES if (folder / name).is_file()}
        return cls(vocabulary, bos_id, eos_id, frozenset(ends), bool(add_bos), _chat_template(folder, config), files)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From the `tokenizer.*` keys of a GGUF file, as llama.cpp writes them. Raises TokenizerError."""
        try:
            return cls._from_gguf(metadata)
        except (ValueError, TypeError, OverflowError) as error:  # a value of another type than its key's
            raise TokenizerError(f"GGUF metadata: a damaged tokenizer key ({error}); export the model again") from None

    @classmethod
    def _from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        model = metadata.get("tokenizer.ggml.model")
        if model not in ("gpt2", "llama"):
            raise TokenizerError(f"tokenizer.ggml.model: found {model!r}, expected 'gpt2' (byte-level BPE) or "
                                 "'llama' (sentencepiece)")
        tokens = _strings(metadata, "tokens")
        types = [int(value) for value in metadata.get("tokenizer.ggml.token_type", ())]
        types = types or [int(TokenType.NORMAL)] * len(tokens)
        if len(types) != len(tokens):
            raise TokenizerError(f"tokenizer.ggml.token_type: {len(types)} types for {len(tokens)} tokens; "
                                 "export the model again")
        if bad := set(types) - set(TokenType):
            raise TokenizerError(f"tokenizer.ggml.token_type: found {min(bad)}, expected 1..6; export the model again")
        pre = metadata.get("tokenizer.ggml.pre", "default")
        template = metadata.get("tokenizer.chat_template")
        if not isinstance(pre, str) or not isinstance(template, (str, type(None))):
            raise TokenizerError("tokenizer.ggml.pre or tokenizer.chat_template is not a text; export the model again")
        vocabulary: Vocabulary
        if model == "gpt2":
            vocabulary = BpeVocabulary.from_gguf(tokens, types, _strings(metadata, "merges"), pre)
        else:
            scores = metadata.get("tokenizer.ggml.scores", ())
            vocabulary = SentencePieceVocabulary.from_gguf(tokens, types, scores, metadata)
        ids = {name: _gguf_id(metadata, name, len(tokens)) for name in ("bos", "eos", "eot", "eom")}
        ends = {id for name, id in ids.items() if name != "bos" and id is not None}
        ends.update(_ids(metadata.get("tokenizer.ggml.eos_token_ids", ()), "tokenizer.ggml.eos_token_ids"))
        default = model == "llama" or pre == "llama-bpe"  # as llama.cpp
        add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", default)) and ids["bos"] is not None
        return cls(vocabulary, ids["bos"], ids["eos"], frozenset(ends), add_bos, template)

    # --- using -------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Highest token id + 1. A model may have more rows: some pad their embedding matrix."""
        return self.vocabulary.size

    @property
    def space_prefix(self) -> bool:
        return self.vocabulary.space_prefix

    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool | None = None) -> list[int]:
        """Token ids of `text`; `add_bos` None does as the tokenizer's own configuration says."""
        ids = [self.bos_id] if (self.add_bos if add_bos is None else add_bos) and self.bos_id is not None else []
        return ids + self.encode_parts(self.split_special(text) if parse_special else [text])

    def split_special(self, text: str) -> list[str | int]:
        """`text` cut at the special tokens written in it, each replaced by its id."""
        parts: list[str | int] = []
        end = 0
        for found in self._special.finditer(text):
            parts += [text[end : found.start()], self.vocabulary.special[found.group()]]
            end = found.end()
        parts.append(text[end:])
        return [part for part in parts if part != ""]

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of a mixed list: ids stay, texts are encoded as plain text."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self.vocabulary.encode(_no_surrogates(part))
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, at_start: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. For `at_start` see StreamDecoder."""
        decoder = StreamDecoder(self, skip_special=skip_special, at_start=at_start)
        return "".join([decoder.push(id) for id in ids]) + decoder.flush()

    def token_bytes(self, id: int) -> bytes:
        """Bytes of one token. Empty for an id past the vocabulary: models pad theirs with unused rows."""
        if id < 0:
            raise InputError(f"token id {id}, expected 0 or more")
        return self.vocabulary.token_bytes(int(id))

    def token_text(self, id: int | None) -> str:
        """One token as text, "" for None."""
        return "" if id is None else self.token_bytes(id).decode("utf-8", "replace")

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Raise TokenizerError if this tokenizer has ids that the model has no row for."""
        if self.vocab_size > model_vocab_size:
            raise TokenizerError(f"the tokenizer has {self.vocab_size} tokens but the model's vocabulary only "
                                 f"{model_vocab_size}; use the tokenizer files that came with the model")

    # --- writing -----------------------------------------------------------------------------------

    def to_gguf_metadata(self, vocab_size: int | None = None) -> dict[str, Any]:
        """All `tokenizer.*` keys of a GGUF file, padded with `[PADn]` up to the model's `vocab_size`.

        `*_token_id` are meant as uint32, `token_type` as int32, `scores` as float32 arrays.
        `tokenizer.ggml.eos_token_ids` is ours: llama.cpp has one key per role and we keep the whole set.
        """
        size = self.vocab_size if vocab_size is None else vocab_size
        self.check_vocabulary(size)
        keys = self.vocabulary.to_gguf(size)
        keys["tokenizer.ggml.add_bos_token"] = self.add_bos
        if self.bos_id is not None:
            keys["tokenizer.ggml.bos_token_id"] = self.bos_id
        if self.eos_id is not None:
            keys["tokenizer.ggml.eos_token_id"] = self.eos_id
        if (end_of_turn := self.vocabulary.special.get("<|im_end|>")) is not None:
            keys["tokenizer.ggml.eot_token_id"] = end_of_turn
        if self.eos_ids:
            keys["tokenizer.ggml.eos_token_ids"] = sorted(self.eos_ids)
        if self.chat_template is not None:
            keys["tokenizer.chat_template"] = self.chat_template
        return keys

    def save_to_folder(self, path: str | Path) -> None:
        """Write files from which `from_folder` makes this tokenizer again: the originals where there are any.

        `generation_config.json` is written with the full set of end tokens.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for name, original in self.files.items():
            write_bytes(folder / name, original.read_bytes())
        if not self.files:
            self.vocabulary.save(folder)
            config: dict[str, Any] = {"add_bos_token": self.add_bos}
            for key, id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
                config[key] = None if id is None else self.token_text(id)
            if self.chat_template is not None:
                config["chat_template"] = self.chat_template
            write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False))
        generation = {"bos_token_id": self.bos_id, "eos_token_id": sorted(self.eos_ids)}
        write_text(folder / "generation_config.json", json.dumps(generation, indent=2))


def _vocabulary_of_folder(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    model_file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file():
        text = _read_text(folder / "tokenizer.json")
        # Llama-type tokenizer.json files spell sentencepiece's rules; the model beside them is the original.
        if '"ByteLevel"' in text or not model_file.is_file():
            return BpeVocabulary.from_json(text, "tokenizer.json")
    elif (folder / "vocab.json").is_file():
        return _vocabulary_of_merges(folder, config)
    if model_file.is_file():
        return SentencePieceVocabulary.from_bytes(_read_bytes(model_file), _added_tokens(folder, config),
                                                  "tokenizer.model")
    raise TokenizerError(f"{folder}: no tokenizer.json, vocab.json + merges.txt, or tokenizer.model; "
                         "copy the tokenizer files of the checkpoint there")


def _vocabulary_of_merges(folder: Path, config: Mapping[str, Any]) -> BpeVocabulary:
    if not (folder / "merges.txt").is_file():
        raise TokenizerError(f"{folder / 'merges.txt'}: missing, and vocab.json needs it; fetch it too")
    kind = config.get("tokenizer_class")
    pre = _PRE_OF_CLASS.get(kind.removesuffix("Fast") if isinstance(kind, str) else None)
    if pre is None:
        raise TokenizerError(f"tokenizer_config.json: tokenizer_class {kind!r} is not known; provide tokenizer.json")
    vocab = _read_json(folder / "vocab.json")
    _ids(vocab.values(), "vocab.json")
    added = _added_tokens(folder, config)
    tokens = vocab | {text: id for text, (id, _) in added.items()}
    if len(set(tokens.values())) != len(tokens):
        raise TokenizerError("vocab.json: two tokens share an id; fetch it and the added tokens again")
    lines = _read_text(folder / "merges.txt").split("\n")
    merges = [line for i, line in enumerate(lines) if line and not (i == 0 and line.startswith("#version"))]
    return BpeVocabulary.build(tokens, merges, {text: special for text, (_, special) in added.items()}, pre,
                               "merges.txt")


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """Tokens added to the base vocabulary: text -> (id, special)."""
    decoder = config.get("added_tokens_decoder")
    try:
        if decoder:
            return {entry["content"]: (_ids([int(id)], "added_tokens_decoder")[0], bool(entry.get("special")))
                    for id, entry in decoder.items()}
        roles = _read_json(folder / "special_tokens_map.json")
        named = [entry for role in roles.values() for entry in (role if isinstance(role, list) else [role])]
        special = {entry["content"] if isinstance(entry, dict) else entry for entry in named}
        added = _read_json(folder / "added_tokens.json")
        _ids(added.values(), "added_tokens.json")
        return {text: (id, text in special) for text, id in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise TokenizerError(f"{folder.name}: tokenizer_config.json, added_tokens.json or special_tokens_map.json "
                             "has an added token without content or id; fetch them again") from None


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is None and (folder / "chat_template.jinja").is_file():
        template = _read_text(folder / "chat_template.jinja")
    if template is not None and not isinstance(template, str):
        raise TokenizerError("tokenizer_config.json: chat_template is not a text; fetch the file again")
    return template


def _id_of(vocabulary: Vocabulary, token: Any) -> int | None:
    """Id of a token named in tokenizer_config.json: a text, or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return vocabulary.token_id(text) if isinstance(text, str) else None


def _ids(values: Iterable[Any], what: str) -> list[int]:
    """The values that are not None, each checked to be a possible token id."""
    ids = [value for value in values if value is not None]
    for value in ids:
        if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= value < MAX_VOCABULARY:
            raise TokenizerError(f"{what}: token id {value!r:.40}, expected 0..{MAX_VOCABULARY - 1}; "
                                 "fetch the file again")
    return [int(value) for value in ids]


def _gguf_id(metadata: Mapping[str, Any], name: str, tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    ids = _ids([metadata.get(key)], key)
    if ids and ids[0] >= tokens:
        raise TokenizerError(f"{key}: {ids[0]}, expected less than the {tokens} tokens; export the model again")
    return ids[0] if ids else None


def _strings(metadata: Mapping[str, Any], name: str) -> Sequence[str]:
    key = f"tokenizer.ggml.{name}"
    values = metadata.get(key)
    if values is None or isinstance(values, str) or len(values) > 2 * MAX_VOCABULARY:
        raise TokenizerError(f"{key}: missing or of absurd size; export the model again")
    values = list(values)
    if not all(isinstance(value, str) for value in values):
        raise TokenizerError(f"{key}: found something that is not a text; export the model again")
    return values


def _no_surrogates(text: str) -> str:
    """Lone surrogates (from a shell or JSON) are no Unicode text; they become U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_bytes(path: Path) -> bytes:
    if path.stat().st_size > _MAX_FILE:
        raise TokenizerError(f"{path}: {path.stat().st_size} bytes, expected at most {_MAX_FILE}; not a tokenizer file")
    return path.read_bytes()


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 at byte {error.start}; fetch the file again") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: found a JSON {type(value).__name__}, expected an object; fetch the file again")
    return value
