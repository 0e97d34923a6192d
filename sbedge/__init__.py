"""sbedge: SpikingBrain language models on ordinary CPUs."""
from __future__ import annotations

from pathlib import Path

# Installed, export/ runtime/ quant/ apps/ lie inside this package; in a checkout they stand beside it.
if not (Path(__file__).parent / "runtime").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"
