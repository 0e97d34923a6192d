"""A checkpoint as calibration leaves it: what the writers of both formats read instead of the checkpoint itself."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from sbedge.checkpoint import Checkpoint
from sbedge.config import ModelConfig
from sbedge.quant.gptq import Levels


class Calibrated(Checkpoint):
    """`source` with linears on a grid, kept in files of `work`, and with other small tensors (`replaced`, float32).

    exported   the config of the model that is written: how each input spikes
    quants     of linears that are stored otherwise than the export at large: the quant of each
    """

    def __init__(self, source: Checkpoint, exported: ModelConfig, work: Path):
        super().__init__(source.folder)
        self.exported, self.work = exported, work
        self.replaced: Mapping[str, np.ndarray] = {}
        self.quants: Mapping[str, str] = {}
        self.groups: dict[str, int] = {}
        assert self.fingerprint == source.fingerprint       # taken now, from the tensors as they were

    def keep(self, name: str, levels: Levels) -> None:
        """Put a linear's levels away."""
        for part in ("levels", "scales", "zeros"):
            write_npy(self._file(name, part), getattr(levels, part))
        self.groups[name] = levels.group

    def finer(self) -> str:
        """How many linears are stored otherwise than the export at large, in words; nothing if none is."""
        return ", ".join(f"{count} linears {quant}" for quant, count in Counter(self.quants.values()).items())

    def levels(self, name: str, start: int = 0, stop: int | None = None) -> Levels | None:
        """Outputs [start, stop) of a calibrated linear; None for any other tensor."""
        if name not in self.groups:
            return None
        levels, scales, zeros = (np.load(self._file(name, part), mmap_mode="r")[:, start:stop]
                                 for part in ("levels", "scales", "zeros"))
        return Levels(levels, scales, zeros, self.groups[name])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if name in self.replaced:
            return self.replaced[name][start:stop]
        return super().rows(name, start, stop)

    def _file(self, name: str, part: str) -> Path:
        return self.work / f"{name}.{part}.npy"


def write_npy(path: Path, array: np.ndarray) -> None:
    """np.save, but a signal that comes meanwhile raises what its handler does [in tofile() it becomes a TypeError]."""
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array))
        file.write(array.data)


def quant_of(checkpoint: Checkpoint, name: str, quant: str) -> str:
    """What an export in `quant` stores this tensor in."""
    return checkpoint.quants.get(name, quant) if isinstance(checkpoint, Calibrated) else quant
