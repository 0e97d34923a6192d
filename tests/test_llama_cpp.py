"""pytest tests/test_llama_cpp.py: a third party agrees: llama.cpp on the original SmolLM2 GGUF, our engines on the
checkpoint made of it. Runs where llama-cpp-python and the weights are installed (`.ci/run` installs both)."""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from compare import assert_close, kl_divergence, run

from sbedge.apps.demo_model import find_weights, write_demo_checkpoint
from sbedge.export import export_model
from sbedge.runtime.ggml_engine import GgmlEngine
from sbedge.runtime.onnx_engine import OnnxEngine

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is the third party")
WEIGHTS = find_weights()
pytestmark = [
    pytest.mark.skipif(WEIGHTS is None, reason="the SmolLM2 weights are not here; `sbedge demo` fetches them"),
    pytest.mark.skipif(os.environ.get("SBEDGE_GGML") == "libggml", reason="one copy of ggml per process")]

TEXTS = ["The capital of France is", "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
         "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
         "Il cielo è azzurro perché l'aria diffonde la luce. " * 30]


class LlamaCpp:
    """llama.cpp's logits for a list of ids."""

    def __init__(self, path: Path):
        self.model = llama_cpp.Llama(str(path), n_ctx=2048, n_batch=2048, logits_all=True, flash_attn=False,
                                     type_k=0, type_v=0, verbose=False)

    def ids(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=False, special=True)

    def logits(self, ids: list[int]) -> np.ndarray:
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[:len(ids)], np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2")
    write_demo_checkpoint(WEIGHTS, path / "checkpoint")
    return path


@pytest.fixture(scope="module")
def exact(folder):
    """llama.cpp on a float32 copy of the original, for with quantized weights it also rounds activations."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = 0, True
    copy = folder / "f32-by-llama.gguf"
    assert llama_cpp.llama_model_quantize(str(WEIGHTS).encode(), str(copy).encode(), params) == 0
    return LlamaCpp(copy)


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def ours(request, folder):
    out = folder / ("ours.gguf" if request.param == "gguf" else "ours-onnx")
    export_model(folder / "checkpoint", out, format=request.param, quant="f32")
    return GgmlEngine(out) if request.param == "gguf" else OnnxEngine(out)


@pytest.mark.parametrize("text", TEXTS, ids=["prose", "code", "chat", "long"])
def test_logits_equal_llama_cpp_in_float32(text, exact, ours):
    ids = exact.ids(text)
    assert 4 < len(ids) < 2048
    assert_close(exact.logits(ids), run(ours, ids)[0], 2e-3)        # logits reach 41; measured 2.4e-4


@pytest.mark.parametrize("text", TEXTS[:3], ids=["prose", "code", "chat"])
def test_logits_agree_with_llama_cpp_on_the_original_file(text, exact, ours):
    original = LlamaCpp(WEIGHTS)
    ids = original.ids(text)
    expected, found = original.logits(ids), run(ours, ids)[0]
    # llama.cpp rounds activations to 8 bit here; ours keeps them. Measured: KL 0.004, the likeliest token the same.
    assert kl_divergence(expected, found) < 0.03
    assert (expected.argmax(-1) == found.argmax(-1)).mean() > 0.9


def test_our_tokenizer_cuts_text_as_llama_cpp_does(exact, folder):
    from sbedge.runtime.tokenizer import Tokenizer
    tokenizer = Tokenizer.from_folder(folder / "checkpoint")
    for text in TEXTS:
        assert tokenizer.encode(text) == exact.ids(text)
