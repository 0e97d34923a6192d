"""pytest tests/test_chat_kept.py: a chat in a terminal is on disk after every turn, and no other chat is touched."""
from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
from golden import TINY, add_tokenizer, copy_checkpoint

import sbedge
from sbedge.apps.chat import kept, loop
from sbedge.apps.chat.branches import USUAL, Chat
from sbedge.apps.chat.command import make_chat
from sbedge.apps.chat.commands import run_command
from sbedge.apps.chat.kept import Shelf, chats_folder, state_home
from sbedge.apps.chat.terminal import Terminal
from sbedge.errors import InputError, StateError
from sbedge.runtime.sampling import Sampling
from sbedge.runtime.session import Session

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and locks")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(add_tokenizer(copy_checkpoint(TINY, tmp_path_factory.mktemp("kept") / "model")))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "chats")


def chat(model: str, shelf: Shelf, keep: bool = True, sampling: Sampling | None = None,
         system: str | None = None) -> Chat:
    session = sbedge.load(model)
    session.sampling = sampling or USUAL
    return Chat(session, max_tokens=6, chosen=sampling is not None, shelf=shelf, keep=keep, system=system)


def say(chat: Chat, *messages: str) -> None:
    rest = iter(messages)

    def read() -> str:
        for message in rest:
            return message
        raise EOFError

    loop.talk(chat, Terminal(), read)


def closed(chat: Chat) -> list[dict[str, str]]:
    """Its messages, once the process is gone."""
    assert chat.kept
    chat.kept.close()
    return chat.session.messages


# --- every turn --------------------------------------------------------------------------------------
def test_nothing_is_written_before_the_first_turn(model: str, shelf: Shelf) -> None:
    say(chat(model, shelf), "/help", "/params top_k 3", "/nonsense")
    assert not shelf.folder.exists()


def test_after_each_turn_the_chat_can_be_resumed(model: str, shelf: Shelf) -> None:
    first = chat(model, shelf, sampling=Sampling(temperature=1, seed=5), system="Be brief.")
    for number, message in enumerate(("hello", "and?", "so?"), 1):
        say(first, message)
        assert first.kept and [file.name for file in first.kept.files()] == ["main.state"]
        there = first.session
        again = Session.load(first.kept.files()[0], there.engine, there.tokenizer)
        assert again.messages == there.messages and len(again.messages) == 2 * number + 1
    before = closed(first)
    second = chat(model, shelf)
    second.resume()
    assert second.session.messages == before and second.branch.system == "Be brief."
    assert second.session.sampling == Sampling(temperature=1, seed=5)
    say(second, "go on")
    say(first, "go on")
    assert second.session.messages == first.session.messages       # the dice, too, rolled on


def test_the_message_is_kept_when_its_reply_begins(model: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    there, seen = chat(model, shelf), []
    save = Session.save

    def watched(session: Session, path: Path) -> None:
        save(session, path)
        seen.append([message["role"] for message in session.messages])

    monkeypatch.setattr(Session, "save", watched)
    say(there, "hello")
    assert seen[0] == ["user", "assistant"] and len(seen) == 2


def test_a_long_reply_is_kept_now_and_then(model: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    there, seen = chat(model, shelf, sampling=Sampling(temperature=1, seed=1)), []
    monkeypatch.setattr(kept, "PAUSE", 0)
    monkeypatch.setattr(Session, "save", lambda session, path: seen.append(path))
    say(there, "hello")
    assert len(seen) > 2


def test_the_end_of_a_turn_is_kept_though_its_text_came_with_the_first_piece(
        model: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drawn after it, such as an end token, says that the reply is whole."""
    there, seen = chat(model, shelf), []
    there.max_tokens = 1
    monkeypatch.setattr(Session, "save", lambda session, path: seen.append(path))
    say(there, "hello")
    assert len(seen) == 2


def test_parameters_that_were_set_last_are_kept(model: str, shelf: Shelf) -> None:
    there = chat(model, shelf)
    say(there, "hello", "/params temperature 0.5")
    assert there.kept
    again = Session.load(there.kept.files()[0], there.session.engine, there.session.tokenizer)
    assert again.sampling.temperature == 0.5


def test_what_did_not_change_is_not_written_again(model: str, shelf: Shelf) -> None:
    there = chat(model, shelf)
    say(there, "hello")
    assert there.kept
    before = there.kept.files()[0].stat().st_mtime_ns
    say(there, "/help", "/stats", "/switch main")
    assert there.kept.files()[0].stat().st_mtime_ns == before
    say(there, "/rewind")
    assert there.kept.files()[0].stat().st_mtime_ns > before


def test_all_branches_are_kept_and_resumed(model: str, shelf: Shelf) -> None:
    first = chat(model, shelf)
    say(first, "hello", "/fork idea", "one way", "/switch main", "another way", "/switch idea", "further")
    expected = {name: branch.session.messages for name, branch in first.branches.items()}
    closed(first)
    second = chat(model, shelf)
    assert "other branches: main" in run_command(second, "/resume") and second.name == "idea"
    assert {name: branch.session.messages for name, branch in second.branches.items()} == expected


def test_a_chat_that_cannot_be_kept_says_so_and_goes_on(
        model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    there = chat(model, Shelf(tmp_path / "file" / "chats"))
    say(there, "hello", "and?")
    assert len(there.session.messages) == 4
    assert capsys.readouterr().err.count("not kept: ") == 2


# --- others' chats -----------------------------------------------------------------------------------
@posix
def test_an_open_chat_is_neither_resumed_nor_removed(
        model: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = chat(model, shelf), chat(model, shelf)
    say(first, "hello")
    with pytest.raises(InputError, match="open elsewhere"):
        second.resume()
    monkeypatch.setattr(kept, "MOST", 0)
    assert shelf.tidy() == 0
    closed(first)
    second.resume()
    assert second.session.messages == first.session.messages


def test_a_new_chat_does_not_touch_the_former(model: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    first = chat(model, shelf)
    say(first, "hello")
    before = closed(first)
    monkeypatch.setattr(time, "strftime", lambda _: "20991231-235959")
    second = chat(model, shelf)
    say(second, "something else")
    assert len(shelf.chats()) == 2
    closed(second)
    assert first.kept and second.kept
    again = Session.load(first.kept.files()[0], first.session.engine, first.session.tokenizer)
    assert again.messages == before
    assert [there.folder for there in shelf.chats()] == [second.kept.folder, first.kept.folder]


def test_only_the_oldest_chats_are_removed_and_that_is_said(
        model: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = iter(f"2099123{i}" for i in range(9))
    monkeypatch.setattr(time, "strftime", lambda *_: next(names))
    chats = [chat(model, shelf) for _ in range(4)]
    for there in chats:
        say(there, "hello")
        closed(there)
    monkeypatch.setattr(kept, "MOST", 2)
    loop.greet(chat(model, shelf), Terminal(person=True))
    err = capsys.readouterr().err
    assert "removed the oldest 2" in err and "/resume goes on with it" in err
    assert {there.folder for there in shelf.chats()} == {there.kept.folder for there in chats[2:] if there.kept}


def test_resuming_needs_a_kept_chat_and_an_empty_one(model: str, shelf: Shelf) -> None:
    there = chat(model, shelf)
    with pytest.raises(InputError, match="no chat with this model is kept"):
        there.resume()
    say(there, "hello")
    with pytest.raises(InputError, match="has begun"):
        there.resume()


def test_what_was_chosen_for_this_chat_wins_over_what_was_kept(model: str, shelf: Shelf) -> None:
    first = chat(model, shelf, sampling=Sampling(temperature=1, seed=5), system="Be brief.")
    say(first, "hello")
    closed(first)
    second = chat(model, shelf, sampling=Sampling(temperature=0.5), system="Be long.")
    second.resume()
    assert second.session.sampling == Sampling(temperature=0.5) and second.branch.system == "Be long."
    closed(second)
    third = chat(model, shelf, sampling=USUAL)
    third.resume()
    assert third.session.sampling == USUAL
    closed(third)
    fourth = chat(model, shelf)
    run_command(fourth, "/params temperature 0.7 top_p 0.9")
    fourth.resume()
    assert fourth.session.sampling == USUAL


def test_without_autosave_a_kept_chat_is_resumed_but_not_written(model: str, shelf: Shelf) -> None:
    first = chat(model, shelf)
    say(first, "hello")
    closed(first)
    second = chat(model, shelf, keep=False)
    second.resume()
    say(second, "and?")
    third = chat(model, shelf)
    third.resume()
    assert len(second.session.messages) == 4 and third.session.messages == second.session.messages[:2]


def test_a_damaged_chat_is_one_line_and_nothing_is_resumed(model: str, shelf: Shelf) -> None:
    first = chat(model, shelf)
    say(first, "hello")
    closed(first)
    assert first.kept
    file = first.kept.files()[0]
    file.write_bytes(file.read_bytes()[:-9])
    second = chat(model, shelf)
    with pytest.raises(StateError, match=str(file)):
        second.resume()
    assert list(second.branches) == ["main"] and second.session.messages == []
    say(second, "hello")        # in a folder of its own
    assert second.kept and second.kept.folder != first.kept.folder


# --- where ---------------------------------------------------------------------------------------------
def test_the_state_folder_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_home() == tmp_path / "sbedge"
    monkeypatch.setenv("XDG_STATE_HOME", "relative/counts/for/nothing")
    assert state_home() == Path.home() / ".local/state/sbedge"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state_home() == Path.home() / ".local/state/sbedge"


def test_chats_belong_to_a_checkpoint_whatever_its_path(model: str, tmp_path: Path) -> None:
    engine = sbedge.load(model).engine
    assert chats_folder(model, engine) == chats_folder("elsewhere", engine)
    engine.fingerprint = "../../../../tmp/x"        # a model file may say so
    assert chats_folder(model, engine).parent == state_home() / "chats"
    engine.fingerprint = None
    assert chats_folder(model, engine) != chats_folder("elsewhere", engine)


@posix
def test_only_its_owner_may_read_a_chat(model: str, shelf: Shelf) -> None:
    there = chat(model, shelf)
    say(there, "hello")
    assert there.kept
    for path in (there.kept.folder, *there.kept.folder.iterdir()):
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path


def test_what_a_killed_process_left_half_written_is_removed(model: str, shelf: Shelf) -> None:
    first = chat(model, shelf)
    say(first, "hello")
    closed(first)
    assert first.kept
    (first.kept.folder / "main.stateabc.tmp").write_text("half")
    chat(model, shelf).resume()
    assert not list(first.kept.folder.glob("*.tmp"))


def test_make_chat_keeps_nothing_unless_asked() -> None:
    assert make_chat.__defaults__ == (None, False)
