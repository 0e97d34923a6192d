"""Byte-level BPE and sentencepiece behind one small interface; `Tokenizer` adds all that they share.

Both number their kinds of tokens alike, as sentencepiece and GGUF do (`tokenizer.ggml.token_type`).
"""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_pb2

from sbedge.errors import TokenizerError

from .pretokenizers import PRETOKENIZERS, is_byte_level, recognize

_pb: Any = sentencepiece_pb2  # generated code without types

MAX_VOCABULARY = 1 << 22  # no real vocabulary has 4 million tokens; a damaged file may claim billions


class TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3       # special: matched only where the caller allows it
    USER_DEFINED = 4  # an added token that is ordinary text: always matched
    UNUSED = 5
    BYTE = 6


class Vocabulary(Protocol):
    size: int               # highest id + 1
    special: dict[str, int]  # text of each special token -> id
    space_prefix: bool      # encoding puts a space before text, decoding takes it away again

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written in it are text like any other."""

    def token_id(self, token: str) -> int | None: ...

    def token_bytes(self, id: int) -> bytes:
        """What the token stands for; empty for an id without a token."""

    def to_gguf(self, size: int) -> dict[str, Any]:
        """`tokenizer.ggml.*` keys, padded with unused tokens up to `size`."""

    def save(self, folder: Path) -> None: ...


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


class BpeVocabulary:
    """Byte-level BPE (Qwen2.5, SmolLM2, Llama 3), run by the `tokenizers` library."""

    space_prefix = False

    def __init__(self, hf: tokenizers.Tokenizer, source: str) -> None:
        if not is_byte_level(hf):
            raise TokenizerError(f"{source}: not a byte-level BPE; put its sentencepiece tokenizer.model beside it")
        hf.no_truncation()
        hf.no_padding()
        hf.encode_special_tokens = True  # Tokenizer matches special tokens itself, where they are allowed
        self._hf = hf
        self._added = hf.get_added_tokens_decoder()
        self.size = max(hf.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < self.size <= MAX_VOCABULARY:
            raise TokenizerError(f"{source}: highest token id {self.size - 1}, expected 0..{MAX_VOCABULARY - 1}; "
                                 "the file is damaged, fetch it again")
        for token in self._added.values():
            if token.lstrip or token.rstrip or token.single_word:
                raise TokenizerError(f"{source}: added token {token.content!r} takes the spaces around it "
                                     "(lstrip, rstrip or single_word), which is not supported")
        self.special = {token.content: id for id, token in self._added.items() if token.special}

    @classmethod
    def from_json(cls, text: str, source: str) -> BpeVocabulary:
        """From the text of a `tokenizer.json`."""
        try:
            hf = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{source}: not a tokenizer ({_one_line(error)}); fetch the file again") from None
        return cls(hf, source)

    @classmethod
    def build(cls, tokens: Mapping[str, int], merges: Iterable[str], added: Mapping[str, bool], pre: str,
              source: str) -> BpeVocabulary:
        """From its parts. `tokens` holds the added ones too; `added` says of each whether it is special."""
        if pre not in PRETOKENIZERS:
            raise TokenizerError(f"{source}: unknown pre-tokenizer {pre!r}; known: {', '.join(PRETOKENIZERS)}")
        pairs: list[tuple[str, str]] = []
        for merge in merges:
            left, _, right = merge.partition(" ")
            if not (left and right) or " " in right:
                raise TokenizerError(f"{source}: merge {merge!r:.80} is not two tokens; fetch the file again")
            pairs.append((left, right))
        if len(tokens) > 256 and not pairs:
            raise TokenizerError(f"{source}: no merges for {len(tokens)} tokens; fetch the file again")
        if max(tokens.values(), default=0) >= MAX_VOCABULARY or min(tokens.values(), default=0) < 0:
            raise TokenizerError(f"{source}: token ids up to {max(tokens.values())}, expected "
                                 f"0..{MAX_VOCABULARY - 1}; fetch the file again")
        rule = PRETOKENIZERS[pre]
        try:
            model = tokenizers.models.BPE(vocab=dict(tokens), merges=pairs, ignore_merges=rule.ignore_merges)
        except Exception as error:
            raise TokenizerError(f"{source}: {_one_line(error)}; vocabulary and merges do not belong together, "
                                 "fetch both again") from None
        hf = tokenizers.Tokenizer(model)
        rule.apply_to(hf)
        hf.decoder = tokenizers.decoders.ByteLevel()
        hf.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False)
                       for text, special in added.items()])
        return cls(hf, source)

    @classmethod
    def from_gguf(cls, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str
                  ) -> BpeVocabulary:
        ids: dict[str, int] = {}
        for id, token in enumerate(tokens):
            if types[id] == TokenType.UNUSED and token == f"[PAD{id}]":
                continue  # filler up to the rows of the embedding matrix
            if ids.setdefault(token, id) != id:
                raise TokenizerError(f"tokenizer.ggml.tokens: {token!r:.80} is both token {ids[token]} and {id}; "
                                     "export the model again")
        added = {token: types[id] == TokenType.CONTROL for token, id in ids.items()
                 if types[id] in (TokenType.CONTROL, TokenType.USER_DEFINED)}
        return cls.build(ids, merges, added, pre, "GGUF metadata")

    def encode(self, text: str) -> list[int]:
        return self._hf.encode(text, add_special_tokens=False).ids

    def token_id(self, token: str) -> int | None:
        return self._hf.token_to_id(token)

    def token_bytes(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].content.encode("utf-8", "surrogatepass")
        token = self._hf.id_to_token(id) or ""
        try:
            return bytes([_BYTE_OF[char] for char in token])
        except KeyError:  # not spelled in the byte alphabet, so it stands for itself
            return token.encode()

    def prepends(self, id: int | None) -> bool:
        """Whether the file's post-processor puts token `id` before every text."""
        return id is not None and self._hf.encode("").ids[:1] == [id]

    def to_gguf(self, size: int) -> dict[str, Any]:
        model = json.loads(self._hf.to_str())["model"]
        pre = recognize(self._hf, ignore_merges=bool(model.get("ignore_merges")))
        if pre is None:
            raise TokenizerError("tokenizer.json: its pre-tokenizer has no name in GGUF; export to ONNX instead "
                                 f"(GGUF knows {', '.join(PRETOKENIZERS)})")
        tokens = [f"[PAD{id}]" for id in range(size)]
        types = [int(TokenType.UNUSED)] * size
        for token, id in self._hf.get_vocab(with_added_tokens=True).items():
            tokens[id], types[id] = token, int(TokenType.NORMAL)
        for id, added in self._added.items():
            types[id] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        return {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges,
        }

    def save(self, folder: Path) -> None:
        write_text(folder / "tokenizer.json", self._hf.to_str())


class SentencePieceVocabulary:
    """Sentencepiece BPE (Llama, Mistral), run by the `sentencepiece` library."""

    def __init__(self, proto: Any, source: str) -> None:
        self.size = len(proto.pieces)
        if not 0 < self.size <= MAX_VOCABULARY:
            raise TokenizerError(f"{source}: {self.size} tokens, expected 1..{MAX_VOCABULARY}; fetch it again")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        except Exception as error:  # RuntimeError or OSError, by version
            raise TokenizerError(f"{source}: not a sentencepiece model ({_one_line(error)}); fetch it again") from None
        self._proto = proto
        self.special = {piece.piece: id for id, piece in enumerate(proto.pieces)
                        if piece.type in (TokenType.CONTROL, TokenType.UNKNOWN)}
        self._ids = {piece.piece: id for id, piece in enumerate(proto.pieces)}
        self.space_prefix = proto.normalizer_spec.add_dummy_prefix

    @classmethod
    def from_bytes(cls, data: bytes, added: Mapping[str, tuple[int, bool]], source: str) -> SentencePieceVocabulary:
        """From a `tokenizer.model`, with the tokens added to it: text -> (id, special)."""
        proto = _pb.ModelProto()
        try:
            proto.ParseFromString(data)
        except Exception as error:
            raise TokenizerError(f"{source}: not a sentencepiece model ({_one_line(error)}); fetch it again") from None
        for token, (id, special) in sorted(added.items(), key=lambda item: item[1][0]):
            if id < len(proto.pieces):
                continue  # the model has it already
            if id > len(proto.pieces):
                raise TokenizerError(f"{source}: added token {token!r} has id {id}, expected {len(proto.pieces)}; "
                                     "added_tokens and tokenizer.model do not belong together")
            proto.pieces.add(piece=token.replace(" ", "▁"), score=0.0,
                             type=int(TokenType.CONTROL if special else TokenType.USER_DEFINED))
        return cls(proto, source)

    @classmethod
    def from_gguf(cls, tokens: Sequence[str], types: Sequence[int], scores: Sequence[float],
                  metadata: Mapping[str, Any]) -> SentencePieceVocabulary:
        if len(scores) != len(tokens):
            raise TokenizerError(f"tokenizer.ggml.scores: {len(scores)} scores for {len(tokens)} tokens; "
                                 "export the model again")
        used = len(tokens)
        while used and types[used - 1] == TokenType.UNUSED and tokens[used - 1] == f"[PAD{used - 1}]":
            used -= 1
        proto = _pb.ModelProto()
        for token, score, type in zip(tokens[:used], scores, types, strict=False):
            # llama.cpp spells added text with plain spaces, sentencepiece with its own.
            text = token.replace(" ", "▁") if type == TokenType.USER_DEFINED else token
            proto.pieces.add(piece=text, score=float(score), type=int(type))
        proto.trainer_spec.model_type = _pb.TrainerSpec.BPE
        proto.trainer_spec.byte_fallback = any(type == TokenType.BYTE for type in types)
        for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos")):
            setattr(proto.trainer_spec, f"{name}_id", int(metadata.get(f"tokenizer.ggml.{key}_token_id", -1)))
        spec = proto.normalizer_spec
        spec.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        spec.remove_extra_whitespaces = bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
        spec.precompiled_charsmap = bytes(iter(metadata.get("tokenizer.ggml.precompiled_charsmap", b"")))
        return cls(proto, "GGUF metadata")

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def token_bytes(self, id: int) -> bytes:
        if id >= self.size:
            return b""
        piece = self._proto.pieces[id]
        if piece.type == TokenType.BYTE:
            return bytes([int(piece.piece[3:-1], 16)])  # "<0xAB>"
        if piece.type in (TokenType.CONTROL, TokenType.UNKNOWN):
            return piece.piece.encode()
        return piece.piece.replace("▁", " ").encode()

    def to_gguf(self, size: int) -> dict[str, Any]:
        if self._proto.trainer_spec.model_type != _pb.TrainerSpec.BPE:
            raise TokenizerError("tokenizer.model: a unigram model, and GGUF's llama tokenizer is BPE; "
                                 "export to ONNX instead")
        pieces = self._proto.pieces
        tokens = [piece.piece.replace("▁", " ") if piece.type == TokenType.USER_DEFINED else piece.piece
                  for piece in pieces]
        pad = range(len(pieces), size)
        spec = self._proto.normalizer_spec
        keys: dict[str, Any] = {
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": tokens + [f"[PAD{id}]" for id in pad],
            "tokenizer.ggml.scores": [piece.score for piece in pieces] + [-10000.0 for _ in pad],
            "tokenizer.ggml.token_type": [int(piece.type) for piece in pieces] + [int(TokenType.UNUSED) for _ in pad],
            "tokenizer.ggml.add_space_prefix": spec.add_dummy_prefix,
            "tokenizer.ggml.remove_extra_whitespaces": spec.remove_extra_whitespaces,
        }
        if (unknown := self._processor.unk_id()) >= 0:
            keys["tokenizer.ggml.unknown_token_id"] = unknown
        if spec.precompiled_charsmap:
            keys["tokenizer.ggml.precompiled_charsmap"] = list(spec.precompiled_charsmap)
        return keys

    def save(self, folder: Path) -> None:
        write_bytes(folder / "tokenizer.model", self._proto.SerializeToString())


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: no half-written file under the final name."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    temporary.replace(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
