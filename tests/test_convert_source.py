"""pytest tests/test_convert_source.py: Llama and Qwen2 folders become checkpoints; deltas are applied or refused.

None of this needs torch.
"""
from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeEngine
from safetensors.numpy import load_file, save_file
from tiny_llama import write_tiny_llama

from sbedge.apps import cli
from sbedge.apps.convert.delta import PARTS, Delta, apply_delta, load_delta, save_delta
from sbedge.apps.convert.loops import going_on, loop
from sbedge.apps.convert.sampling import Writer
from sbedge.apps.convert.source import hugging_face_name, write_window_checkpoint
from sbedge.checkpoint import Checkpoint, expected_tensors
from sbedge.config import ModelConfig
from sbedge.errors import CheckpointError, ExportError, ModelFileError
from sbedge.reference import Reference
from sbedge.runtime.chat_template import chat_parts
from sbedge.runtime.tokenizer import Tokenizer

# ---- sources ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_hugging_face_folder_becomes_a_checkpoint(tmp_path: Path, kind: str, tied: bool) -> None:
    source = write_tiny_llama(tmp_path / "source", kind, tie_word_embeddings=tied)
    write_window_checkpoint(source, tmp_path / "out", window=100)
    checkpoint, theirs = Checkpoint(tmp_path / "out"), load_file(source / "model.safetensors")
    assert checkpoint.config.attn_layers == (0, 1, 2) and checkpoint.config.sliding_window == 100
    assert (checkpoint.config.rope_theta, checkpoint.config.norm_eps) == (10000.0, 1e-5)
    for name in checkpoint.names():
        stored = theirs.get(hugging_face_name(name))
        np.testing.assert_array_equal(checkpoint.tensor(name), 0 if stored is None else stored, err_msg=name)
    assert Tokenizer.from_folder(tmp_path / "out").encode("ab") == Tokenizer.from_folder(source).encode("ab")


def test_a_window_checkpoint_is_a_source_itself(tmp_path: Path) -> None:
    write_window_checkpoint(write_tiny_llama(tmp_path / "source"), tmp_path / "a")
    write_window_checkpoint(tmp_path / "a", tmp_path / "b")
    assert Checkpoint(tmp_path / "a").fingerprint == Checkpoint(tmp_path / "b").fingerprint


@pytest.mark.parametrize(("overrides", "line"), [
    ({"model_type": "mamba"}, "model_type is 'mamba', expected one of llama, qwen2"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rotary scaling .* is set, expected none"),
    ({"head_dim": 16}, "head_dim is 16, expected 8"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"num_hidden_layers": 4}, r"model\.layers\.3\..* is missing"),
    ({"num_hidden_layers": 2}, r"unexpected tensor model\.layers\.2\."),
    ({"intermediate_size": 50}, r"has shape \[48, 32\] and type F32, expected \[50, 32\]"),
])
def test_a_folder_that_is_no_such_model_is_refused(tmp_path: Path, overrides: dict, line: str) -> None:
    source = write_tiny_llama(tmp_path / "source")
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, **overrides}))
    with pytest.raises(CheckpointError, match=line):
        write_window_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("damage", "line"), [
    (lambda f: (f / "model.safetensors").unlink(), "no such file; expected the weights as safetensors"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "damaged safetensors file"),
    (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object, found list"),
    (lambda f: (f / "config.json").unlink(), "expected a folder with config.json"),
])
def test_a_damaged_folder_is_refused(tmp_path: Path, damage, line: str) -> None:
    source = write_tiny_llama(tmp_path / "source")
    damage(source)
    with pytest.raises(CheckpointError, match=line):
        write_window_checkpoint(source, tmp_path / "out")


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file; expected a GGUF file, or a folder"):
        write_window_checkpoint(tmp_path / "nothing", tmp_path / "out")


# ---- deltas -------------------------------------------------------------------------------------------

@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_window_checkpoint(write_tiny_llama(tmp_path / "llama"), tmp_path / "source")
    return tmp_path / "source"


def a_delta(source: Path, rank: int = 2) -> Delta:
    """Layer 1 becomes GLA, all layers' linears get corrections."""
    checkpoint, rng = Checkpoint(source), np.random.default_rng(0)
    raw = json.loads((source / "config.json").read_text())
    shapes = expected_tensors(ModelConfig.from_dict({**raw, "attn_layers": [0, 2]}))
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items() if ".1.attn." in n}
    for i in range(3):
        for part, linears in PARTS.items():
            if i == 1 and part.startswith("attn"):
                continue
            of = [shapes[f"model.layers.{i}.{linear}.weight"] for linear in linears]
            for matrix, width in (("A", of[0][1]), ("B", sum(shape[0] for shape in of))):
                tensors[f"model.layers.{i}.{part}.{matrix}"] = rng.standard_normal((rank, width)).astype(np.float32)
    return Delta(checkpoint.fingerprint, (0, 2), tensors)


def test_a_delta_makes_a_hybrid_of_its_source(tmp_path: Path, source: Path) -> None:
    delta = a_delta(source)
    apply_delta(source, delta, tmp_path / "out", extra={"note.txt": b"x"})
    base, hybrid = Checkpoint(source), Checkpoint(tmp_path / "out")
    assert hybrid.config.attn_layers == (0, 2) and (tmp_path / "out/note.txt").read_bytes() == b"x"
    A, B = (delta.tensors[f"model.layers.2.attn.qkv.{m}"] for m in "AB")
    for linear, rows in (("q", slice(0, 32)), ("k", slice(32, 48)), ("v", slice(48, 64))):
        name = f"model.layers.2.attn.{linear}_proj.weight"
        np.testing.assert_allclose(hybrid.tensor(name), base.tensor(name) + B[:, rows].T @ A, rtol=1e-5, atol=1e-5)
    name = "model.layers.1.attn.gk_proj.1.bias"
    np.testing.assert_array_equal(hybrid.tensor(name), delta.tensors[name])
    np.testing.assert_array_equal(hybrid.tensor("model.norm.weight"), base.tensor("model.norm.weight"))
    assert hybrid.fingerprint != base.fingerprint
    reference = Reference(hybrid)
    assert np.isfinite(reference.forward([1, 2, 3], reference.new_state(), logits="all")).all()


def test_a_saved_delta_comes_back_within_8_bit(tmp_path: Path, source: Path) -> None:
    delta = a_delta(source)
    save_delta(delta, tmp_path / "d.safetensors")
    back = load_delta(tmp_path / "d.safetensors")
    assert (back.source, back.attn_layers, back.tensors.keys()) == (delta.source, (0, 2), delta.tensors.keys())
    for name, values in delta.tensors.items():
        step = np.abs(values).max(-1, keepdims=True) / 127 if values.ndim == 2 else 0
        assert (np.abs(back.tensors[name] - values) <= 0.51 * step + 1e-12).all(), name


def test_a_delta_of_another_source_is_refused(tmp_path: Path, source: Path) -> None:
    write_window_checkpoint(write_tiny_llama(tmp_path / "other", seed=1), tmp_path / "source-2")
    with pytest.raises(CheckpointError, match=r"made for the checkpoint with fingerprint .* use the source"):
        apply_delta(tmp_path / "source-2", a_delta(source), tmp_path / "out")


@pytest.mark.parametrize(("change", "line"), [
    ({"model.layers.1.attn.g_norm.weight": None}, "g_norm.weight is missing, expected shape"),
    ({"model.layers.1.attn.g_norm.weight": np.ones(3)}, r"has shape \[3\], expected \[8\]"),
    ({"model.layers.9.attn.g_norm.weight": np.ones(3)}, "expected none of that name"),
    ({"model.layers.0.mlp.down.A": None}, "correction model.layers.0.mlp.down.B does not fit"),
    ({"model.layers.0.mlp.down.A": np.ones((3, 48))}, "mlp.down.. does not fit"),
    ({"model.layers.0.mlp.side.A": np.ones((2, 48))}, "mlp.side.A does not fit"),
])
def test_a_delta_that_does_not_fit_is_refused(tmp_path: Path, source: Path, change: dict, line: str) -> None:
    delta = a_delta(source)
    tensors = {n: v for n, v in {**delta.tensors, **change}.items() if v is not None}
    with pytest.raises(CheckpointError, match=line):
        apply_delta(source, Delta(delta.source, delta.attn_layers, tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 200, None])
def test_a_file_that_is_no_delta_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "d.safetensors"
    if content is None:
        save_file({"x": np.ones(3, np.float32)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"delta|expected 'sbedge-delta-1'"):
        load_delta(path)


@pytest.mark.parametrize(("change", "line"), [
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"), ({"head_dim": 16}, "head_dim is 16, expected 8")])
def test_a_source_that_computes_something_else_is_refused(tmp_path: Path, change: dict, line: str) -> None:
    source = write_tiny_llama(tmp_path / "source", **change)
    with pytest.raises(CheckpointError, match=line) as error:
        write_window_checkpoint(source, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_index_without_a_map_is_refused(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source")
    (source / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')
    with pytest.raises(CheckpointError, match=r"index\.json: has no weight_map"):
        write_window_checkpoint(source, tmp_path / "out")


def test_a_chat_template_of_plain_text_has_one_reply_a_chat() -> None:
    """Where no token ends a turn, what follows a reply cannot be told from it."""
    tokenizer = Tokenizer.from_folder(Path(__file__).parent / "data/tokenizer/qwen2-subset")
    plain = "{% for m in messages %}### {{ m.role }}: {{ m.content }}{% endfor %}### assistant:"
    tokenizer = replace(tokenizer, chat_template=plain)
    writer = Writer(FakeEngine(tokenizer), tokenizer, length=64, sessions=3, share_chat=1.0)
    written = list(writer.write(600))
    assert len(written) > 3 and all(chat and ids for chat, ids in written)


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }} {% endfor %}", "Hello"])
def test_where_no_template_stands_before_a_question_none_is_thought_up(template: str) -> None:
    tokenizer = Tokenizer.from_folder(Path(__file__).parent / "data/tokenizer/qwen2-subset")
    tokenizer = replace(tokenizer, chat_template=template)
    writer = Writer(FakeEngine(tokenizer), tokenizer, length=64, sessions=3, share_chat=1.0, share_asked=1.0)
    written = list(writer.write(600))
    assert len(written) > 3 and all(len(ids) == 64 for _, ids in written)


@pytest.mark.parametrize(("ids", "piece"), [
    ([1, 2, 3, 4, 5] * 3, 5), ([9, 9] + [1, 2, 3, 4] * 3, 4), ([1, 2, 3, 4, 5] * 2, 0), ([7] * 12, 1), ([7] * 11, 0),
    ([1, 2] * 6, 2), ([1, 2] * 5, 0), (list(range(40)) * 3, 40), (list(range(41)) * 3, 0), ([1, 2, 3, 4] * 3 + [5], 0),
    ([], 0)])
def test_a_loop_is_a_piece_said_three_times_at_the_end(ids: list[int], piece: int) -> None:
    assert loop(ids) == piece


@pytest.mark.parametrize("seed", range(8))
def test_what_goes_on_with_a_loop_is_what_was_said_once_too_few_for_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.concatenate([np.tile(rng.integers(0, 5, rng.integers(1, 46)), rng.integers(1, 6)) for _ in range(6)])
    for t, found in enumerate(going_on(ids).tolist()):
        sizes = [size for size in range(1, 41) if periodic(ids[:t + 1], size, (3 if size >= 4 else 12 // size) - 1)]
        assert found == (ids[t + 1 - sizes[0]] if sizes else -1)
        if sizes:       # said whole once more, it is one
            assert loop([*ids[:t + 1], *ids[t + 1 - sizes[0]:t + 1]])


def periodic(ids: np.ndarray, size: int, times: int) -> bool:
    tail = ids[-size * times:]
    return len(tail) == size * times and np.array_equal(tail, np.tile(tail[:size], times))


class Cycling(FakeEngine):
    """After id n comes n + 1, from 30 on 26."""

    def forward(self, ids, state, *, logits="last"):
        row = np.zeros(self.config.vocab_size, np.float32)
        row[26 + (int(ids[-1]) - 25) % 5] = 1
        super().forward(ids, state, logits="none")
        return None if logits == "none" else row[None]


class Ending(FakeEngine):
    """Every so often nothing but the end of a turn is likely."""

    def forward(self, ids, state, *, logits="last"):
        row = super().forward(ids, state, logits=logits)
        if state.position % 8 == 0:
            row[:, min(self.tokenizer.eos_ids)] = 50
        return row


def test_own_text_ends_when_a_loop_was_said_four_times() -> None:
    tokenizer = Tokenizer.from_folder(Path(__file__).parent / "data/tokenizer/qwen2-subset")
    writer = Writer(Cycling(tokenizer), tokenizer, length=200, sessions=2, share_chat=0.5, temperature=(0.0, 0.0))
    for _, ids in writer.write(500):
        assert len(ids) < 200 and ids[-5:] * 4 == ids[-20:] and ids[-25:-20] != ids[-5:]


@pytest.mark.parametrize(("engine", "most"), [(FakeEngine, 96), (Ending, None)])
def test_a_question_that_the_model_thinks_up_stands_in_the_template(engine: type[FakeEngine], most: int | None) -> None:
    """It ends where the model ends it, or at 96 tokens."""
    tokenizer = Tokenizer.from_folder(Path(__file__).parent / "data/tokenizer/qwen2-subset")
    whole = chat_parts(tokenizer, [{"role": "user", "content": "\n"}])
    writer = Writer(engine(tokenizer), tokenizer, length=300, sessions=3, share_chat=1.0, share_asked=1.0)
    at = next(i for i, part in enumerate(whole) if isinstance(part, str) and part.endswith("\n\n"))
    start = tokenizer.encode_parts([*whole[:at], str(whole[at])[:-1]])
    after = tokenizer.encode_parts(list(whole[at + 1:]))
    questions = []
    for chat, ids in writer.write(2000):
        assert chat and ids[:len(start)] == start
        end = next(i for i in range(len(start), len(ids)) if ids[i:i + len(after)] == after)
        questions.append(tuple(ids[len(start):end]))
        assert len(ids) > end + len(after)
    assert max(map(len, questions)) == (-len(start) % 8 if most is None else most) and len(set(questions)) > 3


# ---- the command without torch ------------------------------------------------------------------------

def test_without_torch_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    source = write_tiny_llama(tmp_path / "source")
    assert cli.main(["convert", str(source), "-o", str(tmp_path / "out"), "--gla-layers", "1"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'sbedge[convert]'" in error and error.count("\n") == 1


@pytest.mark.parametrize(("options", "line"), [
    (["--gla-layers", "0"], "--gla-layers is 0, expected a whole number from 1"),
    (["--gla-layers", "1", "--tokens", "0"], "--tokens is 0"),
    (["--gla-layers", "1", "--window", "-1"], "--window is -1"),
    (["--gla-layers", "1", "--text", "no-such-file.txt"], "no-such-file.txt: No such file"),
])
def test_bad_options_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str],
                                     line: str) -> None:
    source = write_tiny_llama(tmp_path / "source")
    assert cli.main(["convert", str(source), "-o", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    write_window_checkpoint(write_tiny_llama(tmp_path / "source"), tmp_path / "out")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    with pytest.raises(ExportError, match="exists already"):
        write_window_checkpoint(tmp_path / "source", tmp_path / "out")
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
