"""The state is a plain value: constant in size, copied, compared, saved and loaded."""
from __future__ import annotations

import os
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from golden import TINY, W8ASPIKE, truncate
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import write_tiny_checkpoint

from sbedge.checkpoint import Checkpoint
from sbedge.errors import StateError
from sbedge.reference import Reference
from sbedge.state import State


@pytest.fixture(scope="module", params=[TINY, W8ASPIKE], ids=lambda folder: folder.name)
def model(request: pytest.FixtureRequest) -> Reference:
    return Reference(request.param)


@pytest.fixture
def state(model: Reference) -> State:
    """A state after 70 tokens: past both windows."""
    state = model.new_state()
    model.forward(np.arange(70) * 7 % model.config.vocab_size, state)
    return state


def test_the_layout_is_the_documented_one() -> None:
    f32, w8 = State(Reference(TINY).config), State(Reference(W8ASPIKE).config)
    assert {name: (a.shape, a.dtype.name) for name, a in f32.arrays.items()} == {
        "0.recurrent_state": ((2, 16, 16), "float32"), "1.keys": ((16, 2, 16), "float32"),
        "1.values": ((16, 2, 16), "float32"), "2.recurrent_state": ((2, 16, 16), "float32"),
        "3.keys": ((16, 2, 16), "float32"), "3.values": ((16, 2, 16), "float32")}
    assert {name: (a.shape, a.dtype.name) for name, a in w8.arrays.items() if name[0] == "1"} == {
        "1.keys": ((64, 1, 64), "int8"), "1.values": ((64, 1, 64), "int8"),
        "1.key_scales": ((64, 1), "float32"), "1.value_scales": ((64, 1), "float32")}


def test_a_new_state_is_zero_at_position_zero(model: Reference) -> None:
    state = model.new_state()
    assert state.position == 0 and state.last_logits is None and not state.block.any()


def test_arrays_are_aligned_contiguous_views_of_one_block(state: State) -> None:
    start, stop = state.block.ctypes.data, state.block.ctypes.data + state.block.nbytes
    spans = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in state.arrays.values())
    for array in state.arrays.values():
        assert array.ctypes.data % 64 == 0 and array.flags.c_contiguous and array.flags.writeable
    assert spans[0][0] >= start and spans[-1][1] <= stop
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_the_size_does_not_depend_on_the_position(model: Reference) -> None:
    state = model.new_state()
    sizes, blocks = set(), set()
    for _ in range(5):
        model.forward(list(range(40)), state, logits="none")
        sizes.add(state.nbytes)
        blocks.add(state.block.ctypes.data)
    assert sizes == {model.new_state().nbytes} and len(blocks) == 1


def test_a_copy_has_the_same_future_and_shares_nothing(model: Reference, state: State) -> None:
    twin = state.copy()
    assert twin == state and not np.shares_memory(twin.block, state.block)
    ours = model.forward([5, 6], state)
    assert twin != state
    theirs = model.forward([5, 6], twin)
    np.testing.assert_array_equal(ours, theirs)
    assert twin == state


def test_equality_sees_arrays_position_and_logits(state: State) -> None:
    for change in ("array", "position", "logits", "no logits"):
        twin = state.copy()
        assert twin.last_logits is not None
        if change == "array":
            next(iter(twin.arrays.values())).flat[-1] += 1
        elif change == "position":
            twin.position += 1
        elif change == "logits":
            twin.last_logits[0] += 1
        else:
            twin.last_logits = None
        assert twin != state, change
    assert state != "a state"


# --- files -----------------------------------------------------------------------------------------
def test_a_saved_state_loads_equal_and_continues_alike(model: Reference, state: State, tmp_path: Path) -> None:
    state.save(tmp_path / "s.state", {"model": "x"})
    loaded = State.load(tmp_path / "s.state", model.config)
    assert loaded == state and State.load_extra(tmp_path / "s.state") == {"model": "x"}
    np.testing.assert_array_equal(model.forward([1, 2, 3], loaded), model.forward([1, 2, 3], state))


def test_a_state_without_logits_is_saved_too(model: Reference, tmp_path: Path) -> None:
    state = model.new_state()
    model.forward([1], state, logits="none")
    state.save(tmp_path / "s.state")
    assert State.load(tmp_path / "s.state", model.config) == state


def test_saving_replaces_the_file_and_leaves_no_other(state: State, tmp_path: Path) -> None:
    path = tmp_path / "s.state"
    path.write_text("old")
    state.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["s.state"] and path.stat().st_size > state.nbytes


def test_a_state_that_cannot_be_written_is_one_line_and_leaves_nothing(state: State, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be written"):
        state.save(tmp_path / "no such folder" / "s.state")
    (tmp_path / "folder.state").mkdir()
    with pytest.raises(StateError, match=r"folder\.state: state cannot be written"):
        state.save(tmp_path / "folder.state")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.state"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_state_is_refused(model: Reference, state: State, tmp_path: Path, share: float) -> None:
    state.save(tmp_path / "s.state")
    truncate(tmp_path / "s.state", share)
    with pytest.raises(StateError, match=r"s\.state: not a saved state, or damaged"):
        State.load(tmp_path / "s.state", model.config)


def test_a_state_of_another_model_is_refused(state: State, model: Reference, tmp_path: Path) -> None:
    state.save(tmp_path / "s.state")
    other = Reference(W8ASPIKE if model.config.vocab_size == 320 else TINY).config
    with pytest.raises(StateError, match=r"another model|does not have"):
        State.load(tmp_path / "s.state", other)


def test_another_safetensors_file_is_refused(model: Reference) -> None:
    with pytest.raises(StateError, match="not a state saved by sbedge"):
        State.load(TINY / "model.safetensors", model.config)


def test_a_missing_state_is_refused(model: Reference, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"none\.state"):
        State.load(tmp_path / "none.state", model.config)


@pytest.mark.parametrize("position", ["-1", "1e3", "", "9" * 30, "٣"])
def test_an_absurd_position_is_refused(model: Reference, state: State, tmp_path: Path, position: str) -> None:
    path = tmp_path / "s.state"
    state.save(path)
    save_file(load_file(path), path, {"format": "sbedge-state-1", "position": position})
    with pytest.raises(StateError, match="position is"):
        State.load(path, model.config)


def test_a_state_with_a_wrong_type_or_a_missing_or_extra_array_is_refused(
        model: Reference, state: State, tmp_path: Path) -> None:
    path, metadata = tmp_path / "s.state", {"format": "sbedge-state-1", "position": "70"}
    state.save(path)
    arrays = load_file(path)
    name = "0.recurrent_state"
    for broken in ({**arrays, name: arrays[name].astype(np.float16)}, {**arrays, "extra": arrays[name]},
                   {n: a for n, a in arrays.items() if n != name}, {**arrays, "last_logits": np.zeros(3, np.float32)}):
        save_file(broken, path, metadata)
        with pytest.raises(StateError, match=r"s\.state: "):
            State.load(path, model.config)


# --- whose it is, and what a file holds ------------------------------------------------------------
def save_version_1(state: State, path: Path, **extra: str) -> None:
    """As they were written before windows were stored by their slots in use."""
    save_file({**state.arrays, "last_logits": state.last_logits}, path,
              {"format": "sbedge-state-1", "position": str(state.position), **extra})


def test_a_state_knows_the_checkpoint_it_belongs_to(model: Reference, state: State, tmp_path: Path) -> None:
    fingerprint = Checkpoint(TINY if model.config.vocab_size == 320 else W8ASPIKE).fingerprint
    state.save(tmp_path / "s.state")
    loaded = State.load(tmp_path / "s.state", model.config, fingerprint)
    assert loaded.fingerprint == state.fingerprint == state.copy().fingerprint == fingerprint


def test_a_state_of_another_checkpoint_of_the_same_sizes_is_refused_by_its_fingerprint(
        model: Reference, state: State, tmp_path: Path) -> None:
    state.save(tmp_path / "s.state")
    with pytest.raises(StateError, match=rf"s\.state: belongs to another model: .*'{state.fingerprint[:12]}', "
                                         r"expected 'ffffffffffff'; use it with"):
        State.load(tmp_path / "s.state", model.config, "f" * 64)


def test_a_state_of_an_unknown_checkpoint_is_taken_by_its_sizes(model: Reference, state: State, tmp_path: Path) -> None:
    state.fingerprint = None
    state.save(tmp_path / "s.state")
    assert State.load(tmp_path / "s.state", model.config, "f" * 64).fingerprint == "f" * 64


def test_a_window_of_another_size_is_refused_though_its_slots_in_use_fit(tmp_path: Path) -> None:
    wide, narrow = (Reference(write_tiny_checkpoint(tmp_path / str(W), sliding_window=W)) for W in (16, 12))
    state = wide.new_state()
    wide.forward([1, 2, 3], state)
    state.save(tmp_path / "s.state")
    with pytest.raises(StateError, match="its sliding window is 16, expected 12"):
        State.load(tmp_path / "s.state", narrow.config)


def test_states_of_version_1_still_load(model: Reference, tmp_path: Path) -> None:
    for count in (3, 70):
        state = model.new_state()
        model.forward(np.arange(count) % model.config.vocab_size, state)
        save_version_1(state, tmp_path / "old.state", session="{}", note="x")
        assert State.load(tmp_path / "old.state", model.config, model.fingerprint) == state
        assert State.load_extra(tmp_path / "old.state") == {"session": "{}", "note": "x"}


def test_any_safetensors_library_reads_a_saved_state(state: State, tmp_path: Path) -> None:
    state.save(tmp_path / "s.state", {"note": "é\x00"})
    arrays = load_file(tmp_path / "s.state")
    assert bytes(arrays.pop("extra.note")).decode() == "é\x00"
    np.testing.assert_array_equal(arrays.pop("last_logits"), state.last_logits)
    assert arrays.keys() == state.arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, state.arrays[name])
    with safe_open(tmp_path / "s.state", "numpy") as file:
        assert file.metadata().items() >= {"format": "sbedge-state-2", "position": "70",
                                           "fingerprint": state.fingerprint}.items()


def test_the_checksum_is_the_documented_one(state: State, tmp_path: Path) -> None:
    state.save(tmp_path / "s.state", {"note": '"checksum":"12345678"'})
    data = (tmp_path / "s.state").read_bytes()
    with safe_open(tmp_path / "s.state", "numpy") as file:
        checksum = file.metadata()["checksum"]
    zeroed = data[8:].replace(f'"checksum":"{checksum}"'.encode(), b'"checksum":"00000000"', 1)
    assert f"{zlib.crc32(zeroed):08x}" == checksum


def test_a_short_state_makes_a_small_file(tmp_path: Path) -> None:
    model = Reference(write_tiny_checkpoint(tmp_path / "c", sliding_window=4096))
    state = model.new_state()
    model.forward([1, 2, 3], state)
    state.save(tmp_path / "s.state")
    assert (tmp_path / "s.state").stat().st_size < state.nbytes / 50
    assert State.load(tmp_path / "s.state", model.config) == state == state.copy()


def test_any_changed_byte_is_found(model: Reference, state: State, tmp_path: Path) -> None:
    path = tmp_path / "s.state"
    state.save(path, {"session": "{}"})
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(header + 8), *range(header + 8, len(good), 97), len(good) - 1]:
        with path.open("r+b") as file:      # in place: far faster than a new file each time
            file.write(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
        with pytest.raises(StateError, match=r"s\.state: "):
            State.load(path, model.config)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_refused_at_once(model: Reference, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(StateError, match="not a file"):
            State.load(path, model.config)
