"""How far the student's predictions are from the source's, without ever holding all logits."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 512      # tokens whose logits are in memory at once


class Distance(torch.autograd.Function):
    """Mean KL(source || student), nats a token, over what is known of the source: its likeliest tokens and their rest.

    x [N, D] the head's input, head [V, D], ids [N, K] int64, logprobs [N, K] float32. The gradient is made on the way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        gradient, total = torch.empty_like(x), x.new_zeros((), dtype=torch.float64)
        for rows in torch.arange(len(x)).split(ROWS):
            a, b = int(rows[0]), int(rows[-1]) + 1
            z = F.linear(x[a:b], head).float()
            loss = _rows(z, ids[a:b], logprobs[a:b])
            total += loss.double().sum()
            gradient[a:b] = z.to(x.dtype) @ head            # z is the logits' gradient by now
        ctx.save_for_backward(gradient)
        ctx.rows = len(x)
        return (total / len(x)).float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:    # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream / ctx.rows).to(gradient.dtype), None, None, None


def _rows(z: Tensor, ids: Tensor, source: Tensor) -> Tensor:
    """KL of each row; logits z [n, V] are replaced by their gradient. One exponential of each, for it takes time."""
    z -= z.amax(-1, keepdim=True)
    chosen = z.gather(1, ids)                                               # [n, K]
    z.exp_()
    total = z.sum(-1, keepdim=True)
    chosen = chosen - total.log()                                           # the student's logprobs
    known, own_known = source.exp(), chosen.exp()
    rest = (1 - known.sum(-1, keepdim=True)).clamp(min=1e-6)
    own_rest = (1 - own_known.sum(-1, keepdim=True)).clamp(min=1e-6)
    z *= (1 - rest / own_rest) / total
    z.scatter_(1, ids, own_known - known)
    return (known * (source - chosen)).sum(-1) + (rest * (rest.log() - own_rest.log()))[:, 0]


def distance(x: Tensor, head: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    return Distance.apply(x, head, ids, logprobs)


@torch.no_grad()
def likeliest(x: Tensor, head: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids [N, count] and log-probabilities of the likeliest tokens: what `distance` needs of the source."""
    parts = []
    for rows in x.split(ROWS):
        z = F.linear(rows, head).float()
        ids = top_ids(z, count)
        parts.append((ids, z.gather(1, ids) - z.logsumexp(-1, keepdim=True)))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def top_ids(z: Tensor, count: int, group: int = 64) -> Tensor:
    """Indices [n, count] of the largest of each row z [n, V], largest first.

    They lie in the `count` groups whose maxima are largest, so only those are sorted [ten times faster than topk].
    """
    if z.shape[1] % group or z.shape[1] // group < count:
        return z.topk(count, dim=-1).indices
    groups = z.unflatten(1, (-1, group))                                        # [n, V/group, group]
    best = groups.amax(-1).topk(count, dim=-1).indices                          # [n, count]
    found = groups.gather(1, best[..., None].expand(-1, -1, group)).flatten(1).topk(count, dim=-1).indices
    return best.gather(1, found // group) * group + found % group


@torch.no_grad()
def nats(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood [N] of the next tokens."""
    return torch.cat([F.cross_entropy(F.linear(rows, head).float(), t, reduction="none")
                      for rows, t in zip(x.split(ROWS), targets.split(ROWS), strict=True)])
