"""Sums whose bits do not depend on the number of threads: terms are cut by the problem alone and added in their order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from parcnn.cpu.workers import PIECE, Scratch, Workspace, scratch_bytes, together

# BLAS adds a piece's rows one after the other: few enough that a float32 sum keeps its last digits.
MOST_ROWS = 512


class RowSums:
    """Sums over all rows, per column: each piece's in the terms' type by BLAS, the pieces' in float64."""

    def __init__(self, n: int, c: int, count: int, dtype: np.dtype, workspace: Workspace) -> None:
        self.rows_a_piece = rows_a_piece(n, c)
        self._workspace = workspace
        self._partial = workspace.shared.take((-(-n // self.rows_a_piece), count, c), dtype)
        self._ones = workspace.shared.take((self.rows_a_piece,), dtype)
        self._ones.fill(1)
        self._n = n

    def total(self, terms: Callable[[slice, Scratch], tuple[np.ndarray, ...]], pieces: int = 1) -> np.ndarray:
        """The sums (count, C), in float64, of the arrays (rows, C) that terms(rows, scratch) returns for parts of the rows.

        pieces: how many of rows_a_piece one thread alone takes in one go.
        """

        def part(rows: slice, scratch: Scratch) -> None:
            size = self.rows_a_piece
            first, n = rows.start // size, rows.stop - rows.start
            whole = n // size
            for i, term in enumerate(terms(rows, scratch)):
                if whole:
                    pieces = term[: whole * size].reshape(whole, size, -1)
                    np.matmul(self._ones, pieces, out=self._partial[first : first + whole, i])
                if whole * size < n:
                    np.matmul(self._ones[: n - whole * size], term[whole * size :], out=self._partial[first + whole, i])

        self._workspace.each_slice(self._n, part, self.rows_a_piece * pieces)
        return np.add.reduce(self._partial, axis=0, dtype=np.float64)


def rows_a_piece(n: int, c: int) -> int:
    """Rows of a piece of (n, c)."""
    return max(1, min(PIECE // c, MOST_ROWS, n))


def row_sums_bytes(n: int, c: int, count: int, dtype: np.dtype) -> int:
    """What RowSums takes from the shared scratch memory."""
    rows = rows_a_piece(n, c)
    return scratch_bytes([((-(-n // rows), count, c), dtype), ((rows,), dtype)])


def rows_at_once(n: int, c: int, workers: int) -> int:
    """Rows of (n, c) that one of so many threads takes in one go."""
    rows = rows_a_piece(n, c)
    return min(n, rows * together(-(-n // rows), workers))


def add_in_order(total: np.ndarray, terms: np.ndarray, first: bool) -> None:
    """total (+)= terms[0] + terms[1] + ..., (size,) each, one after the other. `first`: total holds nothing yet.

    size is at least two: along a single column NumPy would add in pairs.
    """
    if first:
        np.add.reduce(terms, axis=0, out=total)
    elif len(terms) == 1:
        total += terms[0]
    else:
        terms[0] += total
        np.add.reduce(terms, axis=0, out=total)
