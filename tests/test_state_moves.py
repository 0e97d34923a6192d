"""pytest tests/test_state_moves.py: a saved session goes on with the very tokens it would have drawn, in a new process,
in a fork, and under any engine and quantization of its checkpoint."""
from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from compare import kl_divergence
from golden import add_tokenizer
from tiny import write_tiny_checkpoint

import sbedge
from sbedge.errors import StateError
from sbedge.quant.ggml_library import ggml_available
from sbedge.runtime.load import open_engine
from sbedge.runtime.sampling import Sampling
from sbedge.runtime.session import Session
from sbedge.state import State

ROOT = Path(sbedge.__file__).parents[1]
FORMATS = ["checkpoint", "onnx", *(["gguf"] if ggml_available() else [])]
PROMPT = "Once upon a time a neuron was silent, and silence was what it had to say; then it fired."   # past the windows


@pytest.fixture(scope="module", params=["base", "w8aspike"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint with a tokenizer, and its exact exports."""
    folder = tmp_path_factory.mktemp("moves")
    spiking = request.param == "w8aspike"
    checkpoint = add_tokenizer(write_tiny_checkpoint(folder / "checkpoint", w8aspike=spiking, vocab_size=260))
    sbedge.export_model(checkpoint, folder / "onnx", quant="f32")
    if "gguf" in FORMATS:
        sbedge.export_model(checkpoint, folder / "m.gguf", quant="w8-spike" if spiking else "f32")
    return {"checkpoint": checkpoint, "onnx": folder / "onnx", "gguf": folder / "m.gguf"}


def started(model: Path) -> Session:
    """A session in the middle of a reply whose sampler has drawn."""
    session = sbedge.load(model, threads=1)
    session.sampling = Sampling(temperature=0.8, seed=5, presence_penalty=0.3)
    for _ in session.generate(PROMPT, max_tokens=9):
        pass
    return session


def greedy(session: Session, count: int) -> list[int]:
    return [id for piece in session.generate(max_tokens=count, sampling=Sampling()) for id in piece.ids]


def future(session: Session) -> str:
    """What it says next, and a digest of everything it remembers then."""
    said = [(list(piece.ids), piece.text) for piece in session.generate(max_tokens=24)]
    state = session.state
    assert state.last_logits is not None
    digest = hashlib.sha256(state.block.tobytes() + state.last_logits.tobytes()).hexdigest()
    return json.dumps([said, state.position, digest])


@pytest.mark.parametrize("format", FORMATS)
def test_a_saved_session_goes_on_byte_for_byte_in_a_new_process(
        format: str, models: dict[str, Path], tmp_path: Path) -> None:
    session = started(models[format])
    session.save(tmp_path / "s.state")
    code = ("import sys, sbedge; from test_state_moves import future; model = sbedge.load(sys.argv[1], threads=1);"
            "print(future(sbedge.Session.load(sys.argv[2], model.engine, model.tokenizer)))")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    done = subprocess.run([sys.executable, "-c", code, models[format], tmp_path / "s.state"], capture_output=True,
                          text=True, cwd=ROOT, check=True, env=environment)
    assert done.stdout.strip() == future(session)


@pytest.mark.parametrize("format", FORMATS)
def test_a_fork_goes_on_byte_for_byte(format: str, models: dict[str, Path]) -> None:
    session = started(models[format])
    fork, other = session.fork(), session.fork()
    list(other.generate(" and?", max_tokens=5))      # moves none but itself
    assert future(fork) == future(session)


@pytest.mark.parametrize(("source", "target"), list(permutations(FORMATS, 2)))
def test_a_session_moves_between_engines_and_says_the_same(
        source: str, target: str, models: dict[str, Path], tmp_path: Path) -> None:
    session = started(models[source])
    session.save(tmp_path / "s.state")
    there = sbedge.load(models[target], threads=1)
    moved = Session.load(tmp_path / "s.state", there.engine, there.tokenizer)
    assert moved.state == session.state and moved.pending == session.pending and moved.tokens == session.tokens
    ids = [*session.pending, 7, 8]
    mine, theirs = (engine.forward(ids, state.copy(), logits="all")
                    for engine, state in ((session.engine, session.state), (there.engine, moved.state)))
    assert mine is not None and theirs is not None
    if there.engine.config.spike_k:     # a last-bit difference may flip a count, which moves logits a little
        assert kl_divergence(mine, theirs) < 0.01
    else:
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=1e-3)
    assert greedy(moved, 16) == greedy(session, 16)


@pytest.mark.parametrize("format", FORMATS)
def test_after_an_edit_a_chat_says_what_a_fresh_one_would(format: str, models: dict[str, Path]) -> None:
    session, fresh = (sbedge.load(models[format], threads=1) for _ in range(2))
    for message in ("hello", "and a longer message, past the windows of both models", "bye"):
        list(session.chat(message, max_tokens=6))
    messages = [*session.messages[:2], {"role": "user", "content": "another question altogether"}]
    reply = [id for piece in session.chat(messages, max_tokens=12) for id in piece.ids]
    prompt = session.reused + session.prefilled
    assert session.reused > 20
    fresh.feed(list(session.tokens[:prompt]))
    assert greedy(fresh, 12) == reply
    session.rewind(2)
    assert session.messages == [] and session.state == fresh.engine.new_state()


def test_all_exports_of_a_checkpoint_have_its_fingerprint(models: dict[str, Path]) -> None:
    expected = sbedge.Checkpoint(models["checkpoint"]).fingerprint
    for format in FORMATS:
        engine = open_engine(models[format], threads=1)
        assert engine.fingerprint == engine.new_state().fingerprint == expected


@pytest.mark.parametrize("quant", [("gguf", "q8_0"), ("gguf", "w8-spike"), ("onnx", "int4")], ids="-".join)
def test_a_state_moves_to_another_quantization_of_its_checkpoint_and_to_no_other_checkpoint(
        quant: tuple[str, str], tmp_path: Path) -> None:
    if quant[0] not in FORMATS:
        pytest.skip("the ggml libraries are not installed")
    sizes = {"vocab_size": 260, "hidden_size": 128, "intermediate_size": 128}
    mine, other = (write_tiny_checkpoint(tmp_path / str(seed), seed=seed, **sizes) for seed in (0, 1))
    session = started(add_tokenizer(mine))
    session.save(tmp_path / "s.state")

    def moved(checkpoint: Path) -> Session:
        out = checkpoint.with_suffix(".gguf" if quant[0] == "gguf" else ".onnx")
        sbedge.export_model(add_tokenizer(checkpoint), out, format=quant[0], quant=quant[1])
        there = sbedge.load(out, threads=1)
        return Session.load(tmp_path / "s.state", there.engine, there.tokenizer)

    assert len(greedy(moved(mine), 4)) > 0
    with pytest.raises(StateError, match=r"s\.state: belongs to another model"):
        moved(other)


def test_a_session_refuses_a_state_of_another_checkpoint(models: dict[str, Path]) -> None:
    session = sbedge.load(models["checkpoint"])
    state = State(session.engine.config, "f" * 64)
    with pytest.raises(StateError, match="belongs to another model"):
        Session(session.engine, session.tokenizer, state=state)


