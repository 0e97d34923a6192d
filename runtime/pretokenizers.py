"""How a byte-level BPE splits text before merging: the rules behind llama.cpp's `tokenizer.ggml.pre` names.

A rule is a list of steps, each cutting the pieces that the step before left. They are the very steps
that the `tokenizer.json` of these models holds, so a file can be recognized by comparing them.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Cased letters; escaped, since normalizing this source would change some of them.
_DEEPSEEK_LETTERS = r"\s?[" + (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
) + "]+"


@dataclass(frozen=True)
class Pretokenizer:
    """Splitting rule of one model family. A step is a regex, or "digits" for one digit at a time."""

    steps: tuple[str, ...]
    nfc: bool = False            # normalize to NFC first
    ignore_merges: bool = False  # a piece that is a token as a whole is not merged up from bytes

    def apply_to(self, tokenizer: Tokenizer) -> None:
        """Install the normalizer and the steps, ending in the map from bytes to printable characters."""
        if self.nfc:
            tokenizer.normalizer = normalizers.NFC()
        steps: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True) if step == "digits"
            else pre_tokenizers.Split(Regex(step), "isolated")
            for step in self.steps
        ]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


PRETOKENIZERS: dict[str, Pretokenizer] = {
    "qwen2": Pretokenizer((_QWEN2,), nfc=True),
    "smollm": Pretokenizer(("digits", _GPT2)),
    "llama-bpe": Pretokenizer((_LLAMA3,), ignore_merges=True),
    "gpt-2": Pretokenizer((_GPT2,)),
    # What llama.cpp does when a file names no rule; the last step splits runs of digits by three.
    "default": Pretokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "deepseek-llm": Pretokenizer((
        "[\r\n]",
        _DEEPSEEK_LETTERS,
        r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}+",
    )),
}


def recognize(tokenizer: Tokenizer, *, ignore_merges: bool) -> str | None:
    """The `tokenizer.ggml.pre` name whose rule `tokenizer` follows, or None."""
    try:
        rule = Pretokenizer(_steps_of(tokenizer), _is_nfc(tokenizer), ignore_merges)
    except (KeyError, TypeError, ValueError):
        return None
    return next((name for name, known in PRETOKENIZERS.items() if known == rule), None)


def _is_nfc(tokenizer: Tokenizer) -> bool:
    if tokenizer.normalizer is None:
        return False
    spec = json.loads(tokenizer.normalizer.__getstate__())
    kinds = [part["type"] for part in spec.get("normalizers", [spec])]
    if kinds not in ([], ["NFC"]):
        raise ValueError(f"normalizers {kinds}")
    return kinds == ["NFC"]


def _steps_of(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Steps of the installed pre-tokenizer; raises ValueError for one that no rule here can express."""
    spec = json.loads(tokenizer.pre_tokenizer.__getstate__())
    steps: list[str] = []
    ended = False
    for part in spec.get("pretokenizers", [spec]):
        if ended:
            raise ValueError("a step after the byte map")
        match part:
            case {"type": "Digits", "individual_digits": True}:
                steps.append("digits")
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": regex}}:
                steps.append(regex)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                steps += [_GPT2] if use_regex else []
                ended = True
            case _:
                raise ValueError(f"step {part['type']}")
    if not ended:
        raise ValueError("no byte map")
    return tuple(steps)


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether token strings spell bytes as GPT-2's printable characters."""
    if tokenizer.pre_tokenizer is None:
        return False
    spec = json.loads(tokenizer.pre_tokenizer.__getstate__())
    return any(part.get("type") == "ByteLevel" for part in spec.get("pretokenizers", [spec]))
