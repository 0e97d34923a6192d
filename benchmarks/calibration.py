"""What exports lose in perplexity, beside llama.cpp's Q4_0 of the same weights, on text that none was calibrated with.

    python benchmarks/calibration.py f32.gguf MODEL... --text held-out.txt [--llama SmolLM2-135M-Instruct.Q4_1.gguf]

The text is cut into pieces of --context tokens, each read from an empty state; all models read the same pieces. Losses
are against the first model, token by token, with the standard error of that difference. --llama names the GGUF file of
the same weights for llama.cpp: it is made float32, and Q4_0 of that, by llama.cpp's own quantizer.
"""
from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no installation

from sbedge.apps.files import size_of
from sbedge.apps.measure import skipped_share
from sbedge.export.perplexity import nats
from sbedge.runtime.load import open_engine, open_tokenizer

F32, Q4_0 = 0, 2            # llama.cpp's LLAMA_FTYPE
SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
DECODED = 256               # tokens fed one at a time, to count the bytes read


def losses(logits_of: Callable[[np.ndarray], np.ndarray], pieces: np.ndarray) -> np.ndarray:
    """-log p of every token of pieces [n, context] but each first: nats."""
    return np.concatenate([nats(logits_of(ids)[:-1], ids[1:]) for ids in pieces])


def skipped(engine, ids: np.ndarray) -> float | None:
    """Share of weight bytes that decoding `ids` did not read; None where that is not counted."""
    state = engine.new_state()
    return skipped_share(engine, lambda: [engine.forward([int(token)], state) for token in ids])


def llama_losses(weights: Path, folder: Path, pieces: np.ndarray) -> tuple[np.ndarray, int]:
    """The same by llama.cpp in Q4_0, and the bytes of that file."""
    import llama_cpp
    llama_cpp.llama_log_set(SILENT, None)
    source = weights
    for name, kind in (("f32", F32), ("q4_0", Q4_0)):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = kind, True
        target = folder / f"{name}.gguf"
        if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
            raise SystemExit(f"{source}: llama.cpp could not make {name} of it")
        source = target
    context = pieces.shape[1]
    model = llama_cpp.Llama(str(source), n_ctx=context, n_batch=context, logits_all=True, verbose=False)

    def logits(ids: np.ndarray) -> np.ndarray:
        model.reset()
        model.eval([int(id) for id in ids])
        return np.array(model.scores[:context], np.float32)

    return losses(logits, pieces), source.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--llama", type=Path, metavar="GGUF")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    tokenizer = open_tokenizer(args.models[0])
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))[:args.tokens]
    if len(ids) < args.context:
        sys.exit(f"{args.text}: {len(ids)} tokens, expected at least {args.context} (--context)")
    pieces = np.array(ids[:len(ids) // args.context * args.context]).reshape(-1, args.context)
    base: np.ndarray | None = None

    def show(name: str, found: np.ndarray, size: int, share: float | None) -> np.ndarray:
        more = found - (found if base is None else base)
        percent, error = 100 * np.expm1(more.mean()), 100 * np.exp(more.mean()) * more.std() / len(more) ** 0.5
        print(f"{name:36} {size / 1e6:8.1f} MB  perplexity {np.exp(found.mean()):8.3f}  {percent:+7.2f} % ± {error:.2f}"
              + ("" if share is None else f"  skipped {share:.1%}"), flush=True)
        return found

    for model in args.models:
        engine = open_engine(model)
        found = losses(lambda ids, e=engine: e.forward(ids, e.new_state(), logits="all"), pieces)
        found = show(Path(model).name, found, size_of(Path(model)), skipped(engine, pieces[0][:DECODED]))
        base = found if base is None else base
    if args.llama:
        with tempfile.TemporaryDirectory() as folder:
            show("llama.cpp Q4_0", *llama_losses(args.llama, Path(folder), pieces), None)


if __name__ == "__main__":
    main()
