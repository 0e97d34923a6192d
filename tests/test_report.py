"""The distance of an export from float32 is measured as textbooks define it, over a fixed sample."""
from __future__ import annotations

import numpy as np
import pytest

from sbedge.export.report import SAMPLE_TEXT, SAMPLE_TOKENS, compare, sample_ids


def test_kl_and_agreement_match_a_calculation_by_hand() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.5, 0.2])
    exact = np.log(np.stack([p, q])).astype(np.float32) + 5        # a constant changes no distribution
    exported = np.log(np.stack([q, q])).astype(np.float32)
    report = compare(exact, exported)
    by_hand = 0.7 * np.log(0.7 / 0.3) + 0.2 * np.log(0.2 / 0.5) + 0.1 * np.log(0.1 / 0.2)
    assert report.kl_max == pytest.approx(by_hand, rel=1e-5) and report.kl_mean == pytest.approx(by_hand / 2, rel=1e-5)
    assert (report.tokens, report.top1_agreement) == (2, 0.5)


def test_equal_logits_have_no_distance() -> None:
    logits = np.random.default_rng(0).standard_normal((20, 1000)).astype(np.float32) * 30
    report = compare(logits, logits)
    assert (report.kl_mean, report.kl_max, report.top1_agreement) == (0.0, 0.0, 1.0)


def test_large_logits_do_not_overflow() -> None:
    report = compare(np.array([[1e4, 0, -1e4]], np.float32), np.array([[0, 1e4, 0]], np.float32))
    assert report.kl_mean == pytest.approx(1e4) and report.top1_agreement == 0


def test_the_sample_is_fixed_bilingual_text_of_one_length() -> None:
    ids = sample_ids(lambda text: list(text.encode()), 320)
    assert len(ids) == SAMPLE_TOKENS and bytes(ids.tolist()) == SAMPLE_TEXT.encode()[:SAMPLE_TOKENS]
    assert "大脑" in SAMPLE_TEXT and "brain" in SAMPLE_TEXT


def test_without_a_tokenizer_the_sample_is_the_same_random_ids_each_time() -> None:
    a, b = sample_ids(None, 50), sample_ids(None, 50)
    np.testing.assert_array_equal(a, b)
    assert len(a) == SAMPLE_TOKENS and a.min() >= 0 and a.max() < 50 and len(set(a.tolist())) > 20
