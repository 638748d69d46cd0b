"""Block quantisation in the layout of ONNX Runtime's MatMulNBits and GatherBlockQuantized.

A matrix [N, K] (outputs, inputs) becomes unsigned integers q with one scale per block of 32 inputs,
`w = (q - zero) * scale`; the zero is the middle of the range (symmetric) or an integer of its own.

For 4 bits, a few dozen grids are tried for every block and the one with the smallest error is kept. An error
counts as much as its input does: `importance` is the mean square of each input, measured by `calibrate.py` (the
idea of llama.cpp's importance matrix and of AWQ, arXiv 2306.00978). Both matter most for a checkpoint that was
quantised before, whose values sit on another grid.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from meshnode.publisher.expression import Array
from meshnode.publisher.precision import BLOCK, Packing

_CHUNK: Final = 1 << 16  # values worked on at a time: what stays in the second-level cache
_THREADS: Final = 2  # numpy leaves the interpreter lock while it computes
_SHRINKS: Final = (1.06, 1.0, 0.95, 0.9, 0.85, 0.78)  # narrower grids cut outliers off and are finer for the rest
_SHIFTS: Final = (-1, 1)  # of the zero point, on the best of them


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised matrix [N, K]; B = ceil(K / 32) blocks per row."""

    data: Array  # uint8 [N, B, 32 * bits / 8], low nibble first
    scales: Array  # float32 [N, B]
    zero_points: Array | None  # uint8 [N, ceil(B * bits / 8)], low nibble first; None: the middle of the range


def packed_shapes(rows: int, columns: int, packing: Packing) -> tuple[tuple[int, ...], ...]:
    """Shapes of data, scales and (asymmetric only) zero points of a matrix [rows, columns]."""
    blocks = -(-columns // BLOCK)
    shapes: tuple[tuple[int, ...], ...] = ((rows, blocks, BLOCK * packing.bits // 8), (rows, blocks))
    if packing.zero_points:
        shapes += ((rows, -(-blocks * packing.bits // 8)),)
    return shapes


def quantise(weight: Array, packing: Packing, importance: Array | None = None) -> Packed:
    """Quantise a float32 matrix [N, K]; columns are padded with zeros to whole blocks.

    Args:
      importance: float32 [K], how much an error in each input column counts; None: all the same.
    """
    rows, columns = weight.shape
    count = -(-columns // BLOCK)
    padding = count * BLOCK - columns
    counts = np.ones(columns, np.float32) if importance is None else importance.astype(np.float32)
    if padding:
        weight = np.pad(weight, ((0, 0), (0, padding)))
        counts = np.pad(counts, (0, padding))
    counts = counts.reshape(count, BLOCK)
    codes = np.empty((rows, count, BLOCK), np.uint8)
    scales = np.empty((rows, count), np.float32)
    zeros = np.empty((rows, count), np.uint8)
    step = max(1, _CHUNK // (count * BLOCK))

    def work(start: int) -> None:
        part = slice(start, start + step)
        blocks = np.ascontiguousarray(weight[part], np.float32).reshape(-1, count, BLOCK)
        if packing.zero_points:
            codes[part], scales[part], zeros[part] = _asymmetric(blocks, counts, packing.bits)
        else:
            codes[part], scales[part] = _symmetric(blocks, packing.bits)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(work, range(0, rows, step)))
    narrow = packing.bits == 4
    return Packed(
        data=_nibbles(codes) if narrow else codes,
        scales=scales,
        zero_points=None if not packing.zero_points else _nibbles(zeros) if narrow else zeros,
    )


def dequantise(packed: Packed, packing: Packing, columns: int) -> Array:
    """The float32 matrix [N, columns] that the kernels see."""
    rows, count = packed.scales.shape
    codes = packed.data if packing.bits == 8 else _halves(packed.data)
    zeros: Array = np.full((rows, count), 1 << (packing.bits - 1), np.uint8)
    if packed.zero_points is not None:
        zeros = packed.zero_points if packing.bits == 8 else _halves(packed.zero_points)[:, :count]
    values = (codes.astype(np.float32) - zeros[..., None]) * packed.scales[..., None]
    return np.asarray(values.reshape(rows, -1)[:, :columns])


def _nibbles(values: Array) -> Array:
    """uint8 values below 16 along the last axis -> packed pairs, the first one in the low half."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray(values[..., 0::2] | (values[..., 1::2] << 4))


def _halves(values: Array) -> Array:
    """The inverse of `_nibbles`."""
    return np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)


def _symmetric(blocks: Array, bits: int) -> tuple[Array, Array]:
    """Blocks [n, B, 32] -> codes uint8 [n, B, 32], scales [n, B]; the zero is 2 ** (bits - 1)."""
    middle = 1 << (bits - 1)
    scales = (np.abs(blocks).max(axis=-1) / (middle - 1)).astype(np.float32)
    safe = np.where(scales > 0, scales, np.float32(1))
    codes = np.rint(blocks / safe[..., None]) + middle
    return np.clip(codes, 0, 2 * middle - 1).astype(np.uint8), scales


def _asymmetric(blocks: Array, counts: Array, bits: int) -> tuple[Array, Array, Array]:
    """Blocks [n, B, 32], importance [B, 32] -> codes uint8 [n, B, 32], scales [n, B], zeros uint8 [n, B].

    For given integers p the best scale is <w p> / <p p> (products weighted with the importance), and it leaves the
    error <w w> - <w p>^2 / <p p>: the grid with the largest second term wins.
    """
    top = np.float32((1 << bits) - 1)
    low = np.minimum(blocks.min(axis=-1), 0)
    width = np.maximum(blocks.max(axis=-1), 0) - low
    width = np.where(width > 0, width, np.float32(1))
    center = np.rint(-low * top / width)
    weighted = blocks * counts
    gain = np.full(width.shape, -1, np.float32)
    scales = np.zeros(width.shape, np.float32)
    zeros = np.zeros(width.shape, np.float32)
    points = np.empty_like(blocks)
    kept = np.full(width.shape, 1, np.float32)  # the shrink of the best grid

    def attempt(rounded: Array, zero: Array, shrink: Array | np.float32) -> None:
        np.clip(rounded, -zero[..., None], (top - zero)[..., None], out=points)
        along = np.einsum("nbk,nbk->nb", points, weighted)
        np.square(points, out=points)
        power = np.maximum(np.einsum("nbk,bk->nb", points, counts), np.float32(1e-20))
        better = along * along / power
        wins = better > gain
        np.copyto(gain, better, where=wins)
        np.copyto(scales, along / power, where=wins)
        np.copyto(zeros, zero, where=wins)
        np.copyto(kept, shrink, where=wins)

    first = np.clip(center, 0, top)
    for shrink in _SHRINKS:
        rounded = blocks * (top / (width * np.float32(shrink)))[..., None]
        attempt(np.rint(rounded, out=rounded), first, np.float32(shrink))
    shrinks = kept.copy()
    rounded = blocks * (top / (width * shrinks))[..., None]
    np.rint(rounded, out=rounded)
    for shift in _SHIFTS:
        attempt(rounded, np.clip(center + np.float32(shift), 0, top), shrinks)
    scales = np.where(scales > 0, scales, width / top)
    codes = np.rint(blocks / scales[..., None]) + zeros[..., None]
    return np.clip(codes, 0, top).astype(np.uint8), scales.astype(np.float32), zeros.astype(np.uint8)
