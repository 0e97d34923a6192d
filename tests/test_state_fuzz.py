"""pytest tests/test_state_fuzz.py: whatever a state file holds, loading it ends in one line or in a sound state."""
from __future__ import annotations

import copy
import json
import random
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import add_tokenizer
from tiny import write_tiny_checkpoint

import sbedge
from sbedge.apps.measure import peak_rss
from sbedge.apps.state_view import StateView
from sbedge.config import ModelConfig
from sbedge.errors import SbedgeError, StateError
from sbedge.reference import Reference
from sbedge.runtime.load import ids_only
from sbedge.runtime.sampling import Sampling
from sbedge.runtime.session import Session
from sbedge.runtime.session_record import Record
from sbedge.state import State, load_state
from sbedge.state_file import bounded_json

FILES = 10_000
PEAK = 4 << 20      # bytes that loading may take, whatever the file claims ...
BLOW_UP = 30        # ... beyond so many for each byte that is really there: "[]," becomes a list of 56 bytes
HUGE = (1 << 31, 1 << 40, (1 << 62) - 1, 1 << 63, 10 ** 18, 10 ** 40, 10 ** 400)
ODD: tuple[Any, ...] = (*HUGE, -1, 0, 1, 0.5, float("nan"), float("inf"), True, None, "", "x", "1e3", [], {}, [[]],
                        {"a": []})


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A chat in its second reply, on a model with states of a few kilobytes: both kinds of layers, int8 windows."""
    folder = add_tokenizer(write_tiny_checkpoint(
        tmp_path_factory.mktemp("fuzz"), w8aspike=True, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=2, sliding_window=4, vocab_size=260))
    session = sbedge.load(folder)
    session.sampling = Sampling(temperature=1, seed=1, logit_bias={3: 1.0})
    for message in ("hello", "and?"):
        list(session.chat(message, max_tokens=4))
    return session


@pytest.fixture(scope="module")
def model(started: Session) -> Reference:
    assert isinstance(started.engine, Reference)
    return started.engine


@pytest.fixture(scope="module")
def good(started: Session, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "s.state"
    started.save(path)
    return path.read_bytes()


def odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD))


# --- mutations -------------------------------------------------------------------------------------
def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:size]), data[size:]


def sealed(header: Any, body: bytes) -> bytes:
    """A file with this header and the right checksum, as one who means harm would write it."""
    if isinstance(header, dict) and isinstance(meta := header.get("__metadata__"), dict):
        meta["checksum"] = "00000000"
    text = (header if isinstance(header, bytes) else json.dumps(header).encode())
    checksum = f"{zlib.crc32(body, zlib.crc32(text)):08x}".encode()
    text = text.replace(b'"checksum": "00000000"', b'"checksum": "' + checksum + b'"')
    return len(text).to_bytes(8, "little") + text + body


def flips(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def header_flips(data: bytes, rng: random.Random) -> bytes:
    """Bytes of the header changed, and the checksum made right again where the header is still one."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        out[8 + rng.randrange(int.from_bytes(data[:8], "little"))] = rng.randrange(256)
    try:
        return sealed(*split(bytes(out)))
    except (ValueError, RecursionError):
        return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[:rng.randrange(len(data))]


def longer(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 100))


def header_length(data: bytes, rng: random.Random) -> bytes:
    size = len(data)
    length = rng.choice([0, 1, 7, size - 8, size, 1 << 20, 1 << 32, 1 << 63, (1 << 64) - 1, rng.getrandbits(64)])
    return length.to_bytes(8, "little") + data[8:]


def entry(data: bytes, rng: random.Random) -> bytes:
    """One array's entry says something else."""
    header, body = split(data)
    name = rng.choice([name for name in header if name != "__metadata__"])
    where = rng.choice(["dtype", "shape", "axis", "data_offsets", "start", "stop", "whole", "rename", "remove", "swap"])
    value = odd(rng)
    if where == "dtype":
        header[name]["dtype"] = rng.choice(["F64", "BF16", "I8", "U8", "F32", "f32", odd(rng)])
    elif where == "axis" and header[name]["shape"]:
        header[name]["shape"][rng.randrange(len(header[name]["shape"]))] = value
    elif where in ("start", "stop"):
        header[name]["data_offsets"][where == "stop"] = rng.choice([value, rng.randrange(len(body))])
    elif where in ("rename", "remove", "swap"):
        moved, other = header.pop(name), rng.choice(list(header))
        if where == "rename":
            header[rng.choice(["9.keys", "1.keys", "last_logits", "extra.session", "x" * 5000, "\x1b[2J", ""])] = moved
        elif where == "swap" and other != "__metadata__":
            header[name], header[other] = header[other], moved
    elif where == "whole":
        header[name] = value
    else:
        header[name]["data_offsets" if where == "data_offsets" else "shape"] = value
    return sealed(header, body)


def metadata(data: bytes, rng: random.Random) -> bytes:
    header, body = split(data)
    keys = ["format", "position", "sliding_window", "fingerprint", "new"]
    texts = [*map(str, ODD), "-1", "00", "٣", " 7", "7\n", "sbedge-state-1", "sbedge-state-2", "f" * 64, "9" * 5000]
    header["__metadata__"][rng.choice(keys)] = rng.choice([*texts, odd(rng)])
    if rng.random() < 0.1:
        header["__metadata__"] = odd(rng)
    if rng.random() < 0.1:
        header["__metadata__"].pop(rng.choice(keys), None) if isinstance(header["__metadata__"], dict) else None
    return sealed(header, body)


def structure(data: bytes, rng: random.Random) -> bytes:
    """A header that is other JSON, or none: deep, broad, twice the same name."""
    header, body = split(data)
    text = json.dumps(header).encode()
    name = rng.choice([name for name in header if name != "__metadata__"])
    broken: list[bytes] = [
        b"[" * 20_000, b'{"a":' * 10_000, b"[" * 20_000 + b"]" * 20_000, b"[" + b"[]," * 30_000 + b"[]]",
        b'""' * 9, b'"' * 20_001, b"\\" * 99, b'"\\' * 10_000, text[:-1] + b"," + text[1:],
        text[:-1] + b',"' + name.encode() + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        text + b"\x00", b"\xff\xfe" + text, b"", b"null", b"[]", b"NaN", b"1" * 5000, b'"' + b"x" * 20_000 + b'"',
        text.replace(b'"__metadata__"', b'"__metadate__"')]
    return sealed(rng.choice(broken), body)


def payload(data: bytes, rng: random.Random) -> bytes:
    """NaN, infinities and noise in the arrays, the checksum right: still a state, if a useless one."""
    header, body = split(data)
    out = np.frombuffer(body[:len(body) // 4 * 4], "<f4").copy()
    out[rng.randrange(len(out))] = rng.choice([np.nan, np.inf, -np.inf, 1e38])
    return sealed(header, out.tobytes() + body[len(out) * 4:])


def record(data: bytes, rng: random.Random) -> bytes:
    """The session's JSON says something else, or is none."""
    header, body = split(data)
    start, stop = header["extra.session"]["data_offsets"]
    value = json.loads(body[start:stop])
    for _ in range(rng.randint(1, 3)):
        at = value
        while isinstance(at, (dict, list)) and at:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[key], (dict, list)) or not at[key] or rng.random() < 0.3:
                if rng.random() < 0.2:
                    del at[key]
                else:
                    at[key] = rng.choice([odd(rng), odd(rng), "////", "AAAA", [0] * 50, {"role": "user"},
                                          [{"role": "user", "content": "x"}]])
                break
            at = at[key]
    text = json.dumps(value).encode()
    if rng.random() < 0.1:
        text = rng.choice([b"[" * 20_000, b"[" + b"[]," * 30_000 + b"[]]", b'{"tokens":' + b"9" * 5000 + b"}",
                           b"\xff", b"", flips(text, rng)])
    body = body[:start] + text + body[stop:]
    for other in header.values():       # it is the last array or the others move
        offsets = other.get("data_offsets")
        if offsets and offsets[0] >= stop:
            offsets[:] = [at + len(text) - (stop - start) for at in offsets]
    header["extra.session"].update(shape=[len(text)], data_offsets=[start, start + len(text)])
    return sealed(header, body)


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    flips, header_flips, cut, longer, header_length, entry, entry, metadata, structure, payload, record, record]


# --- the promises ----------------------------------------------------------------------------------
def check_sound(state: State, config: ModelConfig, fingerprint: str | None) -> None:
    expected = State(config, fingerprint)
    assert state.layout == expected.layout and state.block.shape == expected.block.shape
    assert type(state.position) is int and 0 <= state.position < 10 ** 18
    assert state.last_logits is None or state.last_logits.shape == (config.vocab_size,)


def one_line(error: SbedgeError, path: Path) -> None:
    text = str(error)
    assert text.startswith(str(path)) and len(text) < 1000, text


def rewrite(path: Path, data: bytes) -> None:
    """Other contents, in place: thirty times faster than a new file."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()


def try_to_load(path: Path, started: Session, outcomes: Counter[str]) -> None:
    """Load a file as a state and as a session: sound, or refused in one line."""
    model = started.engine
    try:
        state = State.load(path, model.config, model.fingerprint)
        check_sound(state, model.config, model.fingerprint)
        outcomes["state"] += 1
        session = Session.load(path, model, started.tokenizer, cache=started.cache)
        assert len(session.tokens) <= session.state.position and isinstance(session.messages, list)
        outcomes["session"] += 1
    except StateError as error:
        one_line(error, path)
        outcomes["refused"] += 1


def test_ten_thousand_damaged_files_load_as_one_line_or_as_a_sound_session(
        started: Session, good: bytes, tmp_path: Path) -> None:
    path, rng, outcomes = tmp_path / "s.state", random.Random(0), Counter[str]()
    before = peak_rss()
    for number in range(FILES):
        data = MUTATIONS[number % len(MUTATIONS)](good, rng)
        if data and rng.random() < 0.05:     # harmed twice
            data = flips(data, rng)
        rewrite(path, data)
        try_to_load(path, started, outcomes)
    assert outcomes["refused"] > FILES // 2 and outcomes["state"] > outcomes["session"] > 100, outcomes
    assert before is None or peak_rss() - before < 64 << 20     # type: ignore[operator]


def test_loading_takes_memory_for_what_is_in_a_file_and_not_for_what_it_claims(
        started: Session, good: bytes, tmp_path: Path) -> None:
    path, rng = tmp_path / "s.state", random.Random(3)
    tracemalloc.start()
    for number in range(50 * len(MUTATIONS)):
        data = MUTATIONS[number % len(MUTATIONS)](good, rng)
        rewrite(path, data)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try_to_load(path, started, Counter())
        taken = tracemalloc.get_traced_memory()[1] - before
        assert taken < PEAK + BLOW_UP * len(data), MUTATIONS[number % len(MUTATIONS)]
    tracemalloc.stop()


def test_damage_that_nobody_sealed_is_always_found(model: Reference, good: bytes, tmp_path: Path) -> None:
    path, rng = tmp_path / "s.state", random.Random(1)
    for number in range(1000):
        rewrite(path, data := (flips, cut, longer)[number % 3](good, rng))
        if data != good:
            with pytest.raises(StateError):
                State.load(path, model.config)


def test_damaged_files_are_looked_into_without_a_model(good: bytes, tmp_path: Path) -> None:
    path, rng = tmp_path / "s.state", random.Random(2)
    path.write_bytes(good)
    sound = StateView(path)
    for number in range(1500):
        rewrite(path, MUTATIONS[number % len(MUTATIONS)](good, rng))
        try:
            view = StateView(path)
            json.dumps(view.info())
            sound.difference(view)
        except StateError as error:
            one_line(error, path)


def test_the_undamaged_file_loads(model: Reference, good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.state"
    for data in (good, sealed(*split(good))):
        path.write_bytes(data)
        state, texts = load_state(path, model.config, model.fingerprint)
        check_sound(state, model.config, model.fingerprint)
        record = Record.from_json(texts["session"], model.config, state.position)
        assert len(record.tokens) == state.position and len(record.pending) == 1 and len(record.conversation.turns) == 2


def test_nothing_is_loaded_half_way(model: Reference, good: bytes, tmp_path: Path) -> None:
    """A session that tried to load a damaged file is what it was, and so is the file."""
    (tmp_path / "s.state").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    session = Session(model, ids_only(model.config, "model"))
    session.feed([1, 2, 3])
    before = session.state.copy()
    with pytest.raises(StateError, match="checksum"):
        Session.load(tmp_path / "s.state", model, session.tokenizer)
    assert session.state == before and list(session.tokens) == [1, 2, 3]


@pytest.mark.parametrize("text", [
    b"[" * 10 ** 6, b"[" + b"[]," * 10 ** 6 + b"[]]", b'"' * (10 ** 6 + 7), b'{"a":1,"a":2}', b'"\\' * 10 ** 6,
    b'\\"' * 10 ** 6, b"{\"a\":" * 10 ** 5, b"\xff", b"", b"1" * 10 ** 5])
def test_bounded_json_refuses_what_would_take_memory_or_time(text: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError):
        bounded_json(text)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("text", ["", "\\", '\\"', 'a\\\\"b', "[" * 5000, '{"' * 5000, '"' * 5000, "é\x00", "\\" * 99])
def test_bounded_json_takes_any_text(text: str) -> None:
    value = {"text": text, "list": [text, {}]}
    assert bounded_json(json.dumps(value).encode(), 100) == value


