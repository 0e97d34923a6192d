"""A chat with a model that always says the text of a file, so slowly: scripted_chat.py FOLDER FILE SECONDS [options].

FOLDER holds a tokenizer. For tests of what a terminal shows.
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path

from fake_engine import FakeEngine

from sbedge.apps.chat.command import add_chat_options, start
from sbedge.runtime.session import Session
from sbedge.runtime.tokenizer import Tokenizer


class Slow(FakeEngine):
    pause = 0.0

    def forward(self, ids, state, **options):
        time.sleep(self.pause)
        return super().forward(ids, state, **options)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("seconds", type=float)
    add_chat_options(parser)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_folder(args.folder)
    script = tokenizer.encode(args.file.read_text(encoding="utf-8"))
    engine = Slow(tokenizer, script=[*script, min(tokenizer.eos_ids)])
    engine.pause = args.seconds
    start(Session(engine, tokenizer), args.folder, args)


if __name__ == "__main__":
    main()
