"""A random Llama of a shape, quantized: what llama.cpp runs beside a SpikingBrain of that shape.

    python benchmarks/make_llama.py OUT.gguf --shape 135m|1b|7b [--quant q8_0|q4_0]

Same layers, heads, FFN, vocabulary and tied embeddings as sbedge.apps.synthetic; embeddings in Q8_0. The
weights are random blocks with small scales: speed does not depend on them.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no installation

from sbedge.apps.synthetic import SHAPES, config_json
from sbedge.gguf_format import TYPES


def random_blocks(rng: np.random.Generator, kind: str, rows: int, width: int) -> np.ndarray:
    """[rows, bytes] uint8: blocks of random codes behind a float16 scale of about 0.02 for the whole range."""
    block, nbytes = TYPES[kind].block, TYPES[kind].nbytes
    data = rng.integers(0, 256, (rows, width // block, nbytes), np.uint8)
    data[..., :2] = np.frombuffer(np.float16(0.02 / (127 if kind == "Q8_0" else 8)).tobytes(), np.uint8)
    return data.reshape(rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--quant", choices=["q8_0", "q4_0"], default="q8_0")
    args = parser.parse_args()
    config = config_json(SHAPES[args.shape])
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    H, G, layers = config["num_attention_heads"], config["num_key_value_heads"], config["num_hidden_layers"]
    rng, kind = np.random.default_rng(0), args.quant.upper()

    writer = gguf.GGUFWriter(args.out, "llama", use_temp_file=False)
    for add, value in ((writer.add_block_count, layers), (writer.add_context_length, 1 << 20),
                       (writer.add_embedding_length, D), (writer.add_feed_forward_length, F),
                       (writer.add_head_count, H), (writer.add_head_count_kv, G), (writer.add_vocab_size, V),
                       (writer.add_rope_dimension_count, D // H), (writer.add_rope_freq_base, 1e6),
                       (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_tokenizer_model, "no_vocab")):
        add(value)

    def matrix(name: str, rows: int, width: int, kind: str = kind) -> None:
        writer.add_tensor(name, random_blocks(rng, kind, rows, width), raw_dtype=gguf.GGMLQuantizationType[kind])

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(D, np.float32))

    matrix("token_embd.weight", V, D, "Q8_0")
    ones("output_norm.weight")
    if not config["tie_word_embeddings"]:
        matrix("output.weight", V, D, "Q8_0")
    for i in range(layers):
        ones(f"blk.{i}.attn_norm.weight")
        ones(f"blk.{i}.ffn_norm.weight")
        for name, rows, width in (("attn_q", D, D), ("attn_k", D // H * G, D), ("attn_v", D // H * G, D),
                                  ("attn_output", D, D), ("ffn_gate", F, D), ("ffn_up", F, D), ("ffn_down", D, F)):
            matrix(f"blk.{i}.{name}.weight", rows, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
