"""`sbedge perplexity`: how well a model predicts a text, alone or beside another."""
from __future__ import annotations

import argparse
import json
import math
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sbedge.apps.options import add_engine, add_model, add_text, engine_options
from sbedge.apps.progress import progress_bar
from sbedge.apps.text import one_line
from sbedge.errors import InputError
from sbedge.export.perplexity import Comparison, Predictions, chunk_tokens, read_all
from sbedge.runtime.engine import default_threads
from sbedge.runtime.load import ENGINE_OF, ids_only, model_kind, open_engine, open_tokenizer
from sbedge.runtime.token_stream import BLOCK, in_chunks, stream_ids


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure how well a model predicts a text: perplexity, the exponential of the mean of -log p(token), with its\n"
        "standard error. The text is one stream of any length: the state is never reset, so each token is predicted\n"
        "from all before it, and memory does not grow. With --against, a second model reads along: how far the two\n"
        "are apart at every token says much more than their perplexities do.")
    parser.epilog = ("examples:\n  sbedge perplexity model-q4_0.gguf --text prose.txt\n"
                     "  sbedge perplexity model-q4_0.gguf --text prose.txt --against CHECKPOINT --tokens 2000")
    add_model(parser)
    add_text(parser)
    parser.add_argument("--against", metavar="OTHER",
                        help="another export of the same model, or its checkpoint folder (exact and slow)")
    parser.add_argument("--tokens", type=int, metavar="N", help="stop after N tokens (default: the whole text)")
    add_engine(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    if args.tokens is not None and args.tokens < 2:
        raise InputError(f"--tokens is {args.tokens}, expected at least 2: the first has nothing before it")
    args.text.open("rb").close()        # a missing text is found before a model is loaded
    engine = open_engine(args.model, *engine_options(args))
    model = Predictions(engine, args.model)
    reader: Predictions | Comparison = model
    if args.against is not None:
        reader = Comparison(model, other_predictions(args, engine.config.vocab_size))
    with progress_bar() as bar:
        blocks = stream_ids(open_tokenizer(args.model, engine.config.vocab_size) or ids_only(engine.config, args.model),
                            text_pieces(args.text, lambda done, total: bar("reading", done, total)))
        read_all(reader, in_chunks(blocks, chunk_tokens(engine.config.vocab_size), args.tokens))
    if not model.nll.count:
        raise InputError(f"{args.text}: {model.state.position} tokens, expected at least 2: the first has nothing "
                         "before it")
    summary = summarize(reader, args)
    if args.json:
        print(json.dumps(summary))
    else:
        print_summary(summary)


def other_predictions(args: argparse.Namespace, vocab_size: int) -> Predictions:
    other = open_engine(args.against, threads=args.threads)
    if other.config.vocab_size != vocab_size:
        raise InputError(f"{args.against}: its vocabulary has {other.config.vocab_size} tokens, that of {args.model} "
                         f"{vocab_size}; only models that share a vocabulary can be compared")
    return Predictions(other, args.against)


def text_pieces(path: Path, progress: Callable[[int, int], None]) -> Iterator[str]:
    """The text of a file, a block at a time; InputError if it is not UTF-8."""
    decoder, done, total = getincrementaldecoder("utf-8")(), 0, path.stat().st_size
    with path.open("rb") as file:
        while True:
            data = file.read(BLOCK)
            done += len(data)
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                byte = done - len(error.object) + error.start
                raise InputError(f"{path}: not UTF-8 text (byte {byte}); convert it first") from None
            if not data:
                return
            progress(done, total)


# --- the result --------------------------------------------------------------------------------------
def summarize(reader: Predictions | Comparison, args: argparse.Namespace) -> dict[str, Any]:
    """All that --json prints."""
    model = reader.model if isinstance(reader, Comparison) else reader
    summary = {"text": str(args.text), "tokens": model.state.position, "scored": model.nll.count,
               "threads": args.threads or default_threads(), **figures(model, args.engine), "against": None}
    if isinstance(reader, Comparison):
        assert reader.report is not None
        summary["against"] = {**figures(reader.other), **reader.report.to_dict(),
                              "nll_difference": reader.difference.value,
                              "nll_difference_stderr": finite(reader.difference.stderr)}
    return summary


def figures(model: Predictions, engine: str = "auto") -> dict[str, Any]:
    return {"model": model.name, "engine": ENGINE_OF[model_kind(model.name, engine)],
            "perplexity": finite(model.perplexity), "perplexity_stderr": finite(model.perplexity_stderr),
            "nll": model.nll.value, "nll_stderr": finite(model.nll.stderr), "tok_s": model.tokens_per_second}


def finite(value: float) -> float | None:
    """JSON has no infinities: one token has no standard error."""
    return value if math.isfinite(value) else None


def print_summary(summary: dict[str, Any]) -> None:
    against = summary["against"]
    print(one_line(f"{summary['text']}: {summary['tokens']:,} tokens, {summary['scored']:,} of them predicted, as one "
                   "stream"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("model", overflow="fold")
    for column in ("perplexity", "nats a token", "tok/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in (summary, against) if against else (summary,):
        table.add_row(one_line(f"{row['model']} ({row['engine']})"),
                      with_error(row["perplexity"], row["perplexity_stderr"], 3),
                      with_error(row["nll"], row["nll_stderr"], 4), f"{row['tok_s']:,.1f}")
    Console(markup=False, highlight=False, emoji=False).print(table)
    if against:
        print(comparison_text(against))


def comparison_text(against: dict[str, Any]) -> str:
    more, error = against["nll_difference"], against["nll_difference_stderr"]
    percent = with_error(100 * math.expm1(more), None if error is None else 100 * math.exp(more) * error, 2, sign="+")
    return (f"perplexity {percent} % from the second's, token by token\n"
            f"KL(second || first) {against['kl_mean']:.3g} nats a token, {against['kl_max']:.3g} at the worst\n"
            f"the same likeliest token at {against['top1_agreement']:.1%}")


def with_error(value: float | None, error: float | None, digits: int, sign: str = "") -> str:
    if value is None:
        return "beyond float64"
    return f"{value:{sign},.{digits}f}" + ("" if error is None else f" ± {error:,.{digits}f}")
