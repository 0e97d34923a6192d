"""sbedge: SpikingBrain language models on ordinary CPUs.

    import sbedge
    sbedge.export_model("SpikingBrain-7B", "model.gguf", quant="q4_0")
    session = sbedge.load("model.gguf")
    for piece in session.generate("The capital of France is"):
        print(piece.text, end="", flush=True)
"""
from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

# Installed, export/ runtime/ quant/ apps/ lie inside this package; in a checkout they stand beside it.
if not (Path(__file__).parent / "runtime").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sbedge.checkpoint import Checkpoint
    from sbedge.config import ModelConfig
    from sbedge.errors import SbedgeError
    from sbedge.export import export_model
    from sbedge.runtime.load import load
    from sbedge.runtime.sampling import Sampling
    from sbedge.runtime.session import Session
    from sbedge.state import State

__all__ = ["Checkpoint", "ModelConfig", "Sampling", "SbedgeError", "Session", "State", "__version__",
           "export_model", "load"]

_HOME = {"load": "runtime.load", "export_model": "export", "Session": "runtime.session", "Sampling": "runtime.sampling",
         "State": "state", "ModelConfig": "config", "Checkpoint": "checkpoint", "SbedgeError": "errors"}


def __getattr__(name: str) -> object:
    """Each public name is imported when first used: `import sbedge` itself loads no library."""
    if name not in _HOME:
        raise AttributeError(f"module 'sbedge' has no attribute {name!r}")
    value = getattr(import_module(f"sbedge.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
