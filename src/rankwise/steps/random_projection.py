"""Random projections that are drawn again from a seed whenever they are needed, and never stored.

    R (r, d), entries N(0, 1/r), d the smaller dimension of an (m, n) matrix:   E[RᵀR] = I,  E‖RᵀRx − x‖² = (d + 1)/r · ‖x‖²

On the left it is P = Rᵀ (m, r), on the right Q = R (r, n). The entries come from a counter, not from a generator with a
state: entry pair i is a function of (seed, i) alone, 64 bits that are mixed and turned into two normal numbers. So they are
made on the device that needs them, in parallel, and agree on every device and process to the rounding of log, cos and sin:
moments compressed on a GPU can be read back on a CPU, which torch's own generators would not allow.

The mixing is that of Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014; the normal numbers are those
of Box, Muller: A Note on the Generation of Random Normal Deviates, 1958.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from rankwise.steps.projection import Projection, side_of

_WORD = 2**64
_STRIDE, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # constants of the mixing


def derived_seed(seed: int, *names: object) -> int:
    """A seed of 63 bits that depends on a seed and on names: of a layer, of a window, of a purpose."""
    text = "/".join(str(name) for name in (int(seed), *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def projection_of(m: int, n: int, rank: int, seed: int, *, device: torch.device | str, dtype: torch.dtype) -> Projection:
    """The random projection of an (m, n) matrix to `rank`, on its smaller side, entries N(0, 1/rank).

    Args:
        m, n: sizes of the matrix.
        rank: r; may be larger than both.
        seed: what decides the entries. Give every matrix and every window of steps its own: `derived_seed`.
        device, dtype: of the result; it is made there, in at least float32.
    """
    scale = 1.0 / math.sqrt(rank)
    if side_of("std", m, n) == "left":
        return Projection(normals((m, rank), seed, device=device, dtype=dtype, scale=scale), None)
    return Projection(None, normals((rank, n), seed, device=device, dtype=dtype, scale=scale))


def normals(shape: tuple[int, ...], seed: int, *, device: torch.device | str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Independent normal numbers of standard deviation `scale`, the same on every device."""
    count = math.prod(shape)
    pairs = -(-count // 2)
    words = torch.arange(1, pairs + 1, device=device, dtype=torch.int64)  # (pairs,)
    words = _mixed(words.mul_(_signed(_STRIDE)).add_(_signed(_mixed_number(seed))))
    wide = torch.promote_types(dtype, torch.float32)
    upper = (words >> 32).to(wide).add_(2**31 + 0.5).div_(2.0**32)  # in (0, 1]
    lower = (words & 0xFFFFFFFF).to(wide).mul_(2.0 * math.pi / 2.0**32)  # an angle
    radius = upper.log_().mul_(-2.0).sqrt_().mul_(scale)
    drawn = torch.stack((radius * lower.cos(), radius * lower.sin())).reshape(-1)[:count]  # (count,)
    return drawn.reshape(shape).to(dtype)


def _mixed(words: Tensor) -> Tensor:
    """Every word (int64, read as unsigned) replaced by one in which each bit depends on all of its bits; in place."""
    words.bitwise_xor_(_shifted(words, 30)).mul_(_signed(_FIRST))
    words.bitwise_xor_(_shifted(words, 27)).mul_(_signed(_SECOND))
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shifted right as unsigned words are: torch's own shift copies the sign."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mixed_number(number: int) -> int:
    """The same mixing of one Python integer."""
    word = (number + _STRIDE) % _WORD
    word = (word ^ (word >> 30)) * _FIRST % _WORD
    word = (word ^ (word >> 27)) * _SECOND % _WORD
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
