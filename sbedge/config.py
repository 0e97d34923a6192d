"""ModelConfig: what a SpikingBrain model is, read from a checkpoint's config.json."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import CheckpointError

GATE_RANK = 16          # base and SFT checkpoints factor the gate projection through 16 channels
WEIGHT_GROUP = 128      # W8ASpike: input channels that share one weight scale
GATE_DIVISOR = 16.0     # log_decay = logsigmoid(gate) / 16
# What spikes, and the linears that read it; all linears of one input share its counts.
INPUT_KINDS = {"attention in": ("q_proj", "k_proj", "v_proj", "gk_proj"), "attention out": ("o_proj",),
               "FFN in": ("gate_proj", "up_proj"), "FFN down": ("down_proj",)}
KIND_OF = {projection: kind for kind, projections in INPUT_KINDS.items() for projection in projections}
MAX_SIZE = 1 << 24      # no dimension of a real model is larger; bounds what an untrusted file can ask for


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model; field names are the keys of config.json.

    `attn_layers` lists the sliding-window layers, all others are GLA. The fields from `gate_rank` on are not in
    config.json: they follow from which tensors a checkpoint holds (`Checkpoint` fills them in), for a base checkpoint
    exported with spikes from the export's options, and from how a model is loaded.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    sliding_window: int
    attn_layers: tuple[int, ...]
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    gate_rank: int = GATE_RANK          # 0: the gate projection is one full-rank matrix (W8ASpike)
    spike_k: float = 0.0                # firing threshold = mean|x| / k; 0: activations are not spiked
    int8_window: bool = False           # W8ASpike's attention: keys and values as int8 codes, queries spiked
    spike_down: bool = False            # the input of down_proj spikes, too (the published W8ASpike leaves it out)
    dead_zone: float = 0.0              # channels with |x| < dead_zone * mean|x| are silent
    # Of calibrated exports, instead of the two above: one of each for every layer and input kind, layer by layer in the
    # order of INPUT_KINDS.
    input_spike_k: tuple[float, ...] = ()
    input_dead_zone: tuple[float, ...] = ()
    trained_to_spike: bool = False      # so, by k and dead zones; W8ASpike has its own
    half_window: bool = False           # keys and values as float16: chosen when a model is loaded, nothing of its own

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_dim(self) -> int:
        """Width of the key, value and gate projections: G * d."""
        return self.num_key_value_heads * self.head_dim

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def is_window_layer(self, layer: int) -> bool:
        return layer in self.attn_layers

    def spikes_of(self, layer: int, kind: str) -> tuple[float, float]:
        """k and dead zone with which the inputs of a kind spike in a layer of a model that spikes."""
        at = layer * len(INPUT_KINDS) + list(INPUT_KINDS).index(kind)
        return (self.input_spike_k[at] if self.input_spike_k else self.spike_k,
                self.input_dead_zone[at] if self.input_dead_zone else self.dead_zone)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them, but for what a loaded model alone has, and for empty ones that came later:
        fingerprints hash this, and stay what they were."""
        return {key: value for key, value in asdict(self).items()
                if key != "half_window" and (value or key not in LATER_FIELDS)}

    def as_trained(self, trained: Mapping[str, Any], source: str) -> ModelConfig:
        """This model spiking as it was trained to: `trained` holds spike_k and input_dead_zone.

        CheckpointError for numbers that do not fit the model.
        """
        asked = {"spike_k": trained.get("spike_k"), "input_dead_zone": trained.get("input_dead_zone")}
        spiking = self.from_dict({**self.to_dict(), **asked, "spike_down": True, "trained_to_spike": True},
                                 source=source)
        if not spiking.spike_k or not spiking.input_dead_zone:
            raise CheckpointError(f"{source}: expected spike_k above 0 and input_dead_zone, found {sorted(trained)}")
        return spiking

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
        """Read the keys of a published config.json (or of `to_dict`).

        Raises CheckpointError naming the key, the value found and what was expected.
        """
        _check_architecture(raw, source)
        sizes = {key: _size(raw, key, source) for key in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "intermediate_size", "vocab_size", "sliding_window")}
        heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        for divisor, key, whole in ((heads, "hidden_size", sizes["hidden_size"]),
                                    (groups, "num_attention_heads", heads)):
            if whole % divisor:
                raise CheckpointError(f"{source}: {key} {whole} is not a multiple of {divisor} heads")
        if (sizes["hidden_size"] // heads) % 2:
            raise CheckpointError(f"{source}: head size {sizes['hidden_size'] // heads} is odd; "
                                  "the rotary embedding needs an even one")
        return cls(
            **sizes,
            attn_layers=_attn_layers(raw.get("attn_layers"), sizes["num_hidden_layers"], source),
            rope_theta=_positive(raw, "rope_theta", 1e6, source),
            norm_eps=_positive(raw, "norm_eps", 1e-6, source),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings", source),
            bos_token_id=_token(raw, "bos_token_id", source),
            eos_token_id=_tokens(raw, "eos_token_id", source),
            pad_token_id=_token(raw, "pad_token_id", source),
            gate_rank=_size(raw, "gate_rank", source, low=0) if "gate_rank" in raw else GATE_RANK,
            spike_k=_positive(raw, "spike_k", 0.0, source, low=0.0),
            int8_window=_flag(raw, "int8_window", source),
            spike_down=_flag(raw, "spike_down", source),
            dead_zone=_positive(raw, "dead_zone", 0.0, source, low=0.0),
            input_spike_k=_of_inputs(raw, "input_spike_k", sizes["num_hidden_layers"], source, low=1e-30),
            input_dead_zone=_of_inputs(raw, "input_dead_zone", sizes["num_hidden_layers"], source, low=0.0),
            trained_to_spike=_flag(raw, "trained_to_spike", source),
            half_window=False,      # no file's business
        )

    @classmethod
    def from_json(cls, path: Path) -> ModelConfig:
        """Read `path`; raises CheckpointError if it is missing, not JSON, or not a model we can run."""
        raw = read_json(path, "a checkpoint folder with a config.json")
        unpublished = {f.name for f in fields(cls)} - PUBLISHED_KEYS
        return cls.from_dict({k: v for k, v in raw.items() if k not in unpublished}, source=str(path))


LATER_FIELDS = ("input_spike_k", "input_dead_zone", "trained_to_spike")
PUBLISHED_KEYS = {f.name for f in fields(ModelConfig)} - {"gate_rank", "spike_k", "int8_window", "spike_down",
                                                         "dead_zone", "half_window", *LATER_FIELDS}


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError if it is none, or cannot be read where `expected` should be."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _check_architecture(raw: Mapping[str, Any], source: str) -> None:
    kind = raw.get("model_type", "gla_swa")
    if kind == "sse_swa_moba":
        raise CheckpointError(f"{source}: this is SpikingBrain2.0 (model_type sse_swa_moba), another "
                              "architecture that sbedge cannot run yet; use a SpikingBrain-7B checkpoint")
    if kind != "gla_swa":
        raise CheckpointError(f"{source}: model_type is {kind!r}, expected 'gla_swa' (SpikingBrain)")
    if raw.get("use_short_conv"):
        raise CheckpointError(f"{source}: use_short_conv is true; no released SpikingBrain model has short "
                              "convolutions and sbedge cannot run them")
    if raw.get("hidden_act", "swish") not in ("swish", "silu"):
        raise CheckpointError(f"{source}: hidden_act is {raw['hidden_act']!r}, expected 'swish'")
    if raw.get("rope_scaling"):
        raise CheckpointError(f"{source}: rope_scaling is set; SpikingBrain uses plain rotary embedding")


def _size(raw: Mapping[str, Any], key: str, source: str, low: int = 1) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_SIZE:
        raise CheckpointError(f"{source}: {key} is {value!r}, expected a whole number from {low} to {MAX_SIZE}")
    return value


def _positive(raw: Mapping[str, Any], key: str, default: float, source: str, low: float = 1e-30) -> float:
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < 1e30:
        raise CheckpointError(f"{source}: {key} is {value!r}, expected a positive number")
    return float(value)


def _of_inputs(raw: Mapping[str, Any], key: str, layers: int, source: str, low: float) -> tuple[float, ...]:
    """A number for each layer and input kind, or none at all."""
    values, count = raw.get(key) or (), layers * len(INPUT_KINDS)
    if not isinstance(values, (list, tuple)) or len(values) not in (0, count):
        raise CheckpointError(f"{source}: {key} must hold {count} numbers, one for each layer and input kind")
    return tuple(_positive({key: value}, key, low, source, low) for value in values)


def _flag(raw: Mapping[str, Any], key: str, source: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{source}: {key} is {value!r}, expected true or false")
    return value


def _token(raw: Mapping[str, Any], key: str, source: str) -> int | None:
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SIZE:
        raise CheckpointError(f"{source}: {key} is {value!r:.40}, expected a token id")
    return value


def _tokens(raw: Mapping[str, Any], key: str, source: str) -> tuple[int, ...]:
    value = raw.get(key)
    if value is None:
        return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    ids = (_token({key: v}, key, source) for v in values)
    return tuple(i for i in ids if i is not None)


def _attn_layers(value: Any, num_layers: int, source: str) -> tuple[int, ...]:
    if value is None:
        return tuple(range(1, num_layers, 2))
    ok = isinstance(value, (list, tuple)) and all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < num_layers for i in value)
    if not ok or len(set(value)) != len(value):
        raise CheckpointError(f"{source}: attn_layers is {value!r}, expected distinct layer indices "
                              f"below {num_layers}")
    return tuple(sorted(value))
