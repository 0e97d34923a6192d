"""The demo, with a tiny checkpoint in place of the fetched one."""
from __future__ import annotations

from pathlib import Path

import pytest
from golden import TINY, add_tokenizer, copy_checkpoint

from sbedge.apps import cli, demo
from sbedge.quant.ggml_library import ggml_available


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(add_tokenizer(copy_checkpoint(TINY, tmp_path_factory.mktemp("demo") / "model")))


@pytest.fixture
def tiny_demo(model: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demo on a copy of `model`; returns what it did."""
    done: list[str] = []

    def fetch(progress: object) -> Path:
        done.append("fetch")
        return Path("weights")

    def write(weights: Path, out: Path, *, progress: object = None) -> None:
        done.append("write")
        copy_checkpoint(Path(model), out)

    monkeypatch.setattr(demo, "fetch_weights", fetch)
    def write_all_window(*args: object, **options: object) -> None:
        done.append("all-window")
        write(*args, **options)

    monkeypatch.setattr(demo, "write_hybrid_checkpoint", write)
    monkeypatch.setattr(demo, "write_demo_checkpoint", write_all_window)
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
        f"{demo.NAME}-checkpoint", f"{demo.NAME}-q8_0.gguf"]


def test_the_demo_runs_on_onnx_when_ggml_is_not_there(
        tiny_demo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "ggml_available", lambda: False)
    assert cli.main(["demo", "--dir", str(tmp_path), "-p", "hello", "-n", "5"]) == 0
    assert "pip install 'sbedge[ggml]'" in capsys.readouterr().err
    assert (tmp_path / f"{demo.NAME}-onnx-int8/model.onnx").is_file()


def test_the_original_stays_available_beside_the_hybrid(tiny_demo: list[str], tmp_path: Path) -> None:
    for options in ([], ["--all-window"]):
        assert cli.main(["demo", "--dir", str(tmp_path), "--engine", "onnx", "-p", "hi", "-n", "2", *options]) == 0
    assert tiny_demo == ["fetch", "write", "fetch", "all-window", "write"]
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{name}-{what}" for name in (demo.NAME, demo.ALL_WINDOW_NAME) for what in ("checkpoint", "onnx-int8")}


def test_what_an_earlier_version_left_in_the_cache_is_removed_and_nothing_else(
        tiny_demo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBEDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "HYBRID_VERSION", 3)
    monkeypatch.setattr(demo, "NAME", "smollm2-135m-hybrid-3")
    first, later = "smollm2-135m-hybrid", "smollm2-135m-hybrid-4"
    outdated = {f"{first}-checkpoint", f"{first}-2-onnx-int8", f"{first}-q8_0.gguf", f"{first}-2-w8-spike.gguf"}
    kept = {f"{later}-checkpoint", f"{later}-q8_0.gguf", "smollm2-135m-q8_0.gguf", f"{first}-notes.txt",
            "SmolLM2-135M-Instruct.Q4_1.gguf"}
    for name in outdated | kept:
        if "." in name:
            (tmp_path / name).write_bytes(b"x")
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "model").write_bytes(b"x")
    assert cli.main(["demo", "--engine", "onnx", "-p", "hi", "-n", "2"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == kept | {f"{first}-3-checkpoint", f"{first}-3-onnx-int8"}


@pytest.mark.parametrize("where", ["fetch_weights", "write_hybrid_checkpoint", "export_model"])
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
    assert left == ([f"{demo.NAME}-checkpoint"] if where == "export_model" else [])
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
