"""pytest tests/test_chat_reuse.py: a chat reads nothing twice, whatever of its past is edited, cut or taken back."""
from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from fake_engine import FakeEngine, ids_of, render_here, scripted, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sbedge.errors import InputError
from sbedge.runtime import chat_template
from sbedge.runtime.session import NEAR, Session
from sbedge.runtime.state_cache import StateCache
from sbedge.runtime.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data" / "tokenizer"
TOKENIZER = Tokenizer.from_folder(DATA / "qwen2-subset")
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# Opens each reply with a marker that it takes out of earlier turns, thoughts and all.
THINKING = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('#')[-1] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n*{% endif %}")
MESSAGES = ["Hello! How are you?", "one, two", "Once upon a time there was", "I'm fine, don't worry.", "The capital of",
            "count", "and then?", "user", "is Paris", "no"]


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates render here instead of in a process of their own: these tests trust theirs."""
    monkeypatch.setattr(chat_template, "render_chat", render_here)


def new(template: str = CHATML, **options) -> Session:
    tokenizer = replace(TOKENIZER, chat_template=template)
    return Session(FakeEngine(tokenizer), tokenizer, **options)


def say(session: Session, message, **options) -> str:
    return text_of(session.chat(message, **{"max_tokens": 5, **options}))


def fed(session: Session) -> int:
    """How many tokens the engine was given."""
    return sum(len(call) for call in session.engine.calls)


def check_state(session: Session) -> None:
    """The state is the one that reading the session's tokens leads to, and nothing else."""
    engine, found = FakeEngine(session.tokenizer), session.state.copy()
    state = engine.new_state()
    for id in session.tokens:
        engine.forward([id], state)
    if session.engine.script:       # where it stands in its script is its own affair
        found.arrays["0.recurrent_state"].flat[1], found.last_logits = 0, state.last_logits
    assert found.position == len(session.tokens)
    assert found == state


def check_prompt(session: Session) -> None:
    """The session has read what the template makes of its conversation."""
    read = session.tokenizer.decode([*session.tokens, *session.pending])
    assert read == render_here(session.tokenizer.chat_template, session.messages[:-1]) + session.messages[-1]["content"]


def edited(session: Session, index: int, content: str) -> list[dict]:
    """The conversation up to message `index`, which is another now."""
    return [*session.messages[:index], {"role": "user", "content": content}]


# --- nothing is read twice -------------------------------------------------------------------------
def test_ten_turns_feed_every_token_once() -> None:
    session = new()
    for message in MESSAGES:
        before = len(session.tokens)
        say(session, message, system="Be brief.")
        assert session.reused == before and session.reread == ""
        assert session.prefilled <= len(session.pending) + len(TOKENIZER.encode(message)) + 20
    assert fed(session) == len(session.tokens)
    check_state(session)
    check_prompt(session)


@pytest.mark.parametrize("index", [1, 3, 9, 19])
def test_an_edit_of_any_earlier_message_feeds_that_message_and_no_other(index: int) -> None:
    session = new()
    for message in MESSAGES:
        say(session, message, system="Be brief.")
    messages = edited(session, index, "Something else entirely")
    say(session, messages)
    assert session.messages[:-1] == messages
    new_tokens = len(TOKENIZER.encode("<|im_end|>\n<|im_start|>user\nSomething else entirely<|im_end|>\n"
                                      "<|im_start|>assistant\n"))
    assert session.prefilled <= new_tokens + 1      # one more: the reply's last token had not been read
    assert session.reread == f"message {index + 1} was changed"
    check_state(session)
    check_prompt(session)


def test_going_back_to_the_first_version_after_an_edit_feeds_nothing_of_it_again() -> None:
    session = scripted(replace(TOKENIZER, chat_template=CHATML), "I'm fine.<|im_end|>")
    for message in MESSAGES[:4]:
        say(session, message, max_tokens=20)
    first, read = session.messages, len(session.tokens)
    say(session, edited(session, 2, "Something else"))
    say(session, [*first, {"role": "user", "content": "and then?"}])
    assert session.reused == read and session.reread.startswith("message 3 was changed")
    check_state(session)


def test_imported_messages_are_boundaries_too() -> None:
    talk = [{"role": role, "content": f"{i} once upon a time there was"}
            for i, role in enumerate(["system", *["user", "assistant"] * 4, "user"])]
    session = new()
    say(session, talk)
    assert session.reused == 0 and session.reread == ""
    for index in (9, 5, 3, 1):
        before = fed(session)
        say(session, [*talk[:index], {"role": "user", "content": "hm"}], max_tokens=1)
        assert fed(session) - before <= len(TOKENIZER.encode("<|im_start|>user\nhm<|im_end|>\n<|im_start|>assistant\n"))
    check_state(session)


def test_the_system_text_is_read_once_for_all_conversations_that_share_a_cache() -> None:
    engine = FakeEngine(TOKENIZER)
    tokenizer, cache = replace(TOKENIZER, chat_template=CHATML), StateCache(engine)
    for number, message in enumerate(MESSAGES):
        session = Session(engine, tokenizer, cache=cache)
        say(session, message, system="You are a careful assistant. " * 8)
        assert (session.reused > 40) == (number > 0)
        check_state(session)


def test_a_conversation_sent_whole_each_time_is_read_once() -> None:
    """As a server is used: a new session each turn, one cache."""
    engine = FakeEngine(TOKENIZER, script=TOKENIZER.encode("I'm fine.<|im_end|>"))
    tokenizer, cache, messages = replace(TOKENIZER, chat_template=CHATML), StateCache(engine), []
    for message in MESSAGES:
        messages.append({"role": "user", "content": message})
        session = Session(engine, tokenizer, cache=cache)
        say(session, messages, max_tokens=20)
        messages = session.messages
    assert sum(len(call) for call in engine.calls) == len(session.tokens)


def test_asking_for_another_reply_to_the_same_message_feeds_nothing() -> None:
    session = new()
    say(session, "Hello")
    say(session, session.messages[:1])
    assert session.prefilled == 0 and session.reused > 0
    check_state(session)


# --- replies that are not what was drawn -----------------------------------------------------------
def test_a_reply_cut_by_a_stop_string_is_the_only_thing_read_again() -> None:
    tokenizer = replace(TOKENIZER, chat_template=CHATML)
    session = scripted(tokenizer, "one, two, three.<|im_end|>")
    say(session, "Hello", max_tokens=20)
    assert say(session, "count", max_tokens=20, stop=["two"]) == "one, "
    assert session.messages[-1]["content"] == "one, "
    reply = session.reused + session.prefilled
    say(session, "How", max_tokens=20)
    assert session.reused >= reply and session.reread == "reply 2 was cut by a stop string"
    assert session.prefilled <= len(TOKENIZER.encode("one, <|im_end|>\n<|im_start|>user\nHow<|im_end|>\n"
                                                     "<|im_start|>assistant\n"))
    check_state(session)
    check_prompt(session)
    say(session, "is it", max_tokens=20)
    assert session.reread == ""


def test_a_reply_with_a_hidden_marker_is_the_only_thing_read_again() -> None:
    tokenizer = replace(TOKENIZER, chat_template=CHATML)
    session = scripted(tokenizer, "one<|im_start|>two")
    say(session, "count", max_tokens=3)
    reply = session.reused + session.prefilled
    say(session, "How", max_tokens=1)
    assert session.reused == reply and "special tokens that its text does not show" in session.reread


def test_replies_keep_the_ids_they_were_drawn_as() -> None:
    """Drawn at random, they are hardly ever what their text encodes to."""
    session = new()
    ids = ids_of(session.chat("Hello", max_tokens=30))
    assert TOKENIZER.encode(session.messages[-1]["content"], parse_special=False) != ids
    say(session, "one")
    assert session.reread == "" and list(session.tokens[session.reused - 29 :][:30]) == ids


def test_a_template_that_rewrites_earlier_turns_reads_again_what_it_rewrote() -> None:
    tokenizer = replace(TOKENIZER, chat_template=THINKING)
    session = scripted(tokenizer, "one, two # three.<|im_end|>")
    for number, message in enumerate(MESSAGES):
        before = session.reused + session.prefilled     # where the last reply began
        say(session, message, max_tokens=20)
        check_state(session)
        if number == 0:
            continue
        assert session.reread == "the chat template rewrites earlier turns"
        if number > 1:      # once it is known to rewrite, a snapshot is kept of what it keeps
            assert before - session.reused <= len(TOKENIZER.encode("<|im_start|>assistant\n*")) + NEAR


# --- going back ------------------------------------------------------------------------------------
@pytest.mark.parametrize("turns", [1, 2, 5, 10])
def test_rewind_takes_turns_back_and_reads_nothing_again(turns: int) -> None:
    session = new()
    for message in MESSAGES:
        say(session, message, system="Be brief.")
    kept = session.messages[:-2 * turns]
    session.rewind(turns)
    assert session.messages == kept
    check_state(session)
    before = fed(session)
    say(session, "no", max_tokens=1, system="Be brief.")
    assert fed(session) - before <= len(TOKENIZER.encode("<|im_end|>\n<|im_start|>user\nno<|im_end|>\n"
                                                         "<|im_start|>assistant\n")) + 1
    assert session.messages[:-1] == [*kept, {"role": "user", "content": "no"}]
    check_state(session)
    check_prompt(session)


@pytest.mark.parametrize("turns", [0, 3, -1, True, 1.0])
def test_rewind_refuses_what_was_not_said(turns) -> None:
    session = new()
    say(session, "Hello")
    say(session, "How")
    with pytest.raises(InputError, match="from 1 to the conversation's 2"):
        session.rewind(turns)
    assert len(session.messages) == 4


def test_rewind_in_mid_reply_takes_that_reply_back() -> None:
    session = new()
    say(session, "Hello")
    next(iter(session.chat("How")))
    session.rewind()
    assert len(session.messages) == 2
    check_state(session)


def test_text_read_in_between_is_left_behind() -> None:
    session = new()
    say(session, "Hello")
    before = len(session.tokens)
    session.feed("Once upon a time")
    say(session, "How")
    assert session.reused == before and "not part of the conversation" in session.reread
    check_state(session)
    check_prompt(session)


def test_generate_after_a_reply_continues_that_reply() -> None:
    session = new()
    first = say(session, "Hello")
    more = text_of(session.generate(max_tokens=4))
    assert session.messages[-1]["content"] == first + more
    say(session, "How")
    assert session.reread == ""
    check_prompt(session)


def test_a_reply_that_is_continued_ends_at_a_stop_string_like_any_other() -> None:
    session = new()
    first = say(session, "Hello")
    pieces = list(session.generate(max_tokens=200, stop=["e"]))
    assert pieces[-1].finish == "stop" and not session.can_continue
    reply = first + text_of(pieces)
    assert session.messages[-1]["content"] == reply
    say(session, "How")
    assert [m["content"] for m in session.messages[:3]] == ["Hello", reply, "How"]
    check_state(session)


def test_only_a_reply_that_nothing_followed_can_be_continued() -> None:
    session = new()
    assert not session.can_continue
    say(session, "Hello")
    assert session.can_continue and session.fork().can_continue
    session.engine.interrupt_after = len(session.engine.calls)
    with pytest.raises(KeyboardInterrupt):
        say(session, "How")
    session.engine.interrupt_after = None
    assert not session.can_continue
    say(session, "How")
    session.rewind()
    assert not session.can_continue


def test_an_interrupted_prompt_is_not_read_again() -> None:
    session = new()
    long = "Once upon a time there was " * 300
    session.engine.interrupt_after, session.engine.interrupted = 2, "after"
    with pytest.raises(KeyboardInterrupt):
        say(session, long)
    read = len(session.tokens)
    assert read > 1000 and session.messages == []
    session.engine.interrupt_after = None
    say(session, long)
    assert session.reused == read and fed(session) == len(session.tokens)
    check_state(session)


@pytest.mark.parametrize("interrupted", ["before", "between", "after"])
@pytest.mark.parametrize("calls", range(1, 16))
def test_a_chat_interrupted_anywhere_goes_on_from_a_sound_state(interrupted: str, calls: int) -> None:
    """Even where the engine cannot say how far it came: then the last snapshot is the beginning."""
    session = new()
    say(session, "Hello", system="Be brief.")
    session.engine.interrupt_after, session.engine.interrupted = len(session.engine.calls) + calls, interrupted
    with pytest.raises(KeyboardInterrupt):
        say(session, "Once upon a time there was " * 150, max_tokens=None)
    session.engine.interrupt_after = None
    say(session, "and then?")
    check_state(session)
    assert session.messages[-2]["content"] == "and then?"
    check_prompt(session)


@pytest.mark.parametrize("interrupted", ["before", "between", "after"])
@pytest.mark.parametrize("calls", range(1, 16))
def test_what_is_saved_or_read_on_after_an_interrupt_is_sound(interrupted: str, calls: int, tmp_path: Path) -> None:
    session = new()
    say(session, "Hello")
    session.engine.interrupt_after, session.engine.interrupted = len(session.engine.calls) + calls, interrupted
    with pytest.raises(KeyboardInterrupt):
        say(session, "Once upon a time there was " * 150, max_tokens=None)
    session.engine.interrupt_after = None
    fork = session.fork()
    fork.feed("more")
    check_state(fork)
    session.save(tmp_path / "s.state")
    loaded = Session.load(tmp_path / "s.state", session.engine, session.tokenizer)
    assert loaded.messages == session.messages
    check_state(loaded)
    say(loaded, "and then?")
    check_state(loaded)
    check_prompt(loaded)


# --- what cannot be reused -------------------------------------------------------------------------
def test_without_room_in_the_cache_edits_read_from_the_start_and_say_so() -> None:
    session = new(cache=StateCache(FakeEngine(TOKENIZER), budget=0))
    for message in MESSAGES:
        say(session, message)
    assert fed(session) == len(session.tokens) and session.reread == ""     # the state itself is enough to go on
    say(session, edited(session, 8, "no"))
    assert session.reused == 0
    assert session.reread.startswith("message 9 was changed; the cache holds no snapshot nearer than ")
    check_state(session)


def test_a_loaded_session_goes_on_without_reading_and_says_what_it_cannot_go_back_to(tmp_path: Path) -> None:
    session = new()
    for message in MESSAGES:
        say(session, message)
    session.save(tmp_path / "s.state")
    loaded = Session.load(tmp_path / "s.state", FakeEngine(session.tokenizer), session.tokenizer)
    assert loaded.messages == session.messages
    say(loaded, "and?")
    assert loaded.reused == len(session.tokens) and loaded.reread == ""
    say(loaded, edited(loaded, 2, "no"))
    assert loaded.reused == 0 and "no snapshot" in loaded.reread
    check_state(loaded)


def test_a_session_with_an_empty_reply_is_saved_and_loaded(tmp_path: Path) -> None:
    session = scripted(replace(TOKENIZER, chat_template=CHATML), "<|im_end|>")
    assert say(session, "Hello") == ""
    for _ in range(2):
        session.save(tmp_path / "s.state")
        loaded = Session.load(tmp_path / "s.state", session.engine, session.tokenizer)
        assert loaded.messages == session.messages and loaded.messages[1]["content"] == ""
        session.feed("settles the reply")
    say(loaded, "How")
    assert len(loaded.messages) == 4


@pytest.mark.parametrize("message", [[], [{"role": "user"}], [{"role": "user", "content": 3}], ["hi"], "", " ", 7,
                                     [{"role": "user", "content": " "}]])
def test_what_is_no_conversation_is_refused(message) -> None:
    session = new()
    say(session, "Hello")
    with pytest.raises(InputError, match="message"):
        session.chat(message)
    assert len(session.messages) == 2


# --- whatever happens ------------------------------------------------------------------------------
words = st.sampled_from(MESSAGES)
actions = st.lists(st.one_of(
    st.tuples(st.just("say"), words, st.integers(1, 6)),
    st.tuples(st.just("cut"), words, st.sampled_from("aeiou ")),
    st.tuples(st.just("break"), words, st.integers(0, 3)),
    st.tuples(st.just("edit"), words, st.integers(0, 5)),
    st.tuples(st.just("system"), words, st.just(0)),
    st.tuples(st.just("rewind"), st.just(""), st.integers(1, 3)),
    st.tuples(st.just("feed"), words, st.just(0)),
    st.tuples(st.just("more"), st.sampled_from(["", "aeiou"]), st.integers(1, 3)),
    st.tuples(st.just("fork"), st.just(""), st.just(0)),
    st.tuples(st.just("reload"), st.just(""), st.just(0)),
), max_size=10)


def act(session: Session, what: str, text: str, number, path: Path) -> Session:
    asked = [i for i, m in enumerate(session.messages) if m["role"] == "user"]
    if what == "cut":
        say(session, text, stop=[number])
    elif what == "break":
        for _, at in zip(session.chat(text, max_tokens=9), count(), strict=False):
            if at == number:
                break
    elif what == "edit" and number < len(asked):
        say(session, edited(session, asked[number], text))
    elif what == "system":
        say(session, "no", system=text)
    elif what == "rewind" and number <= len(asked):
        session.rewind(number)
    elif what == "feed":
        session.feed(text)
    elif what == "more" and session.tokens:
        list(session.generate(max_tokens=number, stop=list(text)))
    elif what == "fork":
        return session.fork()
    elif what == "reload":
        session.save(path)
        return Session.load(path, session.engine, session.tokenizer, cache=session.cache)
    else:
        say(session, text or "no", max_tokens=number or 1)
    return session


@pytest.mark.parametrize("template", [CHATML, THINKING], ids=["chatml", "thinking"])
@settings(max_examples=60, deadline=None)
@given(steps=actions, budget=st.sampled_from([None, 0, 3_000_000]))
def test_whatever_is_done_the_state_is_that_of_the_tokens_and_the_tokens_those_of_the_conversation(
        template: str, tmp_path_factory: pytest.TempPathFactory, steps: list, budget: int | None) -> None:
    path = tmp_path_factory.getbasetemp() / "reloaded.state"
    session = new(template, cache=StateCache(FakeEngine(TOKENIZER), budget=budget))
    for step in steps:
        session = act(session, *step, path)
        check_state(session)
    session = act(session, "say", "and then?", 4, path)
    assert session.reused + session.prefilled + 3 == len(session.tokens)
    check_state(session)
    if template == CHATML:
        check_prompt(session)
