"""pytest tests/test_perplexity.py: perplexity is what its definition says, however long the text and however cut."""
from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from golden import TINY, add_tokenizer, copy_checkpoint, edit_tensors
from tiny import write_tiny_checkpoint

from sbedge.apps import cli
from sbedge.export import export_model
from sbedge.export import perplexity as module
from sbedge.export.perplexity import Comparison, Predictions, RunningMean, chunk_tokens, read_all
from sbedge.export.report import compare, log_softmax
from sbedge.quant.ggml_library import ggml_available
from sbedge.reference import Reference
from sbedge.runtime.token_stream import in_chunks
from sbedge.runtime.tokenizer import Tokenizer

TEXT = ("The spike is the alphabet of the brain.\nA neuron adds up what arrives until a threshold is passed, fires "
        "once, and forgets. 大脑用脉冲传递信息。\n\n") * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(add_tokenizer(copy_checkpoint(TINY, tmp_path_factory.mktemp("perplexity") / "model")))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


@pytest.fixture(scope="module")
def by_hand(model: str) -> np.ndarray:
    """-log p of every token but the first."""
    ids = Tokenizer.from_folder(model).encode(TEXT)
    logits = Reference(model).forward(ids, Reference(model).new_state(), logits="all")
    assert logits is not None
    return -log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]


def perplexity_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert cli.main(["perplexity", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


class Uniform:
    """An engine that knows nothing of what comes, and notes how much it is asked for."""

    def __init__(self, vocab_size: int = 50):
        self.config, self.asked = SimpleNamespace(vocab_size=vocab_size), 0

    def new_state(self) -> Any:
        return SimpleNamespace(position=0)

    def forward(self, ids: np.ndarray, state: Any, *, logits: str) -> np.ndarray:
        self.asked = max(self.asked, len(ids))
        state.position += len(ids)
        return np.zeros((len(ids), self.config.vocab_size), np.float32)


# --- what is measured --------------------------------------------------------------------------------
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    reader = Predictions(Uniform(50), "uniform")        # type: ignore[arg-type]
    read_all(reader, in_chunks([list(range(50))] * 3, 7))
    assert reader.perplexity == pytest.approx(50) and reader.nll.stderr == pytest.approx(0, abs=1e-7)
    assert reader.nll.count == 149 and reader.state.position == 150


@pytest.mark.parametrize("chunk", [1, 2, 37, 512])
def test_perplexity_is_the_exponential_of_the_mean_however_the_text_is_cut(
        chunk: int, model: str, text: str, by_hand: np.ndarray, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    summary = perplexity_json(capsys, model, "--text", text)
    assert summary["scored"] == len(by_hand) == summary["tokens"] - 1
    assert summary["nll"] == pytest.approx(by_hand.mean(), abs=1e-5)
    assert summary["nll_stderr"] == pytest.approx(by_hand.std(ddof=1) / math.sqrt(len(by_hand)), rel=1e-4)
    assert summary["perplexity"] == pytest.approx(np.exp(by_hand.mean()), rel=1e-5)
    assert summary["perplexity_stderr"] == pytest.approx(summary["perplexity"] * summary["nll_stderr"])
    assert summary["tok_s"] > 0 and summary["against"] is None and summary["engine"] == "reference"


def test_a_part_of_the_text_is_the_beginning(model: str, text: str, by_hand: np.ndarray,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    summary = perplexity_json(capsys, model, "--text", text, "--tokens", "50")
    assert summary["tokens"] == 50 and summary["nll"] == pytest.approx(by_hand[:49].mean(), abs=1e-5)


@pytest.mark.skipif(not ggml_available(), reason="the ggml libraries are not installed")
def test_an_export_is_compared_with_its_checkpoint_at_every_token(
        model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 19)
    export_model(model, tmp_path / "m.gguf", quant="q4_0")
    summary = perplexity_json(capsys, str(tmp_path / "m.gguf"), "--text", text, "--against", model)
    ids = Tokenizer.from_folder(model).encode(TEXT)
    from sbedge.runtime.ggml_engine import GgmlEngine
    engines = (Reference(model), GgmlEngine(tmp_path / "m.gguf"))
    exact, found = (engine.forward(ids, engine.new_state(), logits="all") for engine in engines)
    assert exact is not None and found is not None
    report, against = compare(exact, found), summary["against"]
    assert against["kl_mean"] == pytest.approx(report.kl_mean, rel=0.05) and report.kl_mean > 1e-4
    assert against["kl_max"] == pytest.approx(report.kl_max, rel=0.2)
    assert against["top1_agreement"] == pytest.approx(report.top1_agreement, abs=0.02)
    assert against["tokens"] == summary["tokens"] == len(ids)
    assert against["nll_difference"] == pytest.approx(summary["nll"] - against["nll"], abs=1e-9)
    assert 0 < against["nll_difference_stderr"] < summary["nll_stderr"]
    assert against["model"] == model and against["engine"] == "reference" and against["tok_s"] > 0


def test_a_model_against_itself_has_no_distance(model: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    against = perplexity_json(capsys, model, "--text", text, "--against", model)["against"]
    assert (against["kl_mean"], against["kl_max"], against["top1_agreement"]) == (0, 0, 1)
    assert against["nll_difference"] == against["nll_difference_stderr"] == 0


def test_a_running_mean_is_that_of_all_values_at_once() -> None:
    values, mean = np.random.default_rng(0).normal(3, 2, 1000), RunningMean()
    for part in np.split(values, [1, 2, 500]):
        mean.add(part)
    assert mean.value == pytest.approx(values.mean())
    assert mean.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(1000))


# --- memory ------------------------------------------------------------------------------------------
def test_logits_of_a_chunk_take_bounded_memory_at_any_vocabulary() -> None:
    for vocab_size in (1, 300, 49_152, 152_064, 1 << 24):
        assert chunk_tokens(vocab_size) * vocab_size * 4 <= max(module.LOGITS_BYTES, 4 * vocab_size)
    assert chunk_tokens(300) == module.CHUNK and chunk_tokens(1 << 24) == 1


def test_a_longer_text_takes_no_more_memory() -> None:
    def peak(blocks: int) -> int:
        engines = Uniform(300), Uniform(300)
        reader = Comparison(*(Predictions(engine, "uniform") for engine in engines))       # type: ignore[arg-type]
        tracemalloc.start()
        read_all(reader, in_chunks((list(range(300)) for _ in range(blocks)), 100))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert engines[0].asked == 100 and reader.model.nll.count == 300 * blocks - 1
        return top

    peak(2)
    assert peak(60) < 1.2 * peak(6)


# --- printing and refusals ---------------------------------------------------------------------------
def test_the_table_names_both_models_and_fits_80_columns(
        model: str, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(Path(text).parent)
    assert cli.main(["perplexity", model, "--text", "text.txt", "--against", model, "--tokens", "40"]) == 0
    out = capsys.readouterr().out
    assert "text.txt: 40 tokens, 39 of them predicted" in out and out.count("(reference)") == 2
    assert "perplexity +0.00 ± 0.00 %" in out and "the same likeliest token at 100.0%" in out
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize(("content", "options", "message"), [
    (b"", [], "0 tokens, expected at least 2"),
    (b"a", [], "1 tokens, expected at least 2"),
    (b"spike \xff train", [], "not UTF-8 text (byte 6); convert it first"),
    (b"spike " * 20_000 + b"\xe5\xa4", [], "not UTF-8 text (byte 120000)"),
    (b"spike", ["--tokens", "1"], "--tokens is 1, expected at least 2"),
    (None, [], "text.txt: No such file"),
    (b"spike", ["--against", "nowhere.gguf"], "nowhere.gguf: no such file"),
    (b"spike", ["--threads", "0"], "threads is 0"),
])
def test_a_refusal_is_one_line_and_code_2(content: bytes | None, options: list[str], message: str, model: str,
                                          tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    refused(capsys, message, model, "--text", str(tmp_path / "text.txt"), *options)


def test_models_that_cannot_read_the_text_together_are_refused(model: str, text: str, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    other = str(write_tiny_checkpoint(tmp_path / "other", vocab_size=300))
    refused(capsys, "its vocabulary has 300 tokens", model, "--text", text, "--against", other)
    refused(capsys, "carries no tokenizer", other, "--text", text)


def test_predictions_that_are_no_numbers_are_refused(model: str, text: str, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    damaged = copy_checkpoint(Path(model), tmp_path / "damaged")
    edit_tensors(damaged, add={"model.norm.weight": np.full(Reference(model).config.hidden_size, np.nan, np.float32)})
    refused(capsys, "no finite numbers", str(damaged), "--text", text)


def refused(capsys: pytest.CaptureFixture[str], message: str, *argv: str) -> None:
    assert cli.main(["perplexity", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1
