"""pytest tests/test_readme.py: the README's program runs as it stands there."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
from golden import add_tokenizer
from tiny import write_tiny_checkpoint

from sbedge.export import export_model
from sbedge.quant.ggml_library import ggml_available

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not ggml_available(), reason="neither llama-cpp-python nor libggml-python is installed")
def test_the_program_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    checkpoint = add_tokenizer(write_tiny_checkpoint(tmp_path / "checkpoint", vocab_size=260))
    export_model(checkpoint, tmp_path / "model.gguf", quant="f32")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(program, names)
    assert names["branch"].state.position > names["session"].state.position > 20
    assert (tmp_path / "france.state").is_file()
    assert capsys.readouterr().out.endswith(f"tokens remembered in {names['branch'].state.nbytes} bytes\n")


def test_every_command_in_the_readme_exists():
    from sbedge.apps.cli import COMMANDS
    mentioned = set(re.findall(r"^ {4}sbedge (\w+)", README, re.MULTILINE))
    assert len(mentioned) >= 6
    assert mentioned <= set(COMMANDS)
