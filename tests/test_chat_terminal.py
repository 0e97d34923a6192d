"""pytest tests/test_chat_terminal.py: the real program in a pseudo-terminal, as a person meets it."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from golden import TINY, add_tokenizer, copy_checkpoint

import sbedge

if os.name != "posix":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)
pexpect = pytest.importorskip("pexpect")
ROOT = Path(sbedge.__file__).parents[1]
READY = r"\x1b\[\?2004h.*?>"        # the line editor waits
STATUS = r"\[\d+ tokens[^\]]*\]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(add_tokenizer(copy_checkpoint(TINY, tmp_path_factory.mktemp("terminal") / "model")))


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "NO_COLOR": "1",
            "XDG_STATE_HOME": str(home), "PYTHONIOENCODING": "utf-8"}


def started(model: str, home: Path, *options: str):
    return pexpect.spawn(sys.executable, ["-m", "sbedge", "chat", model, "--temperature", "0", *options], cwd=str(ROOT),
                         env=environment(home), dimensions=(40, 80), encoding="utf-8", codec_errors="replace",
                         timeout=30)


def say(program, line: str, answer: str) -> None:
    program.expect(READY)
    program.send(line + "\r")
    program.expect(answer)


def left(program) -> int:
    program.expect(READY)
    program.send("\x04")
    program.expect(pexpect.EOF)
    program.close()
    return program.exitstatus


def test_messages_and_commands_act_and_ctrl_d_leaves(model: str, tmp_path: Path) -> None:
    program = started(model, tmp_path, "-n", "5")
    say(program, "/help", "/rewind")
    say(program, "/nonsense", "/nonsense is no command; [^\r\n]*\r\n")
    say(program, "hello", STATUS)
    say(program, "two\\\rlines", STATUS)
    say(program, f"/save {tmp_path / 's.state'}", "saved to")
    say(program, "/rewind", "back to before 'two lines'")
    say(program, "/fork other", "now in other")
    say(program, f"/load {tmp_path / 's.state'}", r"2\s+turns")
    say(program, "/system Be brief.", "system text set")
    say(program, "/params top_k 7", "top_k +7")
    say(program, "/stats", "snapshots")
    assert left(program) == 0


def test_a_chat_killed_in_mid_reply_resumes_with_at_most_that_reply_lost(model: str, tmp_path: Path) -> None:
    program = started(model, tmp_path, "-n", "5")
    say(program, "hello", STATUS)
    say(program, "/params max_tokens 100000 temperature 1", "100000")
    program.expect(READY)
    program.send("a long story\r")
    program.expect(r"\x1b\[\?2004l.{20}")
    program.kill(signal.SIGKILL)
    program.expect(pexpect.EOF)
    program = started(model, tmp_path, "-n", "5", "--resume")
    program.expect(r"resumed main: [12] turns?")
    say(program, "and?", STATUS)
    assert left(program) == 0


def test_a_pipe_gets_the_reply_and_nothing_else(model: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "sbedge", "chat", model, "--temperature", "0", "-n", "5"], cwd=ROOT,
                          env=environment(tmp_path), input=b"hello\n", capture_output=True, timeout=60, check=True)
    reply = "".join(piece.text for piece in sbedge.load(model).chat("hello", max_tokens=5))
    assert done.stdout.decode() == reply + "\n"
