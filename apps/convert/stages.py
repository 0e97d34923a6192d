"""What conversion does, stage by stage: initialise, transfer, rank, ask the source, tune.

`rows` are token ids [N, T] int64. Every stage takes a `Hybrid` and changes its layers' `gla` in place.
"""
from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from sbedge.apps.files import new_file
from sbedge.checkpoint import Checkpoint
from sbedge.config import INPUT_KINDS
from sbedge.quant.folding import READERS, loudness

from .fitting import Plan, Report, fit
from .loops import going_on
from .loss import distance, likeliest
from .torch_model import GlaMixer, Hybrid, Spiking, Weight

GATE_BIAS = (-6.0, 4.0)     # from channels that forget in 3 tokens to such that remember 900
RIDGE = 1e-3                # of the mean feature energy
SPIKING = 0.25              # of a batch's rows spike
KNOWN = 64                  # likeliest tokens kept of the source's prediction
ONCE_MORE = 0.05            # of the source's probability is left to a token that goes on with a loop

# ---- initialise -----------------------------------------------------------------------------------------

def new_gla(model: Hybrid, i: int, weight: Weight, seed: int) -> GlaMixer:
    """A GLA layer with the source's q, k, v and o; fast rotary channels become fast forgetting ones."""
    c, attn = model.config, f"model.layers.{i}.attn."
    mixer, random = GlaMixer(c), torch.Generator().manual_seed(seed * 1000 + i)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(mixer, name)
            linear.weight.copy_(torch.from_numpy(weight(f"{attn}{name}.weight")))
            if linear.bias is not None:
                linear.bias.copy_(torch.from_numpy(weight(f"{attn}{name}.bias")))
        spread = torch.linspace(*GATE_BIAS, c.head_dim // 2).repeat(2 * c.num_key_value_heads)
        mixer.gk_proj[1].bias.copy_(spread)
        mixer.gk_proj[0].weight.normal_(0, c.hidden_size ** -0.5, generator=random)
        mixer.gk_proj[1].weight.normal_(0, 0.1, generator=random)
    return mixer

@torch.no_grad()
def source_layers(model: Hybrid, ids: Tensor, last: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(layer, the mixer's input, the source's mixer output) of layers up to `last`, as the source computes them."""
    turn, h = model.turn(ids.shape[1]), model.embed(ids)
    for i, layer in enumerate(model.layers[:last + 1]):
        x = layer.mixer_input(h)
        out = layer.source_mixer(x, turn)
        yield i, x, out
        h = layer.ffn(h + out)

@torch.no_grad()
def solve_outputs(model: Hybrid, mixers: dict[int, GlaMixer], rows: np.ndarray, batch: int) -> None:
    """Set every mixer's o_proj to the ridge solution for the source's mixer output."""
    D = model.config.hidden_size
    normal = {i: (torch.zeros(D, D), torch.zeros(D, D)) for i in mixers}
    for start in range(0, len(rows), batch):
        for i, x, target in source_layers(model, torch.from_numpy(rows[start:start + batch]), max(mixers)):
            if i in mixers:
                features, wanted = mixers[i].features(x).flatten(0, 1), target.float().flatten(0, 1)
                normal[i][0].addmm_(features.T, features)
                normal[i][1].addmm_(features.T, wanted)
    for i, (gram, cross) in normal.items():
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(D)
        mixers[i].o_proj.weight.copy_(torch.linalg.solve(gram + ridge, cross).T)

# ---- transfer -------------------------------------------------------------------------------------------

def transfer(model: Hybrid, mixers: dict[int, GlaMixer], rows: np.ndarray, plan: Plan, folder: Path,
             report: Report | None = None) -> None:
    """Train each mixer alone to give the source's mixer output for the source's input."""

    def loss_of(chosen: np.ndarray) -> tuple[float, int]:
        ids, total = torch.from_numpy(rows[chosen]), 0.0
        for i, x, target in source_layers(model, ids, max(mixers)):
            if i in mixers:
                with torch.enable_grad():
                    wanted = target.float()
                    error = (mixers[i](x).float() - wanted).square().mean() / wanted.square().mean()
                    error.backward()
                total += error.item()
        return total / len(mixers), ids.numel()

    fit(named(mixers), loss_of, len(rows), plan, folder, report)

def named(mixers: dict[int, GlaMixer]) -> dict[str, nn.Parameter]:
    return {f"{i}.{name}": p for i, mixer in sorted(mixers.items()) for name, p in mixer.named_parameters()}

# ---- rank -----------------------------------------------------------------------------------------------

@torch.no_grad()
def rank(model: Hybrid, mixers: dict[int, GlaMixer], rows: np.ndarray, count: int, width: int = 2,
         report: Report | None = None) -> list[int]:
    """The `count` layers that cost least when replaced by their mixers, chosen one by one.

    A layer's cost depends on which others are replaced: each round tries the `width * count` layers that looked best
    alone. Cost: KL from the source's predictions over `rows`.
    """
    ids = torch.from_numpy(rows)
    inputs = [model.embed(ids)]
    for i in range(len(model.layers)):
        inputs.append(model.hidden(inputs[-1], i, i + 1))
    known = likeliest(model.final(inputs[-1]).flatten(0, 1), model.head, KNOWN)

    def cost(layers: Sequence[int]) -> float:
        for i in layers:
            model.layers[i].gla = mixers[i]
        out = model.hidden(inputs[min(layers)], min(layers))
        for i in layers:
            model.layers[i].gla = None
        return float(distance(model.final(out).flatten(0, 1), model.head, *known))

    alone = sorted(mixers, key=lambda i: cost([i]))
    candidates, chosen = alone[:width * count], list[int]()
    while len(chosen) < count:
        best = min((i for i in candidates if i not in chosen), key=lambda i: cost([*chosen, i]))
        chosen.append(best)
        if report:
            report("rank", len(chosen), count)
    return chosen

# ---- ask the source -------------------------------------------------------------------------------------

@dataclass
class Answers:
    """What the source says of every row, on disk: its likeliest tokens, and its hidden state below layer `first`."""

    rows: np.ndarray        # [N, T]
    first: int
    ids: np.ndarray         # [N, T, K] uint16 or int32
    logprobs: np.ndarray    # [N, T, K] float16
    hidden: np.ndarray | None = None    # [N, T, D] int16, the bits of bfloat16; None where `first` is 0

    def predicted(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [rows * T, K] of the likeliest tokens."""
        ids = torch.from_numpy(self.ids[chosen].astype(np.int64)).flatten(0, 1)
        return ids, torch.from_numpy(self.logprobs[chosen].astype(np.float32)).flatten(0, 1)

    def below(self, model: Hybrid, chosen: np.ndarray, first: int) -> Tensor:
        """Hidden states [rows, T, D] below layer `first`, which is this one or 0."""
        if not first:
            return model.embed(torch.from_numpy(self.rows[chosen]))
        assert first == self.first and self.hidden is not None
        return torch.from_numpy(self.hidden[chosen]).view(torch.bfloat16).float()

@torch.no_grad()
def ask_source(model: Hybrid, rows: np.ndarray, first: int, folder: Path, batch: int,
               report: Report | None = None) -> Answers:
    """Run the source over all rows once; what exists in `folder` is taken as it is.

    Where a piece was said twice, the source often says it for ever; its answers are made less likely to (ONCE_MORE).
    """
    N, T = rows.shape
    known = min(KNOWN, model.config.vocab_size - 1)
    small = np.uint16 if model.config.vocab_size <= 1 << 16 else np.int32
    wanted: dict[str, tuple[Any, int]] = {"ids": (small, known), "logprobs": (np.float16, known)}
    if first:
        wanted["hidden"] = (np.int16, model.config.hidden_size)
    progress = folder / "answers-done.txt"
    done = int(progress.read_text(encoding="ascii")) if progress.exists() else 0
    arrays = {name: open_memmap(folder / f"answers-{name}.npy", mode="r+" if done else "w+", dtype=dtype,
                                shape=(N, T, width)) for name, (dtype, width) in wanted.items()}
    for array in arrays.values():
        reserve(array)
    for start in range(done, N, batch):
        place = slice(start, start + batch)
        h = model.hidden(model.embed(torch.from_numpy(rows[place])), 0, first)
        if first:
            arrays["hidden"][place] = h.to(torch.bfloat16).view(torch.int16).numpy()
        x = model.final(model.hidden(h, first)).flatten(0, 1)
        ids, logprobs = likeliest(x, model.head, known)
        repeated = torch.from_numpy(np.concatenate([going_on(row) for row in rows[place]]))
        logprobs = less_likely(logprobs, ids == repeated[:, None])
        arrays["ids"][place] = ids.reshape(-1, T, known).numpy()
        arrays["logprobs"][place] = logprobs.reshape(-1, T, known).numpy()
        if start // batch % 16 == 15 or start + batch >= N:
            for array in arrays.values():
                array.flush()
            with new_file(progress, force=True) as temporary:
                temporary.write_text(str(min(start + batch, N)), encoding="ascii")
        if report:
            report("ask the source", min(start + batch, N), N)
    return Answers(rows, first, **arrays)

def less_likely(logprobs: Tensor, chosen: Tensor) -> Tensor:
    """Logprobs [N, K] of the likeliest tokens: those `chosen` ONCE_MORE as likely, all others likelier alike."""
    lost = (logprobs.exp() * chosen).sum(-1, keepdim=True) * (1 - ONCE_MORE)
    return torch.where(chosen, logprobs + math.log(ONCE_MORE), logprobs) - (1 - lost).log()

def reserve(array: np.memmap) -> None:
    """Take the room that an array on disk will need: a disk that is full must not kill the process at some write."""
    if hasattr(os, "posix_fallocate"):
        with open(str(array.filename), "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))

# ---- spike ----------------------------------------------------------------------------------------------

def make_spike(model: Hybrid, tuned: Checkpoint, spikes: Mapping[str, Any], batch: int) -> None:
    """Let all layers spike as `spikes` (a SPIKES_FILE) says, in SPIKING of the rows of a batch.

    tuned  the checkpoint that training begins with: its channels are as loud as folding would make them
    """
    config, rows = tuned.config.as_trained(spikes, "spikes"), max(1, round(SPIKING * batch))
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        weights = {name.removeprefix(prefix): tuned.tensor(name) for name in tuned.names() if name.startswith(prefix)}
        zones = {kind: config.spikes_of(i, kind)[1] for kind in INPUT_KINDS}
        factors = {kind: torch.from_numpy(loudness(weights, kind)) if kind in READERS else torch.ones(())
                   for kind in INPUT_KINDS}
        layer.spike = Spiking(config.spike_k, zones, factors, rows)

# ---- tune -----------------------------------------------------------------------------------------------

def tune(model: Hybrid, answers: Answers, first: int, plan: Plan, folder: Path, report: Report | None = None) -> None:
    """Train the whole hybrid, from layer `first` on, to predict what the source predicts; with spikes if it spikes."""

    def loss_of(chosen: np.ndarray) -> tuple[float, int]:
        ids, logprobs = answers.predicted(chosen)
        x = model.final(model.hidden(answers.below(model, chosen, first), first)).flatten(0, 1)
        loss = distance(x, model.head, ids, logprobs)
        loss.backward()
        return loss.item(), len(ids)

    fit(dict(model.trained()), loss_of, len(answers.ids), plan, folder, report)
