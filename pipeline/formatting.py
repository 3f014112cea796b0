"""Numbers as people read them."""

from __future__ import annotations

import math

NBSP = "\u00a0"
"""Keeps a number on one line with its unit."""


def percent(fraction: float | None, digits: int = 1) -> str:
    """``0.5`` as ``50.0 %``."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f}{NBSP}%"


def short_percent(fraction: float) -> str:
    """``0.5`` as ``50 %``, ``0.625`` as ``62.5 %``: for sparsities that people chose."""
    return f"{100 * fraction:.6g}{NBSP}%"


def perplexity(value: float | None, stderr_nll: float = 0.0) -> str:
    """Two decimals up to 100, fewer above; with the standard error of the mean log-likelihood, also its own."""
    if value is None or math.isnan(value):
        return "–"
    if value >= 1e6:
        return f"{value:.1e}" if math.isfinite(value) else "∞"
    decimals = 2 if value < 100 else 1 if value < 1000 else 0
    # The error of exp(nll), to first order.
    error = f" ± {_grouped(value * stderr_nll, decimals)}" if stderr_nll else ""
    return f"{_grouped(value, decimals)}{error}"


def points(difference: float, stderr: float | None) -> str:
    """A difference of shares in percentage points: ``0.012`` as ``+1.2 ± 0.4``."""
    return signed(100 * difference, None if stderr is None else 100 * stderr, 1)


def signed(value: float, stderr: float | None, decimals: int) -> str:
    """A difference with its sign, ``−0.123 ± 0.004``."""
    error = "" if stderr is None else f" ± {stderr:.{decimals}f}"
    return f"{value:+.{decimals}f}".replace("-", "−") + error


def duration(seconds: float | None) -> str:
    """``133`` as ``2 min 13 s``."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if seconds < 9.95:
        words = f"{seconds:.1f} s"
    elif whole < 60:
        words = f"{whole} s"
    elif whole < 3600:
        words = f"{whole // 60} min {whole % 60} s"
    else:
        words = f"{whole // 3600} h {whole % 3600 // 60} min"
    return words.replace(" ", NBSP)


def count(number: float | None) -> str:
    """``134515008`` as ``134.5 M``."""
    if number is None:
        return "–"
    for least, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= least:
            return f"{number / size:.1f}{NBSP}{unit}"
    return _grouped(number, 0)


def _grouped(number: float, decimals: int) -> str:
    return f"{number:,.{decimals}f}".replace(",", NBSP)
