"""What a reply cost and what a conversation holds, in words."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sbedge.runtime.generate import Piece
from sbedge.runtime.session import Session


class Meter:
    """Watches the pieces of one reply pass by."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tokens = 0
        self.finish: str | None = None
        timings = session.timings
        self._decoded, self._seconds = timings.decode_tokens, timings.decode_seconds
        self._prefilled = timings.prefill_tokens
        self._traffic: tuple[int, int] | None = None

    def watch(self, pieces: Iterator[Piece]) -> Iterator[str]:
        for piece in pieces:
            if self._traffic is None:       # now that the prompt is read, which fetches what any of its tokens needs
                self._traffic = weight_traffic(self.session)
            self.tokens += len(piece.ids)
            self.finish = piece.finish
            yield piece.text

    def status(self) -> str:
        """One line; a second one says why something was read again."""
        s, timings = self.session, self.session.timings
        decoded, seconds = timings.decode_tokens - self._decoded, timings.decode_seconds - self._seconds
        facts = [f"{self.tokens} tokens"]
        if decoded and seconds > 0:
            facts.append(f"{decoded / seconds:.1f} tok/s")
        facts += [f"position {s.state.position}", f"state {megabytes(s.state.nbytes)}"]
        if timings.prefill_tokens > self._prefilled:
            facts.append(f"read {s.prefilled}" + (f" + {s.reused} reused" if s.reused else ""))
        if (silent := silent_rate(s, self._traffic or weight_traffic(s))) is not None:
            facts.append(f"silent {silent:.0%}")
        if self.finish == "length":
            facts.append("cut short: /continue")
        why = f"\n[read again: {s.reread}]" if s.reread and s.prefilled else ""
        return f"[{', '.join(facts)}]{why}"


def statistics(session: Session) -> list[tuple[str, str]]:
    """All figures of a session since it began."""
    t, cache = session.timings, session.cache
    asked = sum(message["role"] == "user" for message in session.messages)
    facts = [("turns", str(asked)), ("position", f"{session.state.position} tokens"),
             ("state", f"{megabytes(session.state.nbytes)}, whatever the position"),
             ("read", f"{t.prefill_tokens} tokens, {t.prefill_tokens_per_second:.1f} tok/s"),
             ("drawn", f"{t.decode_tokens} tokens, {t.decode_tokens_per_second:.1f} tok/s"),
             ("last prompt", f"{session.reused} tokens reused, {session.prefilled} read"),
             ("snapshots", f"{len(cache)}, {megabytes(cache.nbytes)} of at most {megabytes(cache.budget)}")]
    if session.reread:
        facts.insert(6, ("read again", session.reread))
    if (silent := silent_rate(session)) is not None:
        facts.append(("silent", f"{silent:.1%} of spiking weights were never fetched"))
    return facts


def weight_traffic(session: Session) -> tuple[int, int]:
    """Bytes of spiking weights fetched so far, and had no channel been silent; (0, 0) if unknown."""
    traffic: Any = getattr(session.engine, "traffic", None)
    return (traffic.fetched, traffic.dense) if traffic else (0, 0)


def silent_rate(session: Session, since: tuple[int, int] = (0, 0)) -> float | None:
    """Share of the bytes that silent channels saved; None where nothing spikes."""
    fetched, dense = (now - before for now, before in zip(weight_traffic(session), since, strict=True))
    return 1 - fetched / dense if dense else None


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
