"""Published outputs of the PyTorch implementation, and ways to break a checkpoint on purpose."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

SHIPPED = Path(__file__).parent / "data/golden"
BESIDE_CHECKOUT = Path(__file__).parents[2] / "shared/golden"
FOLDERS = [SHIPPED / "hf-tiny-f32", SHIPPED / "w8aspike-tiny",
           *(p for p in sorted(BESIDE_CHECKOUT.glob("*")) if not (SHIPPED / p.name).exists())]
"""The two small checkpoints that come with the tests, and any others found beside the checkout."""

TINY = SHIPPED / "hf-tiny-f32"
W8ASPIKE = SHIPPED / "w8aspike-tiny"


def copy_checkpoint(source: Path, folder: Path) -> Path:
    """A writable copy without the expected outputs."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("expected.npz"), copy_function=shutil.copyfile)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, *, remove: str = "", add: dict[str, np.ndarray] | None = None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(remove, None)
    save_file({**tensors, **(add or {})}, path)


def truncate(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:int(share * len(data))])


CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def add_tokenizer(folder: Path, *, chat: bool = True, extra_tokens: int = 0) -> Path:
    """Give a checkpoint ChatML and a tokenizer: the bytes, "ab", 3 special tokens and `extra_tokens` more."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "ab", *(f"extra{i}" for i in range(extra_tokens))]
    model = tokenizers.models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("a", "b")])
    hf = tokenizers.Tokenizer(model)
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    hf.save(str(folder / "tokenizer.json"))
    settings = {"add_bos_token": False, "eos_token": "<|im_end|>", **({"chat_template": CHATML} if chat else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
