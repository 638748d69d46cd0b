"""Block quantisation in the layout of ONNX Runtime's MatMulNBits and GatherBlockQuantized.

A matrix [N, K] (outputs, inputs) becomes unsigned integers q with one scale per block of 32 inputs,
`w = (q - zero) * scale`; the zero is the middle of the range (symmetric) or an integer of its own.
Rounding a block to the nearest grid point is not the best grid: for every block a few dozen grids are tried and
the one with the smallest squared error is kept, which matters most for a checkpoint that was quantised before
(its values sit on another grid).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from meshnode.models.expression import Array
from meshnode.models.precision import BLOCK, Precision

_ROWS: Final = 512  # blocks' worth of rows worked on at a time: bounds the memory of the search


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised matrix [N, K]; B = ceil(K / 32) blocks per row."""

    data: Array  # uint8 [N, B, 32 * bits / 8], low nibble first
    scales: Array  # float32 [N, B]
    zero_points: Array | None  # uint8 [N, ceil(B * bits / 8)], low nibble first; None: the middle of the range


def packed_shapes(rows: int, columns: int, precision: Precision) -> tuple[tuple[int, ...], ...]:
    """Shapes of data, scales and (asymmetric only) zero points of a matrix [rows, columns]."""
    blocks = -(-columns // BLOCK)
    shapes: tuple[tuple[int, ...], ...] = ((rows, blocks, BLOCK * precision.bits // 8), (rows, blocks))
    if precision.zero_points:
        shapes += ((rows, -(-blocks * precision.bits // 8)),)
    return shapes


def _nibbles(values: Array) -> Array:
    """uint8 values below 16 along the last axis -> packed pairs, the first one in the low half."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], axis=-1)
    packed: Array = values[..., 0::2] | (values[..., 1::2] << 4)
    return packed


def _symmetric(blocks: Array, bits: int) -> tuple[Array, Array]:
    """Blocks [n, 32] -> q uint8 [n, 32], scales [n]; zero at 2 ** (bits - 1)."""
    middle = 1 << (bits - 1)
    peak = np.abs(blocks).max(axis=1)
    scales = (peak / (middle - 1)).astype(np.float32)
    safe = np.where(scales > 0, scales, np.float32(1))
    q = np.rint(blocks / safe[:, None]) + middle
    return np.clip(q, 0, 2 * middle - 1).astype(np.uint8), scales


def _asymmetric(blocks: Array, bits: int) -> tuple[Array, Array, Array]:
    """Blocks [n, 32] -> q uint8 [n, 32], scales [n], zeros uint8 [n], by search over grids."""
    top = (1 << bits) - 1
    low = np.minimum(blocks.min(axis=1), 0)
    high = np.maximum(blocks.max(axis=1), 0)
    width = np.maximum(high - low, np.float32(1e-30))
    best_error = np.full(len(blocks), np.inf, np.float32)
    best_scale = np.ones(len(blocks), np.float32)
    best_zero = np.zeros(len(blocks), np.float32)
    for shrink in _SHRINKS:
        base = (width * np.float32(shrink / top)).astype(np.float32)
        center = np.rint(-low * np.float32(shrink) / base)
        for shift in _SHIFTS:
            zero = np.clip(center + shift, 0, top).astype(np.float32)
            q = np.clip(np.rint(blocks / base[:, None]) + zero[:, None], 0, top) - zero[:, None]
            # the least-squares scale for these integers
            power = (q * q).sum(axis=1)
            scale = np.where(power > 0, (q * blocks).sum(axis=1) / np.maximum(power, 1), base).astype(np.float32)
            error = np.square(q * scale[:, None] - blocks).sum(axis=1)
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best_scale = np.where(better, scale, best_scale)
            best_zero = np.where(better, zero, best_zero)
    safe = np.where(best_scale != 0, best_scale, np.float32(1))
    q = np.clip(np.rint(blocks / safe[:, None]) + best_zero[:, None], 0, top)
    return q.astype(np.uint8), best_scale, best_zero.astype(np.uint8)


_SHRINKS: Final = (1.0, 0.94, 0.88)  # a narrower grid cuts outliers off and is finer for the rest
_SHIFTS: Final = (0, -1, 1)


def quantise(weight: Array, precision: Precision) -> Packed:
    """Quantise a float32 matrix [N, K] to 4 or 8 bits per weight. Columns are padded with zeros to whole blocks."""
    rows, columns = weight.shape
    count = -(-columns // BLOCK)
    if count * BLOCK != columns:
        weight = np.pad(weight, ((0, 0), (0, count * BLOCK - columns)))
    data = np.empty((rows, count, BLOCK * precision.bits // 8), np.uint8)
    scales = np.empty((rows, count), np.float32)
    zeros = np.empty((rows, count), np.uint8) if precision.zero_points else None
    for start in range(0, rows, _ROWS):
        part = np.ascontiguousarray(weight[start : start + _ROWS], np.float32)
        blocks = part.reshape(-1, BLOCK)
        if zeros is None:
            q, scale = _symmetric(blocks, precision.bits)
        else:
            q, scale, zero = _asymmetric(blocks, precision.bits)
            zeros[start : start + _ROWS] = zero.reshape(-1, count)
        q = q.reshape(len(part), count, BLOCK)
        data[start : start + _ROWS] = _nibbles(q) if precision.bits == 4 else q
        scales[start : start + _ROWS] = scale.reshape(-1, count)
    if zeros is not None and precision.bits == 4:
        zeros = _nibbles(zeros)
    return Packed(data, scales, zeros)
