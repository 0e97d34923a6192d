"""Chat and demo: what is said stays said, commands act, and a stopped reply stops nothing else."""
from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from golden import TINY, add_tokenizer, copy_checkpoint

import sbedge
from sbedge.apps import cli, demo
from sbedge.apps.chat import loop
from sbedge.apps.chat.branches import Chat
from sbedge.apps.chat.commands import COMMANDS, Exit, run_command
from sbedge.apps.chat.terminal import Terminal
from sbedge.apps.text import without_control
from sbedge.errors import InputError, StateError
from sbedge.quant.ggml_library import ggml_available


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(add_tokenizer(copy_checkpoint(TINY, tmp_path_factory.mktemp("chat") / "model")))


@pytest.fixture
def chat(model: str) -> Chat:
    return Chat(sbedge.load(model), max_tokens=6)


def said(chat: Chat, message: str) -> str:
    return "".join(piece.text for piece in chat.reply(message))


def lines(*texts: str) -> Callable[[], str]:
    """A reader of these lines; the end of input follows."""
    rest = iter(texts)

    def read() -> str:
        for text in rest:
            return text
        raise EOFError
    return read


# --- the conversation --------------------------------------------------------------------------------
def test_a_reply_continues_the_conversation(chat: Chat) -> None:
    first = said(chat, "hello")
    assert chat.session.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    position = chat.session.state.position
    list(chat.reply("and?"))
    assert chat.session.state.position > position and len(chat.session.messages) == 4


def test_the_system_text_comes_first(chat: Chat) -> None:
    run_command(chat, "/system Be brief.")
    list(chat.reply("hello"))
    assert chat.session.messages[0] == {"role": "system", "content": "Be brief."}


def test_a_new_conversation_knows_nothing_of_the_former(chat: Chat) -> None:
    first = said(chat, "hello")
    run_command(chat, "/new")
    assert chat.session.messages == [] and chat.session.state.position == 0
    assert said(chat, "hello") == first


def test_save_and_load_go_back_to_the_same_point(chat: Chat, tmp_path: Path) -> None:
    list(chat.reply("hello"))
    assert "saved" in run_command(chat, f"/save {tmp_path / 'a b.state'}")
    first = said(chat, "and?")
    assert "1 turn," in run_command(chat, f"/load {tmp_path / 'a b.state'}")
    assert said(chat, "and?") == first


def test_save_replaces_its_own_files_and_no_others(chat: Chat, tmp_path: Path) -> None:
    list(chat.reply("hello"))
    run_command(chat, f"/save {tmp_path / 's'}")
    run_command(chat, f"/save {tmp_path / 's'}")
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match="no saved conversation"):
        run_command(chat, f"/save {tmp_path / 'thesis.txt'}")
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


@pytest.mark.parametrize(("line", "error"), [
    ("/nonsense", InputError), ("/save", InputError), ("/load", InputError), ("/load /no/such/file", StateError)])
def test_a_command_that_cannot_be_done_says_so(chat: Chat, line: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run_command(chat, line)


def test_help_lists_the_commands_and_exit_leaves(chat: Chat) -> None:
    assert all(f"{c.name} {c.takes}".strip() in run_command(chat, "/help") for c in COMMANDS.values())
    for line in ("/exit", "/quit"):
        with pytest.raises(Exit):
            run_command(chat, line)


# --- the terminal ------------------------------------------------------------------------------------
def test_replies_go_to_stdout_and_all_else_to_stderr(
        model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n/help\nand?\n"))
    assert cli.main(["chat", model, "-n", "6", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    session, expected = sbedge.load(model), ""
    for message in ("hello", "and?"):
        expected += "".join(p.text for p in session.chat(message, max_tokens=6)) + "\n"
    assert captured.out == expected
    assert "/rewind" in captured.err and captured.err.count("position") == 2 and "tok/s" in captured.err


def test_ctrl_c_stops_the_reply_and_keeps_what_was_said(
        chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forward, calls = chat.session.engine.forward, []

    def interrupted(ids, state, **options):
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(ids, state, **options)

    monkeypatch.setattr(chat.session.engine, "forward", interrupted)
    loop.talk(chat, Terminal(), lines("hello", "go on"))
    captured = capsys.readouterr()
    assert "stopped" in captured.err and captured.err.count("position") == 2
    roles = [message["role"] for message in chat.session.messages]
    assert roles == ["user", "assistant", "user", "assistant"] and len(calls) > 5


def test_ctrl_c_at_the_prompt_leaves(chat: Chat) -> None:
    answers: Iterator[str | type[BaseException]] = iter(["hello", KeyboardInterrupt, "never read"])

    def read() -> str:
        answer = next(answers)
        if isinstance(answer, str):
            return answer
        raise answer

    loop.talk(chat, Terminal(), read)
    assert len(chat.session.messages) == 2 and next(answers) == "never read"


def test_an_error_in_a_turn_does_not_end_the_chat(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    loop.talk(chat, Terminal(), lines("/nonsense", "hello"))
    assert "/nonsense is no command" in capsys.readouterr().err and len(chat.session.messages) == 2


def test_a_model_without_a_chat_template_cannot_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = add_tokenizer(copy_checkpoint(TINY, tmp_path / "model"), chat=False)
    assert cli.main(["chat", str(folder)]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert without_control("a\x1b[2J\x07b\tc\nd\x9be é大👍🏽") == "a[2Jb\tc\nde é大👍🏽"


# --- the demo, with a tiny checkpoint in place of the fetched one ------------------------------------
@pytest.fixture
def tiny_demo(model: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demo on a copy of `model`; returns what it did."""
    done: list[str] = []

    def fetch(progress: object) -> Path:
        done.append("fetch")
        return Path("weights")

    def write(weights: Path, out: Path, *, progress: object) -> None:
        done.append("write")
        copy_checkpoint(Path(model), out)

    monkeypatch.setattr(demo, "fetch_weights", fetch)
    monkeypatch.setattr(demo, "write_demo_checkpoint", write)
    return done


@pytest.mark.skipif(not ggml_available(), reason="the ggml libraries are not installed")
def test_the_demo_prepares_once_and_then_starts_at_once(
        tiny_demo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SBEDGE_CACHE", str(tmp_path / "cache"))
    replies = []
    for _ in range(2):
        assert cli.main(["demo", "-p", "hello", "-n", "5", "--temperature", "0"]) == 0
        replies.append(capsys.readouterr().out)
    assert tiny_demo == ["fetch", "write"] and replies[0] == replies[1]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [
        "smollm2-135m-checkpoint", "smollm2-135m-q8_0.gguf"]


def test_the_demo_runs_on_onnx_when_ggml_is_not_there(
        tiny_demo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "ggml_available", lambda: False)
    assert cli.main(["demo", "--dir", str(tmp_path), "-p", "hello", "-n", "5"]) == 0
    assert "pip install 'sbedge[ggml]'" in capsys.readouterr().err
    assert (tmp_path / "smollm2-135m-onnx-int8/model.onnx").is_file()


@pytest.mark.parametrize("where", ["fetch_weights", "write_demo_checkpoint", "export_model"])
def test_an_interrupted_preparation_leaves_nothing_half_made(
        where: str, tiny_demo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(demo, where)

    def interrupt(*args, progress=None, **options):
        def report(*_: object) -> None:
            raise KeyboardInterrupt
        if where == "export_model":
            return original(*args, progress=report, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, where, interrupt)
    assert cli.main(["demo", "--dir", str(tmp_path), "--engine", "onnx", "-p", "hi"]) == 130
    left = [p.name for p in tmp_path.iterdir()]
    assert left == (["smollm2-135m-checkpoint"] if where == "export_model" else [])
    monkeypatch.setattr(demo, where, original)
    assert cli.main(["demo", "--dir", str(tmp_path), "--engine", "onnx", "-p", "hi", "-n", "2"]) == 0


def test_the_demo_refuses_an_unknown_quant_before_fetching(
        tiny_demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--dir", str(tmp_path), "--quant", "q3"]) == 2
    assert "quant 'q3' is not known" in capsys.readouterr().err and tiny_demo == []


def test_progress_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from sbedge.apps.progress import progress_bar
    with progress_bar() as report:
        report("work", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_the_line_editor_is_used_where_the_cursor_can_move_only(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbedge.apps.chat import editor
    monkeypatch.setattr(editor, "line_editor", lambda *_: "editor")
    assert loop.reader(chat, Terminal(person=True, editing=True)) == "editor"
    assert loop.reader(chat, Terminal(person=True)) != "editor" and loop.reader(chat, Terminal()) != "editor"
