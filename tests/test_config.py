"""config.json of the released models is understood; anything else is refused with the key and its value."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sbedge.config import ModelConfig
from sbedge.errors import CheckpointError

PUBLISHED_7B: dict[str, Any] = {
    "model_type": "gla_swa", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "sliding_window": 4096,
    "attn_layers": list(range(1, 28, 2)), "rope_theta": 1000000.0, "norm_eps": 1e-6, "hidden_act": "swish",
    "use_short_conv": False, "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151643,
    "torch_dtype": "bfloat16", "attn_mode": "chunk",
}


def test_the_released_7b_is_read_with_the_sizes_that_follow() -> None:
    c = ModelConfig.from_dict(PUBLISHED_7B)
    assert (c.head_dim, c.kv_dim, c.group_size) == (128, 512, 7)
    assert [i for i in range(28) if c.is_window_layer(i)] == list(range(1, 28, 2))
    assert c.eos_token_id == (151643,) and (c.gate_rank, c.spike_k, c.int8_window) == (16, 0.0, False)


def test_absent_keys_take_the_published_defaults() -> None:
    optional = ("attn_layers", "rope_theta", "norm_eps", "hidden_act", "use_short_conv", "tie_word_embeddings",
                "bos_token_id", "eos_token_id", "model_type")
    c = ModelConfig.from_dict({k: v for k, v in PUBLISHED_7B.items() if k not in optional})
    assert c.attn_layers == tuple(range(1, 28, 2))
    assert (c.rope_theta, c.norm_eps, c.tie_word_embeddings) == (1e6, 1e-6, False)
    assert (c.bos_token_id, c.eos_token_id) == (None, ())


def test_another_layer_pattern_is_honoured() -> None:
    c = ModelConfig.from_dict({**PUBLISHED_7B, "attn_layers": [27, 0, 5]})
    assert c.attn_layers == (0, 5, 27) and not c.is_window_layer(1)
    assert ModelConfig.from_dict({**PUBLISHED_7B, "attn_layers": []}).attn_layers == ()


def test_several_end_tokens_are_kept() -> None:
    assert ModelConfig.from_dict({**PUBLISHED_7B, "eos_token_id": [151645, 151643]}).eos_token_id == (151645, 151643)


def test_to_dict_survives_json_unchanged() -> None:
    c = ModelConfig.from_dict({**PUBLISHED_7B, "gate_rank": 0, "spike_k": 3.0, "int8_window": True})
    assert ModelConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c


def test_keys_that_only_exports_carry_are_ignored_in_a_published_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**PUBLISHED_7B, "spike_k": 3.0, "gate_rank": 0}))
    c = ModelConfig.from_json(path)
    assert (c.spike_k, c.gate_rank) == (0.0, 16)


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "sse_swa_moba"}, "SpikingBrain2.0"),
    ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
    ({"use_short_conv": True}, "use_short_conv is true"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"hidden_size": "3584"}, "hidden_size is '3584'"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": -5}, "vocab_size is -5"),
    ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
    ({"hidden_size": 3585}, "hidden_size 3585 is not a multiple of 28"),
    ({"num_key_value_heads": 3}, "num_attention_heads 28 is not a multiple of 3"),
    ({"hidden_size": 28 * 3}, "head size 3 is odd"),
    ({"attn_layers": [28]}, r"attn_layers is \[28\]"),
    ({"attn_layers": [1, 1]}, r"attn_layers is \[1, 1\]"),
    ({"attn_layers": "odd"}, "attn_layers is 'odd'"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ({"norm_eps": "small"}, "norm_eps is 'small'"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ({"eos_token_id": [1, "x"]}, "eos_token_id is 'x'"),
    ({"bos_token_id": -1}, "bos_token_id is -1"),
])
def test_a_config_we_cannot_run_is_refused_by_key_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelConfig.from_dict({**PUBLISHED_7B, **change}, source="here/config.json")
    assert str(caught.value).startswith("here/config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not valid JSON"), ("", "not valid JSON"), ("[1, 2]", "found list"), ("[" * 100_000, "not valid JSON"),
    ("\"x\"", "found str"),
])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelConfig.from_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelConfig.from_json(path)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelConfig.from_json(tmp_path / "config.json")
