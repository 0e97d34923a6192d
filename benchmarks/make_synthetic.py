"""Write a random SpikingBrain checkpoint of a given shape: the input of size, speed and memory measurements.

    python benchmarks/make_synthetic.py OUT --shape 7b

7b is the published SpikingBrain-7B (15 GB in bfloat16), 1b the size of a Llama-3.2-1B, 135m that of a SmolLM2.
How the values are made: sbedge.apps.synthetic.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no installation

from sbedge.apps.synthetic import SHAPES, config_json, write_checkpoint
from sbedge.errors import SbedgeError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the checkpoint folder to write; must not exist")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--dtype", choices=("bf16", "f32"), help="default: bf16, with --spiking f32 as published")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spiking", action="store_true", help="the W8ASpike form")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are copied")
    options = parser.parse_args(arguments)
    if options.layers is not None and options.layers < 1:
        parser.error("--layers must be at least 1")
    dtype = options.dtype or ("f32" if options.spiking else "bf16")

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    try:
        with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
                      console=Console(stderr=True)) as bar:
            task = bar.add_task("writing", total=None)
            write_checkpoint(options.out, config_json(SHAPES[options.shape], layers=options.layers, dtype=dtype),
                             dtype=dtype, seed=options.seed, spiking=options.spiking, tokenizer=options.tokenizer,
                             progress=lambda done, total: bar.update(task, completed=done, total=total))
    except SbedgeError as error:
        print(f"make_synthetic: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
