"""genai_config.json: the model's interface in the words of onnxruntime-genai."""
from __future__ import annotations

from typing import Any

from sbedge.config import ModelConfig

UNBOUNDED = 2 ** 31 - 1     # the schema wants a context length; this architecture has none


def genai_config(config: ModelConfig) -> dict[str, Any]:
    """Names, sizes and defaults. No released onnxruntime-genai runs this model type yet."""
    decoder = {
        "session_options": {"log_id": "sbedge", "provider_options": []},
        "filename": "model.onnx",
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "sliding_window": {"window_size": config.sliding_window, "layers": list(config.attn_layers)},
        "inputs": {
            "input_ids": "input_ids", "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
            "past_recurrent_names": "past.%d.recurrent"},
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key", "present_value_names": "present.%d.value",
            "present_recurrent_names": "present.%d.recurrent"},
    }
    tokens = {key: value for key, value in (
        ("bos_token_id", config.bos_token_id), ("eos_token_id", list(config.eos_token_id) or None),
        ("pad_token_id", config.pad_token_id)) if value is not None}
    return {
        "model": {"type": "spikingbrain", "context_length": UNBOUNDED, "vocab_size": config.vocab_size, **tokens,
                  "decoder": decoder},
        "search": {"do_sample": False, "max_length": UNBOUNDED, "past_present_share_buffer": False,
                   "temperature": 1.0, "top_k": 50, "top_p": 1.0},
    }
