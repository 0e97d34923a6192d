"""pytest tests/test_state_cache.py: snapshots give back the very state, share what they can, keep within a budget."""
from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from golden import TINY, W8ASPIKE
from hypothesis import given, settings
from hypothesis import strategies as st

from sbedge.errors import StateError
from sbedge.reference import Reference
from sbedge.runtime import state_cache
from sbedge.runtime.state_cache import Snapshot, StateCache, default_budget
from sbedge.state import State

ENGINES = {folder.name: Reference(folder) for folder in (TINY, W8ASPIKE)}


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> Reference:
    return ENGINES[request.param]


def read(engine: Reference, ids: Sequence[int], state: State | None = None) -> State:
    state = state or engine.new_state()
    if ids:
        engine.forward(np.asarray(ids) % engine.config.vocab_size, state)
    return state


def random_ids(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 200, count).tolist()


def held(cache: StateCache) -> int:
    """Bytes that the cache really holds."""
    arrays = {id(a): a.nbytes for s in cache._snapshots.values()
              for a in (*s.arrays.values(), s.last_logits, *(a for r in s.rows for a in r.arrays.values()))}
    return sum(arrays.values())


# --- exact -----------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(list(ENGINES)), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
       shared=st.lists(st.booleans(), min_size=8, max_size=8))
def test_every_snapshot_of_a_path_gives_back_the_very_state(name: str, sizes: list[int], shared: list[bool]) -> None:
    engine, ids, last = ENGINES[name], [], None
    cache, state, states = StateCache(engine), engine.new_state(), []
    for size, share in zip(sizes, shared, strict=False):
        new = random_ids(len(ids), size)
        ids += new
        read(engine, new, state)
        last = cache.put(ids, state, last if share else None)
        states.append((len(ids), state.copy()))
    assert cache.nbytes == held(cache)
    for length, expected in states:
        found = cache.longest(ids[:length])
        assert found is not None and cache.state(found) == expected
    read(engine, [1, 2, 3], state)      # moves no snapshot
    found = cache.longest(ids)
    assert found is not None and cache.state(found) == states[-1][1]


def test_branches_share_their_trunk_and_do_not_mix(engine: Reference) -> None:
    cache, trunk = StateCache(engine), random_ids(0, 30)
    state = read(engine, trunk)
    root = cache.put(trunk, state)
    branches = {}
    for seed in (1, 2):
        ids, tip, last = list(trunk), state.copy(), root
        for step in range(3):
            new = random_ids(10 * seed + step, 9)
            ids += new
            last = cache.put(ids, read(engine, new, tip), last)
        branches[tuple(ids)] = tip
    for ids, tip in branches.items():
        found = cache.longest([*ids, 5, 6])
        assert found is not None and cache.state(found) == tip


def test_an_empty_state_and_a_full_window_at_once_are_kept(engine: Reference) -> None:
    cache = StateCache(engine)
    empty = engine.new_state()
    last = cache.put([], empty)
    ids = random_ids(3, 200)        # more than three windows of the first model
    state = read(engine, ids)
    cache.put(ids, state, last)
    for length, expected in ((0, empty), (200, state)):
        found = cache.longest(ids[:length], above=-1)
        assert found is not None and cache.state(found) == expected


# --- cheap -----------------------------------------------------------------------------------------
def test_a_snapshot_costs_what_is_new_in_it(engine: Reference) -> None:
    cache, ids, state, last = StateCache(engine), [], engine.new_state(), None
    ring = sum(a.nbytes // len(a) for name, a in state.arrays.items() if "recurrent" not in name)
    fixed = sum(a.nbytes for name, a in state.arrays.items() if "recurrent" in name) + 4 * engine.config.vocab_size
    for size in (5, 1, 30, 7, 50, 3):
        before = cache.nbytes
        new = random_ids(size, size)
        ids += new
        last = cache.put(ids, read(engine, new, state), last)
        assert cache.nbytes - before == fixed + ring * min(size, engine.config.sliding_window)


def test_dropping_a_snapshot_leaves_the_others_whole(engine: Reference) -> None:
    ids, state, last, states = [], engine.new_state(), None, []
    cache = StateCache(engine)
    for step in range(6):
        ids += random_ids(step, 4)
        last = cache.put(ids, read(engine, ids[-4:], state), last)
        states.append((list(ids), state.copy()))
    cache.budget = cache.nbytes // 2
    cache.put([1], read(engine, [1]))
    assert cache.nbytes == held(cache) <= cache.budget and 1 < len(cache) < 7
    for prefix, expected in reversed(states):
        found = cache.longest(prefix)
        if found is None or found.position < len(prefix):
            break
        assert cache.state(found) == expected


# --- bounded ---------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(budget=st.integers(0, 60_000), lengths=st.lists(st.integers(1, 60), max_size=30))
def test_the_budget_is_never_passed(budget: int, lengths: list[int]) -> None:
    engine = ENGINES[TINY.name]
    cache = StateCache(engine, budget=budget)
    for seed, length in enumerate(lengths):
        ids, state = random_ids(seed, length), engine.new_state()
        state.position, state.last_logits = length, np.zeros(engine.config.vocab_size, np.float32)
        cache.put(ids, state)
        assert cache.nbytes == held(cache) <= budget
        assert (cache.longest(ids) is not None) == (len(cache) > 0)


def test_the_least_recently_used_goes_first(engine: Reference) -> None:
    paths = [random_ids(seed, 5) for seed in range(4)]
    one = Snapshot(read(engine, paths[0]))
    cache = StateCache(engine, budget=3 * (one.nbytes + one.rows[0].nbytes))
    for ids in paths[:3]:
        cache.put(ids, read(engine, ids))
    assert cache.longest(paths[0])
    cache.put(paths[3], read(engine, paths[3]))
    assert [cache.longest(ids) is not None for ids in paths] == [True, False, True, True]


def test_the_longest_prefix_is_found_and_nothing_that_only_resembles_it(engine: Reference) -> None:
    cache, ids = StateCache(engine), random_ids(0, 20)
    for length in (4, 9, 15):
        cache.put(ids[:length], read(engine, ids[:length]))
    for length, expected in ((20, 15), (15, 15), (14, 9), (8, 4), (3, None)):
        found = cache.longest(ids[:length])
        assert (found and found.position) == expected
    assert cache.longest(ids, above=15) is None
    other = [*ids[:8], 250, *ids[9:]]
    found = cache.longest(other)
    assert found is not None and found.position == 4


def test_the_default_budget_holds_two_full_states_and_follows_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ENGINES[TINY.name]
    assert default_budget(engine) == state_cache.memory_bytes() // 8
    monkeypatch.setattr(state_cache, "memory_bytes", lambda: 8000)
    assert default_budget(engine) == 2 * (engine.new_state().nbytes + 4 * engine.config.vocab_size)


def test_threads_may_share_a_cache(engine: Reference) -> None:
    cache = StateCache(engine, budget=200_000)
    wrong: list[str] = []

    def work(seed: int) -> None:
        ids, state, last = [], engine.new_state(), None
        for step in range(12):
            new = random_ids(100 * seed + step, 5)
            ids += new
            last = cache.put(ids, read(engine, new, state), last)
            found = cache.longest(ids)
            if found is not None and found.position == len(ids) and cache.state(found) != state:
                wrong.append(f"{seed} {step}")

    threads = [threading.Thread(target=work, args=(seed % 3,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and cache.nbytes == held(cache) <= 200_000


# --- on disk ---------------------------------------------------------------------------------------
def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.state"), key=lambda path: int(path.name.split("-")[0]))


@pytest.fixture
def kept(engine: Reference, tmp_path: Path) -> tuple[list[int], Path]:
    """A folder with the states of a path after 5, 10, 15 and 20 tokens."""
    cache, ids, state, last = StateCache(engine, folder=tmp_path / "kept"), [], engine.new_state(), None
    for step in range(4):
        ids += random_ids(step, 5)
        last = cache.put(ids, read(engine, ids[-5:], state), last)
    return ids, tmp_path / "kept"


def test_another_process_finds_what_was_kept(engine: Reference, kept: tuple[list[int], Path]) -> None:
    ids, folder = kept
    cache = StateCache(engine, folder=folder)
    assert len(cache) == 0 and len(files(folder)) == 4
    state = engine.new_state()
    for step in range(4):       # in the same chunks, for the very same rounding
        read(engine, ids[5 * step:5 * step + 5], state)
        if step >= 2:
            found = cache.longest(ids[:5 * step + 8])
            assert found is not None and cache.state(found) == state
    assert len(cache) == 2      # in memory now


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "other", "foreign"])
def test_a_damaged_file_is_passed_over_and_removed_with_a_warning(
        engine: Reference, kept: tuple[list[int], Path], harm: str) -> None:
    ids, folder = kept
    cache = StateCache(engine, folder=folder)
    path, data = files(folder)[-1], files(folder)[-1].read_bytes()
    if harm == "other":
        path.write_bytes(files(folder)[0].read_bytes())
    elif harm == "foreign":
        State(ENGINES[next(n for n in ENGINES if ENGINES[n] is not engine)].config).save(path)
    else:
        path.write_bytes({"cut": data[:-9], "flip": data[:-9] + b"\xff\x7f" + data[-7:], "empty": b""}[harm])
    with pytest.warns(UserWarning, match=rf"{path.name}: .*; it is removed from the cache"):
        found = cache.longest(ids)
    assert found is not None and found.position == 15 and not path.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = cache.longest(ids)
    assert again is found


def test_a_file_that_another_process_removed_is_just_not_there(engine: Reference, kept: tuple[list[int], Path]) -> None:
    ids, folder = kept
    cache = StateCache(engine, folder=folder)
    files(folder)[-1].unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cache.longest(ids)
    assert found is not None and found.position == 15


def test_states_of_another_checkpoint_are_not_found(kept: tuple[list[int], Path], engine: Reference) -> None:
    ids, folder = kept
    other = Reference.__new__(Reference)
    other.config, other.fingerprint = engine.config, "f" * 64
    assert StateCache(other, folder=folder).longest(ids) is None and len(files(folder)) == 4


def test_the_folder_keeps_to_its_budget_and_touches_no_other_file(engine: Reference, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    (tmp_path / "mine.state").write_text("mine")
    cache = StateCache(engine, folder=tmp_path, folder_budget=0)
    cache.put([1], read(engine, [1]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.state", "thesis.txt"]
    assert cache.longest([1]) is not None       # memory has its own
    cache = StateCache(engine, folder=tmp_path)
    for seed in range(4):
        cache.put(random_ids(seed, 5), read(engine, random_ids(seed, 5)))
    sizes = {p: p.stat().st_size for p in files(tmp_path)}
    for age, path in enumerate(sizes):
        os.utime(path, (age, age))
    StateCache(engine, folder=tmp_path, folder_budget=2 * max(sizes.values()))
    assert [p.exists() for p in sizes] == [False, False, True, True]
    assert (tmp_path / "thesis.txt").exists() and (tmp_path / "mine.state").exists()


def test_what_a_killed_process_left_half_written_is_removed(
        engine: Reference, kept: tuple[list[int], Path]) -> None:
    _, folder = kept
    old, new = (folder / (files(folder)[0].name + f"{n}.tmp") for n in "ab")
    for path, age in ((old, 5000), (new, 0)):
        path.write_text("half")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    StateCache(engine, folder=folder)
    assert not old.exists() and new.exists()


def test_a_full_disk_is_a_warning_and_no_error(
        engine: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StateCache(engine, folder=tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sbedge.state_file.os.replace", full)
    with pytest.warns(UserWarning, match="No space left on device.*not kept on disk"):
        cache.put([1], read(engine, [1]))
    assert cache.longest([1]) is not None and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_one_line(engine: Reference, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StateError, match=r"file: no folder to keep states in \(.*\); name another"):
        StateCache(engine, folder=tmp_path / "file")
