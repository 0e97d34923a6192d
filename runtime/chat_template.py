"""From a list of messages to the prompt that a chat model was trained on."""
from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbedge.errors import InputError, TokenizerError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_WORKER = Path(__file__).with_name("template_worker.py")
_SECONDS = 10          # wall time; the worker's own limits usually act first
_TEMPLATE_CHARS = 1 << 20  # added to four times the messages' length: room for any honest template

Messages = Sequence[Mapping[str, Any]]  # each with "role" and "content"


def render_chat(template: str, messages: Messages, *, add_generation_prompt: bool = True, bos_token: str = "",
                eos_token: str = "", **variables: Any) -> str:
    """Text of the whole conversation, ready for the model's reply if `add_generation_prompt`.

    The Jinja template is untrusted: it runs sandboxed in a short-lived process with limits on time, memory
    and output (see template_worker.py; about 0.1 s). `variables` are passed to it and must fit in JSON.
    Raises InputError if the template rejects the messages, TokenizerError if it is broken or hostile.
    """
    context = {**variables, "messages": list(messages), "add_generation_prompt": add_generation_prompt,
               "bos_token": bos_token, "eos_token": eos_token}
    try:
        max_chars = _TEMPLATE_CHARS + 4 * len(json.dumps(context))
        request = json.dumps({"template": template, "context": context, "path": sys.path, "max_chars": max_chars})
    except (TypeError, ValueError) as error:
        raise InputError(f"chat messages must be plain texts, numbers, lists and objects: {error}") from None
    try:
        done = subprocess.run([sys.executable, "-I", str(_WORKER)], input=request.encode(), timeout=_SECONDS,
                              capture_output=True, check=False)
        answer = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):  # killed by a limit, so no answer
        answer = {"error": "it needs too much time or memory"}
    if "text" in answer:
        return answer["text"]
    if "refused" in answer:
        raise InputError(f"the chat template rejects these messages: {_one_line(answer['refused'])}")
    raise TokenizerError(f"the model's chat template fails ({_one_line(answer['error'])}); "
                         "use plain generation, or repair the template in the model's tokenizer_config.json")


def chat_parts(tokenizer: Tokenizer, messages: Messages, **options: Any) -> list[str | int]:
    """The rendered conversation cut at the template's own special tokens: texts and ids.

    Special tokens that a message spells out (`<|im_end|>` in a user's text) stay text: they are taken out
    before rendering and put back after the cut, so that nobody ends a turn by writing its marker.
    """
    if tokenizer.chat_template is None:
        raise InputError("this model has no chat template; use generate with a plain prompt")
    nonce = str(secrets.randbits(96))  # only digits: no filter of a template changes them
    hidden: list[str] = []

    def hide(value: Any) -> Any:
        if isinstance(value, str):
            return "".join(part if isinstance(part, str) else hide_id(part) for part in tokenizer.split_special(value))
        if isinstance(value, Mapping):
            return {key: hide(item) for key, item in value.items()}
        return [hide(item) for item in value] if isinstance(value, (list, tuple)) else value

    def hide_id(id: int) -> str:
        hidden.append(tokenizer.token_text(id))
        return f"{nonce}_{len(hidden) - 1}_"

    text = render_chat(tokenizer.chat_template, hide(messages), bos_token=tokenizer.token_text(tokenizer.bos_id),
                       eos_token=tokenizer.token_text(tokenizer.eos_id), **options)
    parts = tokenizer.split_special(text)
    if not hidden:
        return parts
    mark = re.compile(f"{nonce}_([0-9]+)_")
    return [mark.sub(lambda found: hidden[int(found[1])], part) if isinstance(part, str) else part for part in parts]


def _one_line(text: str) -> str:
    return " ".join(str(text).split())[:200]
