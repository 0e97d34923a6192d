"""pytest tests/test_autosave.py: a chat that saves itself and is killed goes on where it was, less its last reply."""
from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from golden import TINY, add_tokenizer, copy_checkpoint

import sbedge
from sbedge.runtime.sampling import Sampling
from sbedge.runtime.session import Session

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
ROOT = Path(sbedge.__file__).parents[1]
CHAT = """
import sys
from test_autosave import begun
path, often, session = sys.argv[2], int(sys.argv[3]), begun(sys.argv[1])
for message in ("hello", "tell me a long story"):
    for n, piece in enumerate(session.chat(message, max_tokens=5 if message == "hello" else None)):
        if often and n % often == 0:
            session.save(path)
        print(message, n, flush=True)
    session.save(path)
    print("saved", flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(add_tokenizer(copy_checkpoint(TINY, tmp_path_factory.mktemp("autosave") / "model")))


def begun(model: str) -> Session:
    """A session whose replies never end by themselves."""
    session = sbedge.load(model)
    session.sampling = Sampling(temperature=1, seed=7, logit_bias={id: -math.inf for id in session.tokenizer.eos_ids})
    return session


def undisturbed(model: str) -> Session:
    session = begun(model)
    list(session.chat("hello", max_tokens=5))
    return session


def chat_until(model: str, path: Path, line: str, often: int = 0, patience: float = 0) -> None:
    """Run a chat in a process of its own and kill it without warning once it has printed `line`."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    with subprocess.Popen([sys.executable, "-c", CHAT, model, path, str(often)], stdout=subprocess.PIPE, text=True,
                          cwd=ROOT, env=environment) as process:
        assert process.stdout is not None
        for printed in process.stdout:
            if printed.strip() == line:
                break
        time.sleep(patience)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_chat_killed_in_mid_reply_loses_that_reply_and_nothing_else(model: str, tmp_path: Path) -> None:
    chat_until(model, tmp_path / "s.state", "tell me a long story 20")
    there, expected = sbedge.load(model), undisturbed(model)
    session = Session.load(tmp_path / "s.state", there.engine, there.tokenizer)
    assert session.messages == expected.messages and len(session.messages) == 2
    replies = [[id for piece in s.chat("tell me a long story", max_tokens=30) for id in piece.ids]
               for s in (session, expected)]
    assert replies[0] == replies[1]
    assert session.reused == expected.reused > 0


def test_a_chat_that_saves_in_mid_reply_loses_what_came_after(model: str, tmp_path: Path) -> None:
    chat_until(model, tmp_path / "s.state", "tell me a long story 25", often=8)
    there, expected = sbedge.load(model), undisturbed(model)
    session = Session.load(tmp_path / "s.state", there.engine, there.tokenizer)
    assert [m["role"] for m in session.messages] == ["user", "assistant", "user", "assistant"]
    whole = [id for piece in expected.chat("tell me a long story", max_tokens=60) for id in piece.ids]
    said = [*session.tokens, *session.pending][-(session.state.position + 1 - expected.reused - expected.prefilled):]
    assert 24 < len(said) < 60 and said == whole[:len(said)]
    assert [id for piece in session.generate(max_tokens=60 - len(said)) for id in piece.ids] == whole[len(said):]
    assert session.messages == expected.messages        # the rest belongs to the reply


def test_a_chat_killed_while_it_saves_leaves_a_whole_file(model: str, tmp_path: Path) -> None:
    there, rng = sbedge.load(model), random.Random(0)
    for number in range(5):
        path = tmp_path / f"{number}.state"
        chat_until(model, path, "tell me a long story 3", often=1, patience=rng.uniform(0, 0.05))
        assert len(Session.load(path, there.engine, there.tokenizer).messages) == 4
