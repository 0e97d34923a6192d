"""pytest tests/test_token_stream.py: a text read in blocks gives the ids of the whole text."""
from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from golden import TINY, add_tokenizer, copy_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from sbedge.runtime.token_stream import _CUT, in_chunks, stream_ids
from sbedge.runtime.tokenizer import Tokenizer

FOLDERS = sorted((Path(__file__).parent / "data/tokenizer").iterdir())
WORDS = st.sampled_from(["the", "spike", "1952", "x=3", "don't", "大脑用脉冲", "è", "(a)", "…", "<|im_end|>", "A", "."])
SPACES = st.sampled_from([" ", " ", " ", "\n", "\n\n", "  ", "\t", " \n", "\r\n", ""])
TEXTS = st.lists(st.tuples(WORDS, SPACES), max_size=60).map(lambda pairs: "".join(chain(*pairs)))


@pytest.fixture(scope="module", params=[*FOLDERS, None], ids=lambda folder: folder.name if folder else "bytes")
def tokenizer(request, tmp_path_factory):
    if request.param:
        return Tokenizer.from_folder(request.param)
    return Tokenizer.from_folder(add_tokenizer(copy_checkpoint(TINY, tmp_path_factory.mktemp("bytes") / "model")))


@given(text=TEXTS, block=st.integers(40, 200), piece=st.integers(1, 90))
def test_blocks_give_the_ids_of_the_whole_text(tokenizer, text, block, piece):
    pieces = [text[start:start + piece] for start in range(0, len(text), piece)]
    places = [0, *(found.end() for found in _CUT.finditer(text)), len(text)]
    block = max(block, *(end - start + piece for start, end in pairwise(places)))       # room for a place to cut at
    blocks = list(stream_ids(tokenizer, pieces, block))
    assert list(chain(*blocks)) == tokenizer.encode(text, parse_special=False)


def test_a_beginning_token_comes_once(tokenizer):
    tokenizer.add_bos, tokenizer.bos_id = True, 1
    ids = list(chain(*stream_ids(tokenizer, ["spike train " * 20], 50)))
    tokenizer.add_bos = False
    assert ids[0] == 1 and ids[1:] == tokenizer.encode("spike train " * 20)


def test_an_endless_word_is_cut_rather_than_kept(tokenizer):
    blocks = list(stream_ids(tokenizer, ["x" * 100] * 10, 150))
    assert len(blocks) == 5 and tokenizer.decode(chain(*blocks)) == "x" * 1000


def test_no_text_has_no_ids(tokenizer):
    for pieces in ([], [""]):
        assert list(chain(*stream_ids(tokenizer, pieces))) == tokenizer.encode("")


@given(sizes=st.lists(st.integers(0, 9)), size=st.integers(1, 7), most=st.none() | st.integers(1, 30))
def test_chunks_hold_all_ids_in_order_up_to_the_most(sizes, size, most):
    ids = iter(range(sum(sizes)))
    blocks = [[next(ids) for _ in range(count)] for count in sizes]
    chunks = list(in_chunks(blocks, size, most))
    wanted = list(chain(*blocks))[:most]
    assert [len(chunk) for chunk in chunks] == [len(wanted[at:at + size]) for at in range(0, len(wanted), size)]
    np.testing.assert_array_equal(np.concatenate([*chunks, np.empty(0)]), wanted)
