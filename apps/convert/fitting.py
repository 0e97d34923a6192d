"""The training loop: Adam with warm-up and a cosine, a line of CSV a step, and a state that training resumes from."""
from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

Report = Callable[[str, int, int], None]    # (stage, tokens done, tokens in total)
COLUMNS = ("stage", "step", "tokens", "rate", "loss", "seconds")
WARM_UP = 0.05          # share of the steps
LAST_RATE = 0.05        # of the peak, at the end
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """rate: the peak; batch: rows a step; steps in all."""

    stage: str
    steps: int
    batch: int
    rate: float
    seed: int = 0


def learning_rate(step: int, plan: Plan) -> float:
    warm = max(1, round(WARM_UP * plan.steps))
    if step < warm:
        return plan.rate * (step + 1) / warm
    done = (step - warm) / max(1, plan.steps - warm)
    return plan.rate * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


def batch_rows(step: int, plan: Plan, count: int) -> np.ndarray:
    """Which of `count` rows step `step` takes: a new order every epoch, a function of seed and step alone."""
    places = np.arange(step * plan.batch, (step + 1) * plan.batch)
    orders = {epoch: np.random.default_rng((plan.seed, int(epoch))).permutation(count)
              for epoch in np.unique(places // count)}
    return np.array([orders[place // count][place % count] for place in places])


class Log:
    """A CSV file that grows by a line a step; resuming at a step drops the lines after it."""

    def __init__(self, path: Path, stage: str, start: int):
        rows = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [r for r in csv.DictReader(file) if r["stage"] != stage or int(r["step"]) < start]
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(rows)

    def add(self, *values: object) -> None:
        self.writer.writerow(dict(zip(COLUMNS, values, strict=True)))
        self.file.flush()


def fit(parameters: Mapping[str, nn.Parameter], loss_of: Callable[[np.ndarray], tuple[float, int]], count: int,
        plan: Plan, folder: Path, report: Report | None = None) -> None:
    """Train `parameters` in place for `plan.steps` steps over `count` rows.

    loss_of  given the numbers of a step's rows, leaves gradients and returns (loss, tokens)
    folder   keeps `<stage>.pt`, from which a later call with the same arguments goes on, and log.csv
    """
    optimizer = torch.optim.Adam(list(parameters.values()), lr=plan.rate, betas=(0.9, 0.95))
    kept = folder / f"{plan.stage}.pt"
    step = tokens = 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        step, tokens = state["step"], state["tokens"]
        restore(parameters, state["parameters"])
        optimizer.load_state_dict(state["optimizer"])
    log, saved, began = Log(folder / "log.csv", plan.stage, step), time.monotonic(), time.monotonic()

    def save() -> None:
        write(kept, {"step": step, "tokens": tokens, "parameters": {n: p.data for n, p in parameters.items()},
                     "optimizer": optimizer.state_dict()})

    while step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan)
        optimizer.zero_grad(set_to_none=True)
        loss, seen = loss_of(batch_rows(step, plan, count))
        clip(list(parameters.values()))
        optimizer.step()
        step, tokens = step + 1, tokens + seen
        log.add(plan.stage, step - 1, tokens, f"{learning_rate(step - 1, plan):.3g}", f"{loss:.5f}",
                f"{time.monotonic() - began:.1f}")
        if report:
            report(plan.stage, step, plan.steps)
        if step == plan.steps or time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()
    log.file.close()


def clip(parameters: Sequence[nn.Parameter], largest: float = 1.0) -> None:
    nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], largest)


def restore(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def write(path: Path, value: object) -> None:
    """torch.save under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:      # by its name torch would make a full disk a RuntimeError
            torch.save(value, file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
