"""pytest tests/test_convert.py: a transformer becomes a hybrid whose GLA layers compute what reference.py says."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny_checkpoint
from tiny_llama import write_tiny_llama

from sbedge.apps import cli
from sbedge.apps.convert.delta import apply_delta, load_delta
from sbedge.apps.convert.source import write_window_checkpoint
from sbedge.checkpoint import SPIKES_FILE, Checkpoint
from sbedge.config import INPUT_KINDS, ModelConfig
from sbedge.export import export_model
from sbedge.quant.ggml_library import ggml_available
from sbedge.reference import Reference
from sbedge.runtime.load import load, open_engine

torch = pytest.importorskip("torch", reason="conversion trains with torch: pip install 'sbedge[convert]'")

from sbedge.apps.convert import fitting, loss, pipeline, stages  # noqa: E402
from sbedge.apps.convert.torch_model import (  # noqa: E402
    LEAST_DECAY,
    Hybrid,
    Spiking,
    StraightThrough,
    gla,
    window_attention,
)

# ---- the model in torch -------------------------------------------------------------------------------

def stepwise(q, k, v, log_decay):
    B, G, T, _, d = q.shape
    state, out = torch.zeros(B, G, d, d), []
    for t in range(T):
        state = log_decay[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append(q[:, :, t] @ state)
    return torch.stack(out, 2)


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("strongest", [0.01, 1.0, -LEAST_DECAY])
def test_chunked_gla_is_stepwise_gla(group: int, strongest: float) -> None:
    torch.manual_seed(group)
    B, G, T, d = 2, 3, 192, 8
    q, (k, v) = torch.rand(B, G, T, group, d), torch.randn(2, B, G, T, d).abs()
    log_decay = -torch.rand(B, G, T, d) * strongest
    torch.testing.assert_close(gla(q, k, v, log_decay), stepwise(q, k, v, log_decay), rtol=1e-4, atol=1e-4)


def test_gradients_of_chunked_gla_are_those_of_stepwise_gla() -> None:
    torch.manual_seed(0)
    inputs = [torch.rand(1, 2, 128, 3, 4), *torch.rand(2, 1, 2, 128, 4), -torch.rand(1, 2, 128, 4)]
    weights, gradients = torch.randn(1, 2, 128, 3, 4), []
    for form in (gla, stepwise):
        leaves = [x.clone().requires_grad_() for x in inputs]
        (form(*leaves) * weights).sum().backward()
        gradients.append([x.grad for x in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("T", "W"), [(1, 4), (130, 5), (300, 128), (257, 1000)])
def test_window_attention_sees_exactly_the_window(T: int, W: int) -> None:
    torch.manual_seed(T)
    q, k, v = torch.randn(3, 6, T, 8)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    scores = (q @ k.transpose(1, 2) / 8 ** 0.5).masked_fill((distance < 0) | (distance >= W), -torch.inf)
    torch.testing.assert_close(window_attention(q, k, v, W), scores.softmax(-1) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 2), (7, 1), (3, 3), (8, 1)])
@pytest.mark.parametrize("T", [1, 63, 65, 130])
def test_the_torch_model_is_the_reference(tmp_path: Path, heads: tuple[int, int], T: int) -> None:
    folder = write_tiny_checkpoint(tmp_path, hidden_size=8 * heads[0], num_attention_heads=heads[0],
                                   num_key_value_heads=heads[1], attn_layers=[1, 2])
    reference, model = Reference(folder), Hybrid.of(Checkpoint(folder), dtype=torch.float32)
    ids = np.random.default_rng(T).integers(0, 128, T)
    wanted = reference.forward(ids, reference.new_state(), logits="all")
    with torch.no_grad():
        found = model.logits(torch.from_numpy(ids)[None])[0].numpy()
    assert wanted is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("attn_layers", [[0, 1, 2], [1], []])
def test_the_torch_model_spikes_as_the_reference_does(tmp_path: Path, attn_layers: list[int]) -> None:
    """Counts are rounded, so the last bit of a sum can decide one: most logits must agree, and the likeliest tokens."""
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path, attn_layers=attn_layers))
    layers = checkpoint.config.num_hidden_layers
    zones = np.linspace(0, 0.8, layers * 4).round(3).tolist()
    spiking = checkpoint.config.as_trained({"spike_k": 8.0, "input_dead_zone": zones}, "test")
    reference, model = Reference(checkpoint, config=spiking), Hybrid.of(checkpoint, dtype=torch.float32)
    for i, layer in enumerate(model.layers):
        layer.spike = Spiking(8.0, dict(zip(INPUT_KINDS, zones[4 * i:4 * i + 4], strict=True)),
                              dict.fromkeys(INPUT_KINDS, torch.ones(())), rows=1)
    ids = np.random.default_rng(0).integers(0, 128, (2, 70))
    with torch.no_grad():
        found = model.logits(torch.from_numpy(ids)).numpy()
    for logits, row, config in zip(found, ids, (spiking, checkpoint.config), strict=True):
        reference.config = config       # the second row does not spike
        wanted = reference.forward(row, reference.new_state(), logits="all")
        assert wanted is not None
        assert np.quantile(np.abs(logits - wanted), 0.9) < 1e-3 * np.abs(wanted).max()
        assert (logits.argmax(1) == wanted.argmax(1)).mean() > 0.95


def test_gradients_pass_spikes_as_if_there_were_none() -> None:
    torch.manual_seed(0)
    x, upstream = torch.randn(3, 5, 16, requires_grad=True), torch.randn(3, 5, 16)
    (StraightThrough.apply(x, 2, 8.0, 0.5, torch.rand(16) + 0.5) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, upstream)


# ---- the loss -----------------------------------------------------------------------------------------

def test_distance_and_its_gradient_are_those_of_kl_over_known_tokens_and_the_rest() -> None:
    torch.manual_seed(0)
    x, head, teacher = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8), torch.randn(5, 8)
    ids, logprobs = loss.likeliest(teacher, head, 4)

    def plain(x):
        own, known = (x @ head.T).log_softmax(-1), logprobs.exp()
        chosen = own.gather(1, ids)
        rest, own_rest = 1 - known.sum(-1), 1 - chosen.exp().sum(-1)
        return ((known * (logprobs - chosen)).sum(-1) + rest * (rest / own_rest).log()).mean()

    wanted, found = plain(x), loss.distance(x, head, ids, logprobs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(value, x)[0] for value in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert float(loss.distance(teacher, head, ids, logprobs)) == pytest.approx(0, abs=1e-5)


def test_what_goes_on_with_a_loop_is_a_twentieth_as_likely_and_the_rest_makes_up_for_it() -> None:
    p = torch.tensor([[0.5, 0.2, 0.1], [0.5, 0.2, 0.1], [0.9, 0.05, 0.05]])        # and a rest of 0.2, 0.2 and 0
    chosen = torch.tensor([[True, False, False], [False, False, False], [True, False, False]])
    out = stages.less_likely(p.log(), chosen).exp()
    torch.testing.assert_close(out[0], torch.tensor([0.025, 0.2, 0.1]) / 0.525)
    torch.testing.assert_close(out[1:], torch.tensor([[0.5, 0.2, 0.1], [0.045 / 0.145, 0.05 / 0.145, 0.05 / 0.145]]))


@pytest.mark.parametrize("shape", [(3, 640, 7), (2, 64 * 64, 64), (4, 100, 10), (1, 128, 3)])
def test_the_likeliest_tokens_are_found_in_order(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    rows, vocabulary, count = shape
    z = torch.randn(rows, vocabulary)
    torch.testing.assert_close(loss.top_ids(z, count), z.topk(count).indices)


# ---- the whole conversion -----------------------------------------------------------------------------

OPTIONS = ["--gla-layers", "2", "--tokens", "4096", "--own-tokens", "600", "--length", "64", "--rank", "2",
           "--threads", "1"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    assert cli.main(["convert", str(source), "-o", str(folder / "out"), *OPTIONS,
                     "--delta", str(folder / "delta.safetensors")]) == 0
    return folder


def test_conversion_ends_in_a_checkpoint_with_as_many_gla_layers_as_asked(converted: Path) -> None:
    config = Checkpoint(converted / "out").config
    assert len(config.attn_layers) == 1 and config.sliding_window == 2048
    assert sorted(p.name for p in converted.iterdir()) == ["delta.safetensors", "out"]
    log = (converted / "out/conversion.csv").read_text().splitlines()
    assert log[0] == "stage,step,tokens,rate,loss,seconds" and log[-1].startswith("tune,")


def test_conversion_learns(converted: Path) -> None:
    rows = [line.split(",") for line in (converted / "out/conversion.csv").read_text().splitlines()]
    losses = [float(row[4]) for row in rows if row[0] == "tune"]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_engines_run_what_conversion_made(converted: Path) -> None:
    reference = Reference(converted / "out")
    ids = list(range(3, 80))
    wanted = reference.forward(ids, reference.new_state(), logits="all")
    kinds = [("onnx", "m-onnx")] + ([("gguf", "m.gguf")] if ggml_available() else [])
    for format, name in kinds:
        export_model(converted / "out", converted.parent / f"{converted.name}-{name}", format=format, quant="f32")
        engine = open_engine(converted.parent / f"{converted.name}-{name}")
        found = engine.forward(ids, engine.new_state(), logits="all")
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_converted_model_chats(converted: Path) -> None:
    pieces = list(load(converted / "out").chat("hello", max_tokens=4))
    assert 1 <= sum(len(piece.ids) for piece in pieces) <= 4 and pieces[-1].finish in ("eos", "length")


def test_the_same_seed_gives_the_same_checkpoint(source: Path, converted: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(source), "-o", str(tmp_path / "out"), *OPTIONS]) == 0
    assert ((tmp_path / "out/model.safetensors").read_bytes() == (converted / "out/model.safetensors").read_bytes())


def interrupt_and_resume(command: list[str], stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `command`, break it off in the middle of `stage`, and go on."""
    monkeypatch.setattr(fitting, "SAVE_SECONDS", 0.0)
    real = pipeline.convert

    def interrupted(*args, report=None, **options):
        def report(what: str, done: int, total: int) -> None:
            if what == stage and 2 * done >= total:
                raise KeyboardInterrupt
        return real(*args, report=report, **options)

    monkeypatch.setattr(pipeline, "convert", interrupted)
    assert cli.main(command) == 130 and not Path(command[command.index("-o") + 1]).exists()
    assert cli.main(command) == 2       # it is there, and was not asked to go on
    monkeypatch.setattr(pipeline, "convert", real)
    assert cli.main([*command, "--resume"]) == 0


@pytest.mark.parametrize("stage", ["write text", "trial", "transfer", "ask the source", "tune"])
def test_a_resumed_conversion_gives_what_an_uninterrupted_one_gives(
        source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    interrupt_and_resume(["convert", str(source), "-o", str(tmp_path / "out"), *OPTIONS], stage, monkeypatch)
    assert ((tmp_path / "out/model.safetensors").read_bytes() == (converted / "out/model.safetensors").read_bytes())


def test_the_delta_is_the_checkpoint_within_8_bit(source: Path, converted: Path) -> None:
    delta, whole = load_delta(converted / "delta.safetensors"), Checkpoint(converted / "out")
    assert delta.attn_layers == whole.config.attn_layers
    for name, values in delta.tensors.items():
        if name in whole.shapes:
            np.testing.assert_allclose(values, whole.tensor(name), atol=np.abs(whole.tensor(name)).max() / 127)


# ---- going on, and spiking ----------------------------------------------------------------------------

SPIKE = ["--tokens", "0", "--own-tokens", "600", "--length", "64", "--rank", "4", "--spike", "0.4",
         "--spike-tokens", "2048", "--threads", "1"]


@pytest.fixture(scope="module")
def spiking(source: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained to spike from the delta of `converted` on."""
    folder = tmp_path_factory.mktemp("spiking")
    assert cli.main(["convert", str(source), "-o", str(folder / "out"), "--start", str(converted / "delta.safetensors"),
                     *SPIKE, "--delta", str(folder / "delta.safetensors")]) == 0
    return folder


@pytest.mark.parametrize("stage", ["ask the source", "try silence", "spike"])
def test_training_to_spike_is_resumed_where_it_was(source: Path, converted: Path, spiking: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    interrupt_and_resume(["convert", str(source), "-o", str(tmp_path / "out"), "--start",
                          str(converted / "delta.safetensors"), *SPIKE], stage, monkeypatch)
    assert ((tmp_path / "out/model.safetensors").read_bytes() == (spiking / "out/model.safetensors").read_bytes())


def test_a_model_trained_to_spike_says_how_and_its_exports_do_so(spiking: Path, converted: Path) -> None:
    checkpoint = Checkpoint(spiking / "out")
    assert checkpoint.config.attn_layers == Checkpoint(converted / "out").config.attn_layers
    trained = json.loads((spiking / "out" / SPIKES_FILE).read_text())
    assert trained["spike_k"] == 8 and len(trained["input_dead_zone"]) == 4 * checkpoint.config.num_hidden_layers
    assert max(trained["input_dead_zone"]) > 0.1
    export_model(spiking / "out", spiking / "onnx", quant="w8-spike")
    config = open_engine(spiking / "onnx").config
    assert config.spike_k == 8 and config.input_dead_zone == tuple(trained["input_dead_zone"])
    assert config.trained_to_spike


def test_a_model_trained_to_spike_is_folded_and_computes_the_same(spiking: Path, source: Path, tmp_path: Path) -> None:
    delta = load_delta(spiking / "delta.safetensors")
    write_window_checkpoint(source, tmp_path / "source")
    for name, one in (("folded", delta), ("plain", dataclasses.replace(delta, spikes=None))):
        apply_delta(tmp_path / "source", one, tmp_path / name)
    assert not (tmp_path / "plain" / SPIKES_FILE).exists()
    norm = "model.layers.0.mlp_norm.weight"
    assert not np.allclose(Checkpoint(tmp_path / "folded").tensor(norm), Checkpoint(tmp_path / "plain").tensor(norm))
    logits = []
    for name in ("folded", "plain"):
        reference = Reference(tmp_path / name)
        logits.append(reference.forward(range(40), reference.new_state(), logits="all"))
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


def test_half_of_the_own_text_is_by_the_hybrid_that_training_starts_from(
        source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, int]] = []     # (GLA layers of the writer, tokens)

    class Recorded(pipeline.Writer):
        def write(self, tokens, progress=None):
            config = self.engine.config
            for chat, ids in super().write(tokens, progress):
                written.append((config.num_hidden_layers - len(config.attn_layers), len(ids)))
                yield chat, ids

    monkeypatch.setattr(pipeline, "Writer", Recorded)
    write_window_checkpoint(source, tmp_path / "source")
    settings = pipeline.Settings(None, own=2000, length=64)
    rows = pipeline._text(tmp_path, load_delta(converted / "delta.safetensors"), settings, [], None)
    tokens = {layers: sum(n for by, n in written if by == layers) for layers in (0, 2)}
    assert sum(tokens.values()) == sum(n for _, n in written)
    assert min(tokens.values()) >= 1000 and max(tokens.values()) < 2 * min(tokens.values())
    assert rows.shape[1] == 64 and 64 * len(rows) <= sum(tokens.values())


def test_training_goes_on_from_a_delta(source: Path, converted: Path, tmp_path: Path) -> None:
    """With hardly any steps it is still what it was."""
    delta = converted / "delta.safetensors"
    assert cli.main(["convert", str(source), "-o", str(tmp_path / "out"), "--start", str(delta), "--tokens", "256",
                     "--own-tokens", "600", "--length", "64", "--rank", "4", "--threads", "1"]) == 0
    references = [Reference(tmp_path / "out"), Reference(converted / "out")]
    found, wanted = (r.forward(range(40), r.new_state(), logits="all") for r in references)
    assert found is not None and wanted is not None
    assert np.abs(found - wanted).max() < 0.2 * np.abs(wanted).max()


def test_training_to_spike_alone_has_text_and_steps_unless_told_otherwise(
        source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the example in --help: shares of --tokens would be nothing."""
    asked: list[pipeline.Settings] = []
    monkeypatch.setattr(pipeline, "convert", lambda source, out, settings, *_, **__: asked.append(settings))
    start = ["--start", str(converted / "delta.safetensors"), "--tokens", "0", "--spike", "0.3"]
    assert cli.main(["convert", str(source), "-o", str(tmp_path / "out"), *start]) == 0
    assert cli.main(["convert", str(source), "-o", str(tmp_path / "out"), *start, "--spike-tokens", "9000"]) == 0
    assert [(s.own, s.spike_tokens) for s in asked] == [(166_666, 500_000), (3000, 9000)]


@pytest.mark.parametrize(("options", "line"), [
    (["--rank", "1"], "--rank is 1, but the corrections to go on from have 2"),
    (["--gla-layers", "1"], "--gla-layers is 1, but"),
    (["--spike", "2"], "--spike is 2, expected a share from 0 to 0.9"),
    (["--tokens", "0"], "--tokens 0 trains nothing; give --spike"),
])
def test_a_start_that_does_not_fit_ends_in_one_line(source: Path, converted: Path, tmp_path: Path, options: list[str],
                                                    capsys: pytest.CaptureFixture[str], line: str) -> None:
    command = ["convert", str(source), "-o", str(tmp_path / "out"), "--start", str(converted / "delta.safetensors"),
               "--tokens", "256", "--own-tokens", "300", "--length", "64"]
    assert cli.main([*command, *options]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- what cannot be done ------------------------------------------------------------------------------

@pytest.mark.parametrize(("options", "line"), [
    (["--gla-layers", "4"], "--gla-layers is 4, but"),
    (["--gla-layers", "1", "--length", "100"], "--length is 100, expected a multiple of 64"),
    (["--gla-layers", "1", "--own-tokens", "0", "--length", "64"], "give more --text or --own-tokens"),
])
def test_settings_that_do_not_fit_end_in_one_line_and_leave_nothing(
        source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str) -> None:
    assert cli.main(["convert", str(source), "-o", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_delta_that_is_there_is_not_overwritten(source: Path, converted: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    delta = tmp_path / "my.delta"
    delta.write_bytes((converted / "delta.safetensors").read_bytes())
    before = delta.stat().st_mtime_ns
    command = ["convert", str(source), "-o", str(tmp_path / "out"), *OPTIONS, "--delta"]
    assert cli.main([*command, str(delta)]) == 2
    assert "my.delta: exists already" in capsys.readouterr().err and delta.stat().st_mtime_ns == before
    assert cli.main([*command, str(tmp_path / "none" / "my.delta")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [delta]


def test_a_source_that_cannot_be_read_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert cli.main(["convert", str(tmp_path / "none"), "-o", str(tmp_path / "out"), *OPTIONS]) == 2
        assert "no such file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_resuming_with_other_options_or_nothing_is_refused(
        source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(source), "-o", str(tmp_path / "out"), *OPTIONS]
    assert cli.main([*command, "--resume"]) == 2
    assert "no conversion to resume" in capsys.readouterr().err
    monkeypatch.setattr(pipeline, "_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(command) == 130
    assert cli.main([*command, "--resume", "--seed", "5"]) == 2
    assert "was begun with seed 0, found 5" in capsys.readouterr().err
    (tmp_path / "other.delta").touch()
    assert cli.main([*command, "--resume", "--delta", str(tmp_path / "other.delta")]) == 2
    assert "was begun with delta None" in capsys.readouterr().err


def test_window_and_seed_reach_the_checkpoint(source: Path, tmp_path: Path) -> None:
    command = ["convert", str(source), "-o", str(tmp_path / "out"), "--gla-layers", "1", "--tokens", "512",
               "--own-tokens", "200", "--length", "64", "--window", "48", "--rank", "0"]
    assert cli.main(command) == 0
    config = Checkpoint(tmp_path / "out").config
    assert isinstance(config, ModelConfig) and config.sliding_window == 48
