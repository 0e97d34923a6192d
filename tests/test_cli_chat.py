"""Chat: what is said stays said, commands act, and a stopped reply stops nothing else.

What a terminal shows: test_chat_terminal.py, test_chat_markdown.py. What is kept on disk: test_chat_kept.py.
"""
from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from golden import TINY, add_tokenizer, copy_checkpoint

import sbedge
from sbedge.apps import cli
from sbedge.apps.chat import loop
from sbedge.apps.chat.branches import Chat
from sbedge.apps.chat.commands import COMMANDS, Exit, run_command
from sbedge.apps.chat.meter import Meter, silent_rate
from sbedge.apps.chat.terminal import Terminal
from sbedge.apps.text import without_control
from sbedge.errors import InputError, StateError
from sbedge.runtime.sampling import Sampling


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


def test_the_system_text_comes_first_and_may_change(chat: Chat) -> None:
    assert "no system text" in run_command(chat, "/system")
    run_command(chat, "/system Be brief.")
    said(chat, "hello")
    assert chat.session.messages[0] == {"role": "system", "content": "Be brief."}
    assert "read again" in run_command(chat, "/system Be long.\nVery long.")
    assert run_command(chat, "/system") == "system text: Be long.\nVery long."
    said(chat, "hello")
    assert [m["role"] for m in chat.session.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.session.messages[0]["content"] == "Be long.\nVery long." and "system text" in chat.session.reread
    run_command(chat, "/system none")
    said(chat, "hello")
    assert [m["role"] for m in chat.session.messages][:2] == ["user", "assistant"]


def test_params_are_shown_and_set(chat: Chat) -> None:
    assert "temperature         0.0" in run_command(chat, "/params")
    shown = run_command(chat, "/params temperature 0.5 top_k=7 seed 3 max_tokens none")
    assert "temperature         0.5" in shown and "max_tokens          none" in shown
    assert chat.session.sampling == Sampling(temperature=0.5, top_k=7, seed=3) and chat.max_tokens is None
    run_command(chat, "/params seed none max_tokens 5")
    assert chat.session.sampling.seed is None and chat.max_tokens == 5


@pytest.mark.parametrize(("line", "found"), [
    ("/params temperature", "pairs"), ("/params temprature 1", "did you mean temperature"), ("/params x 1", "top_p"),
    ("/params temperature hot", "expected a number"), ("/params top_k 1.5", "a whole number"),
    ("/params temperature 1000", "from 0 to 100"), ("/params max_tokens 0", "from 1"), ("/params top_p none", "number"),
    ("/params temperature nan", "from 0 to 100"), ("/params top_k 1 top_p 7", "up to 1")])
def test_a_bad_parameter_is_one_line_and_changes_nothing(chat: Chat, line: str, found: str) -> None:
    before = chat.session.sampling, chat.max_tokens
    with pytest.raises(InputError, match=found) as error:
        run_command(chat, line)
    assert "\n" not in str(error.value) and (chat.session.sampling, chat.max_tokens) == before


def test_stats_tell_what_the_conversation_took(chat: Chat) -> None:
    said(chat, "hello")
    shown = run_command(chat, "/stats")
    assert f"position      {chat.session.state.position} tokens" in shown
    assert "turns         1" in shown and "kept in       nowhere" in shown and "silent" not in shown


def test_continue_goes_on_with_a_reply_that_was_cut_short(chat: Chat, model: str) -> None:
    whole = Chat(sbedge.load(model), max_tokens=12)
    expected, first = said(whole, "hello"), said(chat, "hello")
    assert first + "".join(piece.text for piece in chat.go_on()) == expected
    assert chat.session.messages[0] == whole.session.messages[0] and len(chat.session.messages) == 2


def test_the_status_tells_what_a_reply_cost(chat: Chat) -> None:
    session = chat.session
    for message in ("hello", "and?"):
        meter = Meter(session)
        list(meter.watch(chat.reply(message)))
        status = meter.status()
        assert status.startswith("[6 tokens, ") and " tok/s, " in status and "\n" not in status
        assert f"position {session.state.position}, state " in status and f"read {session.prefilled}" in status
    assert f" + {session.reused} reused" in status and session.reused > 0
    run_command(chat, "/system Be brief.")
    meter = Meter(session)
    list(meter.watch(chat.reply("hm")))
    assert f"\n[read again: {session.reread}]" in meter.status() and "system text" in session.reread


def test_the_silent_rate_is_that_of_the_weights_fetched_since(chat: Chat) -> None:
    assert silent_rate(chat.session) is None
    chat.session.engine.traffic = SimpleNamespace(fetched=70, dense=150)       # type: ignore[attr-defined]
    assert silent_rate(chat.session, (10, 50)) == pytest.approx(0.4)
    said(chat, "hello")
    assert "silent        53.3%" in run_command(chat, "/stats")


# --- going back, branches, files ---------------------------------------------------------------------
def test_rewind_takes_turns_back(chat: Chat) -> None:
    first, second = said(chat, "hello"), said(chat, "and?")
    assert run_command(chat, "/rewind").startswith("back to before 'and?': 1 turn, ")
    assert said(chat, "and?") == second
    assert "0 turns" in run_command(chat, "/rewind 2")
    assert said(chat, "hello") == first


@pytest.mark.parametrize("line", ["/rewind", "/rewind 0", "/rewind 7", "/rewind x", "/rewind -1",
                                  "/rewind " + "9" * 99])
def test_a_rewind_that_cannot_be_says_so(chat: Chat, line: str) -> None:
    if line != "/rewind":
        said(chat, "hello")
    before = chat.session.messages
    with pytest.raises(InputError):
        run_command(chat, line)
    assert chat.session.messages == before


def test_branches_of_one_past_are_independent(chat: Chat) -> None:
    said(chat, "hello")
    assert "/switch main goes back" in run_command(chat, "/fork idea")
    assert chat.name == "idea" and len(chat.session.messages) == 2
    there = said(chat, "one way")
    run_command(chat, "/switch main")
    assert len(chat.session.messages) == 2
    said(chat, "another way")
    assert run_command(chat, "/switch") == "* main          2 turns\n  idea          2 turns"
    run_command(chat, "/switch idea")
    assert chat.session.messages[-1]["content"] == there
    assert "branch2" in run_command(chat, "/fork") and "branch3" in run_command(chat, "/fork")


def test_a_new_conversation_knows_nothing_of_the_former_which_stays(chat: Chat) -> None:
    first = said(chat, "hello")
    assert "chat2" in run_command(chat, "/new")
    assert chat.session.messages == [] and chat.session.state.position == 0
    assert said(chat, "hello") == first
    run_command(chat, "/switch main")
    assert chat.session.messages[-1]["content"] == first


@pytest.mark.parametrize("line", ["/fork main", "/fork ../x", "/fork a b", "/fork " + "x" * 33, "/new main",
                                  "/switch nowhere"])
def test_a_branch_that_cannot_be_says_so(chat: Chat, line: str) -> None:
    with pytest.raises(InputError):
        run_command(chat, line)
    assert chat.name == "main" and list(chat.branches) == ["main"]


def test_save_and_load_go_back_to_the_same_point_and_lose_nothing(chat: Chat, tmp_path: Path) -> None:
    said(chat, "hello")
    assert "saved" in run_command(chat, f"/save {tmp_path / 'a b.state'}")
    there = said(chat, "and?")
    assert "1 turn," in run_command(chat, f"/load {tmp_path / 'a b.state'}")
    assert chat.name == "loaded2" and said(chat, "and?") == there
    assert len(chat.branches["main"].session.messages) == 4
    run_command(chat, "/new")
    run_command(chat, f"/load {tmp_path / 'a b.state'}")
    assert chat.name == "chat2"        # nothing had been said in it


def test_save_replaces_its_own_files_and_no_others(chat: Chat, tmp_path: Path) -> None:
    said(chat, "hello")
    run_command(chat, f"/save {tmp_path / 's'}")
    run_command(chat, f"/save {tmp_path / 's'}")
    (tmp_path / "thesis.txt").write_text("ten years of work")
    chat.session.state.save(tmp_path / "state")
    reading = sbedge.Session(chat.session.engine, chat.session.tokenizer)
    reading.feed("a report")
    reading.save(tmp_path / "report.state")
    for name in ("thesis.txt", "state", "report.state"):
        with pytest.raises(InputError, match="no saved conversation"):
            run_command(chat, f"/save {tmp_path / name}")
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


@pytest.mark.parametrize(("line", "error"), [
    ("/nonsense", InputError), ("/save", InputError), ("/load", InputError), ("/load /no/such/file", StateError),
    ("/stats now", InputError), ("/resume", InputError), ("/", InputError),
    ("/load ~nobody-of-that-name/x", StateError), ("/save ~nobody-of-that-name/x", StateError),
    ("/load a\0b", StateError), ("/save a\0b", StateError)])
def test_a_command_that_cannot_be_done_says_so(chat: Chat, line: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run_command(chat, line)


def test_a_text_that_was_read_outside_a_chat_is_not_loaded_for_it_would_be_forgotten(
        chat: Chat, tmp_path: Path) -> None:
    session = chat.session.fork()
    session.feed("a report")
    session.save(tmp_path / "report.state")
    with pytest.raises(InputError, match="sbedge state load"):
        run_command(chat, f"/load {tmp_path / 'report.state'}")


def test_there_is_nothing_to_continue_before_the_first_reply(
        chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    loop.talk(chat, Terminal(), lines("/continue"))
    assert "no reply yet" in capsys.readouterr().err


def test_a_reply_at_its_end_is_not_continued(chat: Chat) -> None:
    said(chat, "hello")
    said(chat, "and?")
    run_command(chat, "/rewind")
    with pytest.raises(InputError, match="at its end; send a message"):
        chat.go_on()


def test_a_mistyped_command_is_recognized(chat: Chat) -> None:
    with pytest.raises(InputError, match="did you mean /rewind"):
        run_command(chat, "/rewnid 1")


def test_help_lists_the_commands_within_80_columns_and_quit_leaves(chat: Chat) -> None:
    shown = run_command(chat, "/help")
    assert all(f"{c.name} {c.takes}".strip() in shown for c in COMMANDS.values())
    assert max(map(len, shown.split("\n"))) < 80
    for line in ("/exit", "/quit"):
        with pytest.raises(Exit):
            run_command(chat, line)


# --- input and output --------------------------------------------------------------------------------
def test_replies_go_to_stdout_and_all_else_to_stderr(
        model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n/help\nand\\\nthen?\n"))
    assert cli.main(["chat", model, "-n", "6", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    session, expected = sbedge.load(model), ""
    for message in ("hello", "and\nthen?"):
        expected += "".join(p.text for p in session.chat(message, max_tokens=6)) + "\n"
    assert captured.out == expected
    assert "/rewind" in captured.err and captured.err.count("position") == 2 and "tok/s" in captured.err
    assert "\x1b" not in captured.err


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


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_ctrl_c_waits_for_the_token_under_way(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = chat.session.engine.forward, []

    def pressed(ids, state, **options):
        calls.append(len(ids))
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(ids, state, **options)

    chat.session.sampling = Sampling(logit_bias={id: -float("inf") for id in chat.session.tokenizer.eos_ids})
    monkeypatch.setattr(chat.session.engine, "forward", pressed)
    chat.max_tokens = 500
    loop.talk(chat, Terminal(), lines("hello"))
    session = chat.session
    assert 4 <= len(calls) < 20 and session.state.position == len(session.tokens) and len(session.pending) == 1
    assert session.state.last_logits is not None and len(session.messages) == 2


def test_a_prompt_that_is_interrupted_leaves_the_conversation_as_it_was(
        chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(ids, state, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.session.engine, "forward", interrupted)
    loop.talk(chat, Terminal(), lines("hello"))
    assert "before the reply began" in capsys.readouterr().err and chat.session.messages == []


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
    bad = "/nonsense", "/save /no/such/folder/x", "/save " + "y" * 999
    assert not loop.talk(chat, Terminal(), lines(*bad, "\udcff", "hello"))
    err = capsys.readouterr().err
    assert "/nonsense is no command" in err and "/no/such/folder/x" in err and len(chat.session.messages) == 4
    assert chat.session.messages[0]["content"] == "?"


def test_a_reader_of_the_replies_that_goes_away_ends_the_chat(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(loop, "show", gone)
    with pytest.raises(BrokenPipeError):
        loop.talk(chat, Terminal(), lines("hello", "and?"))


def test_a_space_before_a_slash_makes_it_a_message(chat: Chat) -> None:
    assert loop.talk(chat, Terminal(), lines(" /etc/hosts is what?"))
    assert chat.session.messages[0]["content"] == " /etc/hosts is what?"


def test_a_model_without_a_chat_template_cannot_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = add_tokenizer(copy_checkpoint(TINY, tmp_path / "model"), chat=False)
    assert cli.main(["chat", str(folder)]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert without_control("a\x1b[2J\x07b\tc\nd\x9be é大👍🏽") == "a[2Jb\tc\nde é大👍🏽"


def test_the_line_editor_is_used_where_the_cursor_can_move_only(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    from sbedge.apps.chat import editor
    monkeypatch.setattr(editor, "line_editor", lambda *_: "editor")
    assert loop.reader(chat, Terminal(person=True, editing=True)) == "editor"
    assert loop.reader(chat, Terminal(person=True)) != "editor" and loop.reader(chat, Terminal()) != "editor"
