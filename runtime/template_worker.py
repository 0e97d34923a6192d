"""Renders one chat template in a process of its own: a request as JSON on stdin, the answer on stdout.

Chat templates come with untrusted model files and are programs. Jinja's sandbox keeps them from reaching
Python's internals; nothing in Jinja stops `'x' * 10**10` or nested loops, but limits on a process do.
Run as a script by `chat_template.py`; it imports nothing of this project.
"""
from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

CPU_SECONDS = 2
MEMORY_BYTES = 1 << 29


def main() -> None:
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limits on some systems
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = {"text": render(request["template"], request["context"], request["max_chars"])}
    except Refused as error:
        answer = {"refused": str(error)}
    except MemoryError:
        answer = {"error": "it needs too much memory"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


class Refused(Exception):
    """The template itself rejects the messages (raise_exception)."""


def render(template: str, context: dict[str, Any], max_chars: int) -> str:
    """Render with the settings and functions that transformers gives to chat templates."""
    from datetime import datetime

    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}`, which marks replies for training, renders its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise Refused(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    pieces: list[str] = []
    chars = 0
    for piece in environment.from_string(template).generate(**context):
        pieces.append(piece)
        chars += len(piece)
        if chars > max_chars:
            raise ValueError(f"it writes more than {max_chars} characters")
    return "".join(pieces)


if __name__ == "__main__":
    main()
