"""pytest tests/test_isolation.py: sessions on one engine never influence each other, however they are interleaved."""
from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_engine import render_here
from golden import add_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import write_tiny_checkpoint

import sbedge
from sbedge.quant.ggml_library import ggml_available
from sbedge.runtime import chat_template
from sbedge.runtime.load import open_engine
from sbedge.runtime.sampling import Sampling
from sbedge.runtime.session import Session
from sbedge.runtime.state_cache import StateCache
from sbedge.runtime.tokenizer import Tokenizer

FORMATS = ["onnx", *(["gguf"] if ggml_available() else [])]
TEXTS = ["a cab", "Once upon a time there was a neuron that kept silent", "abba", "no", "x" * 40]


@pytest.fixture(scope="module", params=[(f, kind) for f in FORMATS for kind in ("base", "w8aspike")], ids="-".join)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """An engine and its tokenizer."""
    format, kind = request.param
    folder = tmp_path_factory.mktemp("isolation")
    checkpoint = add_tokenizer(write_tiny_checkpoint(folder / "c", vocab_size=260, w8aspike=kind == "w8aspike"))
    out = folder / ("m.gguf" if format == "gguf" else "m")
    sbedge.export_model(checkpoint, out, format=format, quant="f32" if kind == "base" else None)
    return open_engine(out, threads=1), Tokenizer.from_folder(checkpoint)


def steps(shared: tuple, seed: int) -> Iterator[list[int]]:
    """A life of a session: reads, replies, chats, copies and rewinds; yields what it drew in each step.

    Its cache is small and its own: what another session left in one would be the same only up to rounding.
    """
    rng = np.random.default_rng(seed)
    session = Session(*shared, sampling=Sampling(temperature=1, seed=seed), cache=StateCache(shared[0], budget=300_000))
    session.feed(TEXTS[seed % len(TEXTS)])
    while True:
        text, count = TEXTS[rng.integers(len(TEXTS))], int(rng.integers(1, 7))
        action = rng.integers(5)
        if action == 0:
            session = session.fork()
        if action == 1 and session.messages:
            session.rewind()
        pieces = session.chat(text, max_tokens=count) if action > 2 else session.generate(text, max_tokens=count)
        ids = []
        for piece in pieces:        # token by token: others run in between
            ids += piece.ids
            yield list(piece.ids)
        assert session.state.position == len(session.tokens)


def alone(shared: tuple, seed: int, count: int) -> list[list[int]]:
    life = steps(shared, seed)
    return [next(life) for _ in range(count)]


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "render_chat", render_here)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=st.lists(st.integers(0, 2), min_size=1, max_size=40), seed=st.integers(0, 50))
def test_sessions_in_any_interleaving_say_what_they_say_alone(shared: tuple, schedule: list[int], seed: int) -> None:
    """Each session lives in a thread of its own; the schedule says whose turn it is."""
    turns = [threading.Semaphore(0) for _ in range(3)]
    done, said = threading.Semaphore(0), [[], [], []]

    def live(who: int) -> None:
        life = steps(shared, seed + who)
        while True:
            turns[who].acquire()
            if not schedule_left[0]:
                return
            try:
                said[who].append(next(life))
            finally:
                done.release()

    schedule_left = [True]
    threads = [threading.Thread(target=live, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for who in schedule:
        turns[who].release()
        done.acquire()
    schedule_left[0] = False
    for turn, thread in zip(turns, threads, strict=True):
        turn.release()
        thread.join()
    for who in range(3):
        assert said[who] == alone(shared, seed + who, schedule.count(who))


def test_sessions_running_at_once_say_what_they_say_alone(shared: tuple) -> None:
    """Four threads, no order imposed, switched as often as the interpreter can."""
    said = {}

    def live(seed: int) -> None:
        life = steps(shared, seed)
        said[seed] = [next(life) for _ in range(60)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=live, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert said == {seed: alone(shared, seed, 60) for seed in range(4)}


def test_a_saved_copy_is_not_moved_by_the_session_it_was_taken_of(shared: tuple, tmp_path: Path) -> None:
    session = Session(*shared)
    session.feed(TEXTS[1])
    session.save(tmp_path / "s.state")
    fork, before = session.fork(), session.state.copy()
    list(session.generate(max_tokens=20))
    assert fork.state == before == Session.load(tmp_path / "s.state", *shared).state
