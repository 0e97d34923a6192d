"""How far an export is from its checkpoint: KL divergence and agreement over a fixed sample of text."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SAMPLE_TOKENS = 128
SAMPLE_TEXT = """The spike is the alphabet of the brain. A neuron adds up what arrives until a threshold is passed, \
fires once, and forgets. Most of the time most cells are silent, which is why twenty watts are enough to read this \
page. In 1952 Hodgkin and Huxley wrote down four equations for a single axon of a squid; the rest is counting. \
大脑用脉冲传递信息。神经元在膜电位超过阈值时放电，其余时间保持安静，因此能耗极低。脉冲神经网络模仿这种稀疏的、\
事件驱动的计算方式，使大语言模型可以在普通处理器上运行，而记忆的大小不随文本长度增加。\
def fire(charge, threshold=1.0): return charge >= threshold  # one line of code, 2 outcomes."""


@dataclass(frozen=True)
class Report:
    """Distance of an export's next-token distributions from the float32 checkpoint's."""

    tokens: int             # positions compared
    kl_mean: float          # KL(float32 || export) in nats, averaged over positions
    kl_max: float           # at the worst position
    top1_agreement: float   # share of positions with the same most likely token

    def merged(self, other: Report) -> Report:
        """The report on the positions of both."""
        tokens = self.tokens + other.tokens

        def mean(mine: float, theirs: float) -> float:
            return (mine * self.tokens + theirs * other.tokens) / tokens

        return Report(tokens, mean(self.kl_mean, other.kl_mean), max(self.kl_max, other.kl_max),
                      mean(self.top1_agreement, other.top1_agreement))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (f"KL from float32 {self.kl_mean:.3g} nats (worst {self.kl_max:.3g}), same top token "
                f"{self.top1_agreement:.1%} over {self.tokens} tokens")


def sample_ids(encode: Callable[[str], list[int]] | None, vocab_size: int) -> np.ndarray:
    """The sample as token ids [n]: the built-in text, or without a tokenizer random ids, always the same."""
    if encode is None:
        return np.random.default_rng(0).integers(0, vocab_size, SAMPLE_TOKENS)
    return np.array(encode(SAMPLE_TEXT)[:SAMPLE_TOKENS], np.int64)


def compare(exact: np.ndarray, exported: np.ndarray) -> Report:
    """Report on logits [n, V] of the checkpoint and of its export for the same ids."""
    p, q = log_softmax(exact), log_softmax(exported)
    kl = np.maximum((np.exp(p) * (p - q)).sum(-1), 0)      # rounding can make an exact zero slightly negative
    same = exact.argmax(-1) == exported.argmax(-1)
    return Report(len(kl), float(kl.mean()), float(kl.max()), float(same.mean()))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float64: differences of 1e-8 nats still count."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
