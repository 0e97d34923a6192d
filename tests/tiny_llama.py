"""A tiny random Llama or Qwen2 as Hugging Face stores it, with a byte tokenizer."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sbedge.apps.convert.source import hugging_face_name
from sbedge.checkpoint import expected_tensors
from sbedge.config import ModelConfig

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "vocab_size": 259}
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def byte_letters() -> list[str]:
    """The 256 letters GPT-2's byte-level BPE writes bytes with."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in plain] + [chr(0x100 + i) for i in range(256 - len(plain))]


def write_tiny_llama(folder: Path, kind: str = "llama", *, seed: int = 0, **overrides) -> Path:
    """config.json, model.safetensors and tokenizer.json; `overrides` are keys of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {"model_type": kind, **SIZES, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
           "bos_token_id": 0, "eos_token_id": 2, **overrides}
    (folder / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(seed)
    sizes = {key: raw[key] for key in SIZES}
    config = ModelConfig.from_dict({**sizes, "sliding_window": 64, "tie_word_embeddings": raw["tie_word_embeddings"],
                                    "attn_layers": list(range(sizes["num_hidden_layers"]))})
    tensors = {}
    for name, shape in expected_tensors(config).items():
        if name.endswith("bias") and kind == "llama":
            continue
        noise = rng.standard_normal(shape).astype(np.float32)
        tensors[hugging_face_name(name)] = (1 + 0.1 * noise if "norm" in name else
                                            0.1 * noise if name.endswith("bias") else noise * np.float32(0.3))
    save_file(tensors, folder / "model.safetensors")
    vocabulary = {letter: i + 3 for i, letter in enumerate(byte_letters())}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [
            {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False} for i, text in enumerate(special)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    return folder
