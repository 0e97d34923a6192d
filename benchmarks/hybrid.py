"""What conversion cost: perplexity of the source and of its hybrid on texts neither was tuned on, and loops in replies.

    python benchmarks/hybrid.py source.gguf hybrid.gguf --text prose.txt --chats 16000

Prose is read as documents of --document tokens, chats are written by the source (about topics that no conversion trains
on) and read one by one; the state begins anew each time. Differences are paired, with a 95 % interval from a bootstrap
over blocks of 128 tokens. Then both answer twenty fixed prompts greedily, and --questions more about those topics; a
reply loops if its end is one piece of up to 40 tokens said three times over.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no installation

import sbedge
from sbedge.apps.convert.loops import loop
from sbedge.apps.convert.prompts import HELD_OUT, chat_prompts
from sbedge.apps.convert.sampling import Writer
from sbedge.export.perplexity import Predictions, chunk_tokens
from sbedge.runtime.engine import Engine

BLOCK, DRAWS = 128, 10_000
PROMPTS = (
    "The capital of France is", "What is photosynthesis?", "Why is the sky blue?", "Name three fruits.",
    "Write a short poem about the sea.", "Explain gravity to a child.", "What is 2 + 2?", "Who wrote Hamlet?",
    "Give me a recipe for pancakes.", "What are the advantages of bicycles?", "Tell me a short story about a fox.",
    "How do I learn to swim?", "What is a computer?", "Write an email asking for a day off.", "List the planets.",
    "What is the meaning of friendship?", "How does bread rise?", "Describe a sunset in two sentences.",
    "What should I pack for a hike?", "Why do cats purr?",
)


def document_nats(engine: Engine, documents: Sequence[Sequence[int]]) -> np.ndarray:
    """-log p of every token that has one before it, over all documents."""
    parts, step = [], chunk_tokens(engine.config.vocab_size)
    for ids in documents:
        reader = Predictions(engine, "model")
        parts += [reader.read(np.asarray(ids[start:start + step]))[1] for start in range(0, len(ids), step)]
    return np.concatenate(parts)


def compared(source: Engine, hybrid: Engine, documents: Sequence[Sequence[int]]) -> dict[str, float]:
    a, b = document_nats(source, documents), document_nats(hybrid, documents)
    blocks = (b - a)[:len(a) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(1)
    draws = np.random.default_rng(0).integers(0, len(blocks), (DRAWS, len(blocks)))
    low, high = np.quantile(blocks[draws].mean(1), [0.025, 0.975])
    return {"tokens": len(a), "source": float(np.exp(a.mean())), "hybrid": float(np.exp(b.mean())),
            "more": float(100 * np.expm1((b - a).mean())), "low": float(100 * np.expm1(low)),
            "high": float(100 * np.expm1(high))}


def replies(session: sbedge.Session, prompts: Sequence[str], count: int) -> list[dict[str, object]]:
    out = []
    for prompt in prompts:
        fresh = sbedge.Session(session.engine, session.tokenizer)
        pieces = list(fresh.generate(prompt, max_tokens=count) if prompt == PROMPTS[0]
                      else fresh.chat(prompt, max_tokens=count))
        ids = [id for piece in pieces for id in piece.ids]
        out.append({"prompt": prompt, "reply": "".join(p.text for p in pieces), "loops": bool(loop(ids))})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("hybrid", metavar="HYBRID")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--skip", type=int, default=5000, metavar="N", help="tokens of each text to leave out")
    parser.add_argument("--prose", type=int, default=8192, metavar="N", help="tokens of each text to read")
    parser.add_argument("--document", type=int, default=2048, metavar="N")
    parser.add_argument("--chats", type=int, default=8192, metavar="N", help="tokens of chat")
    parser.add_argument("--reply", type=int, default=200, metavar="N", help="most tokens of a reply; 0 asks nothing")
    parser.add_argument("--questions", type=int, default=0, metavar="N", help="further prompts to answer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    args = parser.parse_args()
    source, hybrid = sbedge.load(args.source), sbedge.load(args.hybrid)
    tests = {}
    for file in args.text:
        ids = source.tokenizer.encode(file.read_text(encoding="utf-8"))[args.skip:args.skip + args.prose]
        tests[str(file)] = [ids[i:i + args.document] for i in range(0, len(ids), args.document)]
    if args.chats:
        writer = Writer(source.engine, source.tokenizer, seed=2, share_chat=1.0, topics=HELD_OUT)
        tests["chat"] = [ids for _, ids in writer.write(args.chats)]
    results: dict[str, object] = {}
    for name, documents in tests.items():
        results[name] = r = compared(source.engine, hybrid.engine, documents)
        print(f"{name:28s} {r['tokens']} tokens: {r['source']:.2f} -> {r['hybrid']:.2f}, {r['more']:+.1f} % "
              f"[{r['low']:+.1f}, {r['high']:+.1f}]", flush=True)
    asked = {"fixed prompts": list(PROMPTS),
             "questions": list(islice(chat_prompts(np.random.default_rng(3), HELD_OUT), args.questions))}
    for name, prompts in asked.items() if args.reply else ():
        if not prompts:
            continue
        both = replies(source, prompts, args.reply), replies(hybrid, prompts, args.reply)
        results[name] = [{"prompt": a["prompt"], "source": a, "hybrid": b} for a, b in zip(*both, strict=True)]
        fresh = [a["prompt"] for a, b in zip(*both, strict=True) if b["loops"] and not a["loops"]]
        counts = [sum(bool(reply["loops"]) for reply in one) for one in both]
        print(f"{name}: of {len(prompts)} replies the source's loop {counts[0]} times, the hybrid's {counts[1]} times; "
              f"{len(fresh)} times only the hybrid's: {fresh}", flush=True)
        print(f"  {prompts[0]!r}: {str(both[1][0]['reply'])[:60]!r}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
