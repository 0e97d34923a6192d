"""What models remember: facts told at the beginning, asked for after more and more text. Several models side by side.

    python benchmarks/needle.py source.gguf hybrid.gguf --text prose.txt --positions 512 2048 8192 32768

Eight passwords of eight cities are told, then the text is read. At every position a copy of the state is asked for each
password, and the password counts as remembered if the model finds it likelier than the other seven (by chance 1 in 8).
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no installation

import sbedge
from sbedge.runtime.session import Session

CITIES = ("Oslo", "Madrid", "Cairo", "Lima", "Tokyo", "Dublin", "Athens", "Delhi")
WORDS = ("apple", "river", "window", "silver", "garden", "pepper", "candle", "tiger", "cotton", "marble", "rocket",
         "violin", "butter", "forest", "pencil", "castle")


def remembered(session: Session, text: list[int], positions: list[int], seed: int) -> dict[int, int]:
    """Position -> how many of the eight passwords are remembered there."""
    words = np.random.default_rng(seed).permutation(WORDS)[:len(CITIES)]
    engine, encode = session.engine, session.tokenizer.encode
    state = engine.new_state()
    told = encode("".join(f"The password of {city} is {word}.\n" for city, word in zip(CITIES, words, strict=True)))
    engine.forward(told, state, logits="none")
    right, rest = {}, text[seed * 1000:]
    for position in positions:
        ask = max(1, position - state.position)
        if len(rest) < ask:
            raise SystemExit(f"the text is too short for position {position}; give a longer --text")
        engine.forward(rest[:ask], state, logits="none")
        rest = rest[ask:]
        right[position] = sum(
            best_answer(session, state, f"\n\nThe password of {city} is", words) == word
            for city, word in zip(CITIES, words, strict=True))
    return right


def best_answer(session: Session, state: sbedge.State, question: str, words: np.ndarray) -> str:
    asked = state.copy()
    logits = session.engine.forward(session.tokenizer.encode(question), asked)
    assert logits is not None
    scores = []
    for word in words:
        ids, row, score = session.tokenizer.encode(f" {word}"), logits[-1], 0.0
        branch = asked.copy() if len(ids) > 1 else asked
        for i, id in enumerate(ids):
            score += float(row[id]) - float(np.logaddexp.reduce(row))
            if i + 1 < len(ids):
                out = session.engine.forward([id], branch)
                assert out is not None
                row = out[-1]
        scores.append(score)
    return str(words[int(np.argmax(scores))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="what is read in between")
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=2, help="other passwords and another place in the text each time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    asked, results = len(CITIES) * args.rounds, {}
    for model in args.models:
        session = sbedge.load(model)
        text = session.tokenizer.encode(args.text.read_text(encoding="utf-8"))
        rounds = [remembered(session, text, sorted(args.positions), seed) for seed in range(args.rounds)]
        results[model] = {position: sum(r[position] for r in rounds) for position in sorted(args.positions)}
        if not args.json:
            shares = "  ".join(f"{position}: {count}/{asked}" for position, count in results[model].items())
            print(f"{Path(model).name:30s} {shares}", flush=True)
    if args.json:
        print(json.dumps({"asked": asked, "remembered": results}))


if __name__ == "__main__":
    main()
