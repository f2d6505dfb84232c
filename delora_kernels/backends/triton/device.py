"""Device functions that kernels share: dots of mixed dtypes, dropout masks of the same bits as the
eager backend's.
"""

import triton
import triton.language as tl

# splitmix64, see backends/dropout.py: the same seed gives the same mask on every backend
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_SECOND = tl.constexpr(0x94D049BB133111EB - (1 << 64))


@triton.jit
def _hash(index, seed):
    """splitmix64 of int64 indices; shifts are logical."""
    z = (index + 1) * _GAMMA + seed
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _FIRST
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def keep_tile(seed_pointer, t, c0, K, threshold, BT: tl.constexpr, BC: tl.constexpr):
    """Return the kept elements of rows t and columns c0 ... c0 + BC - 1 of a [T, K] mask; c0 and BC
    are multiples of 4.
    """
    given = tl.load(seed_pointer)
    g = c0 // 4 + tl.arange(0, BC // 4)
    bits = _hash(t[:, None].to(tl.int64) * ((K + 3) // 4) + g[None, :], _hash(given * 0, given))
    fields = tl.broadcast_to(bits[:, :, None], (BT, BC // 4, 4)) >> (16 * tl.arange(0, 4))[None, None, :]
    return tl.reshape(fields.to(tl.int16) >= threshold, (BT, BC))


@triton.jit
def dropped(x, keep):
    """x where it is kept, not yet divided by 1 − p; elsewhere x · 0: NaN and Inf show, as in
    torch's dropout.
    """
    return (x.to(tl.float32) * keep.to(tl.float32)).to(x.dtype)


@triton.jit
def _low(wide, high):
    """Return what the bfloat16 half `high` leaves of `wide`; nothing where it is infinite."""
    rest = wide - high.to(tl.float32)
    return tl.where(tl.abs(high.to(tl.float32)) < float("inf"), rest, 0.0).to(tl.bfloat16)


@triton.jit
def in_planes(wide):
    """Return three bfloat16 parts that add up to `wide`: they hold all of float32's 24 bits."""
    high = wide.to(tl.bfloat16)
    low = _low(wide, high)
    rest = _low(wide - high.to(tl.float32), low)
    return high, low, tl.where(tl.abs(wide) < float("inf"), rest, 0.0).to(tl.bfloat16)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + a · b."""
    if INTERPRETED:  # whose dot multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def mixed_dot(big, small, acc, HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + big · small, summed in float32; `HOW` as in launch.py. `big` may itself be float32
    beside bfloat16.
    """
    if HOW == 0:
        return _dot(big, small, acc, PRECISION, INTERPRETED)
    if HOW == 3:
        return _dot(big.to(tl.float32), small.to(tl.float32), acc, PRECISION, INTERPRETED)
    high, low, rest = in_planes(small)
    if HOW == 1:
        acc = _dot(big, rest, acc, PRECISION, INTERPRETED)
        acc = _dot(big, low, acc, PRECISION, INTERPRETED)
        return _dot(big, high, acc, PRECISION, INTERPRETED)
    big_high = big.to(tl.bfloat16)
    acc = _dot(_low(big, big_high), high, acc, PRECISION, INTERPRETED)
    acc = _dot(big_high, low, acc, PRECISION, INTERPRETED)
    return _dot(big_high, high, acc, PRECISION, INTERPRETED)


@triton.jit
def lane_sums(tile, LANES: tl.constexpr):
    """Add up the rows of a tile [BT, BC] that are LANES apart, which one thread holds (`lanes` in
    tables.py): [LANES, BC]. Threads are added once, after the loop.
    """
    return tl.sum(tl.reshape(tile, (tile.shape[0] // LANES, LANES, tile.shape[1])), 0)


@triton.jit
def in_units(number, UNIT: tl.constexpr):
    """Return `number` as the multiple of UNIT that it is (`unit` in tables.py), so that rows that
    far apart are read 16 bytes at a time.
    """
    return number // UNIT * UNIT
