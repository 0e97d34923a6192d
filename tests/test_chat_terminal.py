"""pytest tests/test_chat_terminal.py: the real program in a pseudo-terminal, as a person meets it."""
from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from golden import TINY, add_tokenizer, copy_checkpoint

import sbedge

if os.name != "posix":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)
pytest.importorskip("pexpect")

from screen import ROOT, Program
from test_chat_markdown import DOCUMENT, LONG, rows

SCRIPTED = Path(__file__).parent / "scripted_chat.py"
ENTER, TAB, UP, CTRL_C, CTRL_D, ALT_ENTER = "\r", "\t", "\x1b[A", "\x03", "\x04", "\x1b\r"
PASTE = "\x1b[200~{}\x1b[201~"
COLOR = re.compile(r"\x1b\[(?!0?m)[0-9;]+m")
ENDS = (2, 258, 259)        # tokens that end a turn
ENDLESS = [word for id in ENDS for word in ("--logit-bias", f"{id}=-inf")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = add_tokenizer(copy_checkpoint(TINY, tmp_path_factory.mktemp("terminal") / "model"))
    assert sbedge.load(folder).tokenizer.eos_ids == {*ENDS}
    return str(folder)


def chat(model: str, home: Path, *options: str) -> Program:
    return Program("-m", "sbedge", "chat", model, *options, home=home)


def scripted(home: Path, text: str, *options: str, seconds: float = 0, columns: int = 80,
             environment: Mapping[str, str] | None = None) -> Program:
    """A chat whose replies are all `text`, a token every so many seconds."""
    (home / "text").write_text(text, encoding="utf-8")
    (home / "tokenizer").mkdir(exist_ok=True)
    add_tokenizer(home / "tokenizer")
    return Program(SCRIPTED, home / "tokenizer", home / "text", str(seconds), *options, home=home,
                   columns=columns, environment=environment)


@pytest.fixture
def hello(tmp_path: Path) -> Iterator[Program]:
    """A chat that says "Hello!" to everything, at its first prompt."""
    with scripted(tmp_path, "Hello!") as program:
        program.until(program.at_prompt)
        yield program


# --- a conversation ----------------------------------------------------------------------------------
def test_messages_and_commands_act_and_ctrl_d_leaves(model: str, tmp_path: Path) -> None:
    with chat(model, tmp_path, "-n", "5", "--no-color") as program:
        program.until(program.at_prompt)
        for line, expected in (("/help", "/rewind [N]"), ("/nonsense", "/nonsense is no command"), ("hello", "tok/s"),
                               ("and?", "tok/s"), (f"/save {tmp_path / 's.state'}", "saved to"),
                               ("/rewind", "back to before 'and?': 1 turn"), ("/fork other", "now in other"),
                               ("and?", "tok/s"), ("/switch main", "now in main: 1 turn"),
                               (f"/load {tmp_path / 's.state'}", "58;"), ("/system Be brief.", "system text set"),
                               ("/params top_k 7", "top_k               7"), ("/stats", "snapshots"),
                               ("/new", "a new conversation")):
            assert expected in program.say(line, expected)
        program.type(CTRL_D)
        assert program.end() == 0
        assert "kept; --resume goes on with it" in program.screen.text


def test_a_rendered_reply_stands_between_question_and_status(hello: Program) -> None:
    shown = hello.say("Who are you?", "tokens").strip("\n").split("\n")
    assert shown[-1] == "" or shown[-1].startswith(">")
    assert hello.screen.text.split("\n")[1:3] == ["> Who are you?", "Hello!"]
    assert re.fullmatch(r"\[7 tokens, [\d.]+ tok/s, position \d+, state 0.0 MB, read \d+\]",
                        hello.screen.text.split("\n")[3])


def test_a_long_reply_scrolls_past_whole(tmp_path: Path) -> None:
    with scripted(tmp_path, LONG, "-n", "100000") as program:
        program.until(program.at_prompt)
        program.say("Tell me all.", "tokens,")
        assert "> Tell me all.\n" + "\n".join(rows(LONG)) + "\n[" in program.screen.text
        assert COLOR.search(program.raw)


def test_the_reply_fits_the_terminal_after_it_was_made_narrower(tmp_path: Path) -> None:
    text = DOCUMENT + "1. one\n2. two\n" + DOCUMENT
    with scripted(tmp_path, text, "-n", "100000", seconds=0.001) as program:
        program.until(program.at_prompt)
        program.type("Tell me all." + ENTER)
        program.until("def f(x):")
        program.resize(50, 20)
        program.until(lambda: "tokens," in program.screen.text and program.at_prompt())
        shown = program.screen.text.split("\n")
        last = max(i for i, line in enumerate(shown) if line == "─" * 49)
        assert shown[last - 12:last + 1] == rows(text, 49)[-13:]
        assert len(program.say("And now?", "tokens,")) > 0


def test_ctrl_c_stops_the_reply_and_the_chat_goes_on(tmp_path: Path) -> None:
    with scripted(tmp_path, "word " * 5000, "-n", "100000", seconds=0.01) as program:
        program.until(program.at_prompt)
        program.type("Go on for ever." + ENTER)
        program.until("word word")
        program.type(CTRL_C)
        program.until(lambda: "stopped" in program.screen.text and program.at_prompt())
        assert "turns         1" in program.say("/stats", "turns")


def test_keys_pressed_during_a_reply_wait_for_the_prompt(tmp_path: Path) -> None:
    with scripted(tmp_path, "word " * 30, seconds=0.004) as program:
        program.until(program.at_prompt)
        program.type("First." + ENTER)
        program.until("word")
        program.type("Second." + ENTER)
        program.until(lambda: program.screen.text.count("tokens,") == 2)
        shown = program.screen.text.split("\n")
        assert [line for line in shown if "irst" in line or "econd" in line] == ["> First.", "> Second."]


# --- the line that is typed --------------------------------------------------------------------------
@pytest.mark.parametrize("keys", ["one\\" + ENTER + "two", "one" + ALT_ENTER + "two", PASTE.format("one\ntwo"),
                                  PASTE.format("one\r\ntwo")], ids=["backslash", "Alt+Enter", "paste", "paste CRLF"])
def test_a_message_may_have_several_lines(hello: Program, keys: str) -> None:
    hello.type(keys)
    hello.until("> one\n  two")
    hello.say("", "tokens")
    assert "back to before 'one two': 0 turns" in hello.say("/rewind", "back to")


def test_the_line_can_be_edited_and_ctrl_c_drops_it(hello: Program) -> None:
    hello.type("ello" + "\x01" + "h" + "\x05" + "!")       # Home, End
    hello.until("> hello!")
    hello.type(CTRL_C)
    hello.until(hello.at_prompt)
    hello.type(UP)
    hello.until("> hello!")
    hello.type(CTRL_C)
    hello.until(hello.at_prompt)
    hello.type(CTRL_C)
    assert hello.end() == 0


def test_what_was_typed_is_remembered_in_the_next_chat(model: str, tmp_path: Path) -> None:
    for up in (False, True):
        with scripted(tmp_path, "Hello!") as program:
            program.until(program.at_prompt)
            if up:
                program.type(UP)
                program.until("> /params top_k 3")
            else:
                program.say("/params top_k 3", "max_tokens")
                program.type(CTRL_D)
                program.end()
    history = tmp_path / "state/sbedge/history"
    assert "+/params top_k 3" in history.read_text() and history.stat().st_mode & 0o077 == 0


def test_tab_completes_commands_names_and_files(hello: Program, tmp_path: Path) -> None:
    (tmp_path / "talk.state").touch()
    hello.type("/sw" + TAB)
    hello.until("> /switch")
    hello.type("ma" + TAB)
    hello.until("> /switch main")
    hello.type(CTRL_C)
    hello.until(hello.at_prompt)
    hello.type("/params temp" + TAB + "0.5 top_" + TAB)
    hello.until(lambda: hello.screen.display.endswith("top_k  top_p\n> /params temperature 0.5 top_"))
    hello.type(CTRL_C)
    hello.until(hello.at_prompt)
    hello.type("/load ~/ta" + TAB)
    hello.until("> /load ~/talk.state")


def test_all_commands_are_offered_within_80_columns(hello: Program) -> None:
    hello.type("/" + TAB)
    shown = hello.until("/quit")
    assert {"/help", "/system", "/rewind", "/resume", "/continue"} <= set(re.findall(r"/\w+", shown))


@pytest.mark.parametrize("line", ["/params temperature hot", "/rewind 99", "/load /no/such/file", "/save", "/fork a/b",
                                  "/switch nowhere", "/quit now", "/hepl", "/\x1b[Dx", "/" + "y" * 300])
def test_a_bad_line_is_answered_and_the_chat_goes_on(hello: Program, line: str) -> None:
    hello.type(line + ENTER)
    hello.until(lambda: len(hello.screen.text.split("\n")) > 2 and hello.at_prompt())
    assert "Traceback" not in hello.screen.text
    assert "Hello!" in hello.say("hi", "tokens")


# --- plain -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("options", "environment"), [
    (("--no-color",), {}), ((), {"NO_COLOR": "1"}), ((), {"TERM": "dumb"}), ((), {"LC_ALL": "C", "PYTHONUTF8": "0",
                                                                               "PYTHONCOERCECLOCALE": "0"})],
    ids=["--no-color", "NO_COLOR", "dumb", "not UTF-8"])
def test_without_styles_the_reply_is_plain_text(
        tmp_path: Path, options: tuple[str, ...], environment: dict[str, str]) -> None:
    text = "# A **plain** text\n- with `marks`\n"
    with scripted(tmp_path, text, *options, environment=environment) as program:
        program.until(program.at_prompt)
        shown = program.say("Hello?", "tokens")
        assert "# A **plain** text\n- with `marks`\n" in shown
        assert not COLOR.search(program.raw)
        if environment.get("TERM") == "dumb":
            assert "\x1b" not in program.raw


def test_a_dumb_terminal_takes_several_lines_too(tmp_path: Path) -> None:
    with scripted(tmp_path, "Hello!", environment={"TERM": "dumb"}) as program:
        program.until(program.at_prompt)
        program.say("one\\\rtwo", "tokens")
        assert "back to before 'one two'" in program.say("/rewind", "back to")
        program.type(CTRL_C)
        assert program.end() == 0


@pytest.mark.parametrize("columns", [80, 40])
def test_nothing_is_wider_than_the_terminal(tmp_path: Path, columns: int) -> None:
    """Were it, the terminal would break it in the midst of a word."""
    with scripted(tmp_path, DOCUMENT, "-n", "100000", columns=columns) as program:
        program.until(program.at_prompt)
        for line, expected in (("/help", "leaves."), ("hi", "tokens,"), ("/fork", "back"), ("/switch", "turn"),
                               ("/params", "max_tokens"), ("/load /no/such/file", "cannot be")):
            program.say(line, expected)
        assert max(map(len, program.screen.text.split("\n"))) < columns


def test_a_pipe_gets_the_reply_and_nothing_else(model: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state"),
                   "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-m", "sbedge", "chat", model, "--temperature", "0", "-n", "5"], cwd=ROOT,
                          env=environment, input=b"hello\n", capture_output=True, timeout=60, check=True)
    reply = "".join(piece.text for piece in sbedge.load(model).chat("hello", max_tokens=5))
    assert done.stdout.decode() == reply + "\n"
    assert b"\x1b" not in done.stderr and done.stderr.count(b"\n") == 1
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("options", "typed", "line"), [
    (["-n", "0"], b"hello\n", b"--max-tokens is 0"), (["--stop", ""], b"hello\n", b"--stop is empty"),
    (["--logit-bias", "999=1"], b"hello\n", b"999"), ([], b"/load nothing\n", b"nothing")])
def test_what_a_pipe_asks_in_vain_ends_with_2(options: list[str], typed: bytes, line: bytes, model: str) -> None:
    done = subprocess.run([sys.executable, "-m", "sbedge", "chat", model, *options], cwd=ROOT, input=typed,
                          capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (2, b"") and line in done.stderr
    assert done.stderr.count(b"\n") == 1


# --- killed and resumed ------------------------------------------------------------------------------
def test_a_chat_killed_in_mid_reply_resumes_with_at_most_that_reply_lost(model: str, tmp_path: Path) -> None:
    with chat(model, tmp_path, "--temperature", "0", "-n", "5", "--no-color", *ENDLESS) as program:
        program.until(program.at_prompt)
        program.say("hello", "tokens,")
        program.say("/fork idea", "now in idea")
        program.say("and?", "tokens,")
        program.say("/params max_tokens 100000 temperature 1", "max_tokens")
        before = len(program.raw)
        program.type("a long story" + ENTER)
        program.until(lambda: len(program.raw) > before + 500)      # some of it is there
        os.kill(program.child.pid, signal.SIGKILL)
        assert program.end() is None
    undisturbed = sbedge.load(model)
    undisturbed.sampling = sbedge.Sampling(logit_bias={id: -math.inf for id in ENDS})
    expected = [m for message in ("hello", "and?") for m in (
        {"role": "user", "content": message},
        {"role": "assistant", "content": "".join(p.text for p in undisturbed.chat(message, max_tokens=5))})]
    (file,) = (tmp_path / "state/sbedge/chats").glob("*/*/idea.state")
    kept = sbedge.Session.load(file, undisturbed.engine, undisturbed.tokenizer).messages
    assert kept[:4] == expected and kept[4:][:1] == [{"role": "user", "content": "a long story"}]
    with chat(model, tmp_path, "-n", "5", "--resume", "--no-color") as program:
        shown = program.until(program.at_prompt)
        assert "resumed idea: 3 turns" in shown and "other branches: main" in shown and "> a long story" in shown
        assert "/continue goes on with it" in shown
        assert "reused" in program.say("so?", "tokens,")
        assert "now in main: 1 turn" in program.say("/switch main", "now in main")


def test_at_the_start_a_kept_chat_is_offered_and_left_alone(tmp_path: Path) -> None:
    for number in range(2):
        with scripted(tmp_path, "Hello!") as program:
            program.until(program.at_prompt)
            assert ("is kept: /resume goes on with it" in program.screen.text) == (number > 0)
            program.say(f"message {number}", "tokens")
            program.type(CTRL_D)
            program.end()
    assert len(list((tmp_path / "state/sbedge/chats").glob("*/*/main.state"))) == 2
    with scripted(tmp_path, "Hello!") as program:
        program.until(program.at_prompt)
        assert "resumed main: 1 turn" in program.say("/resume", "resumed")
        assert "back to before 'message 1'" in program.say("/rewind", "back to")


def test_without_autosave_nothing_is_written(tmp_path: Path) -> None:
    with scripted(tmp_path, "Hello!", "--no-autosave") as program:
        program.until(program.at_prompt)
        program.say("secret", "tokens")
        program.type(CTRL_D)
        assert program.end() == 0 and "kept" not in program.screen.text
    assert not (tmp_path / "state").exists()


def test_resume_with_nothing_kept_is_one_line(model: str, tmp_path: Path) -> None:
    with chat(model, tmp_path, "--resume") as program:
        assert program.end() == 2
        assert program.screen.text == "sbedge: no chat with this model is kept, or it is open elsewhere"


def test_a_terminated_chat_leaves_the_terminal_as_it_was(model: str, tmp_path: Path) -> None:
    with chat(model, tmp_path, "-n", "100000", *ENDLESS) as program:
        program.until(program.at_prompt)
        program.type("Go on for ever." + ENTER)
        program.until(lambda: len(program.screen.text) > 300)
        assert not program.child.getecho()
        os.kill(program.child.pid, signal.SIGTERM)
        program.drain()
        assert program.child.getecho() and program.end() == 143
