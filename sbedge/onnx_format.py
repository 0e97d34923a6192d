"""What our ONNX folders call things; the exporter writes these names and the engine binds them."""
from __future__ import annotations


def io_names(name: str) -> tuple[str, str]:
    """Names of the graph's input and output for a state array, after onnxruntime-genai."""
    layer, part = name.split(".")
    if part == "recurrent_state":
        return f"past.{layer}.recurrent", f"present.{layer}.recurrent"
    part = part.removesuffix("s")
    return f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
