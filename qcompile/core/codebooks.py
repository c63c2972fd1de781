"""Tables of values: the formats that no formula describes."""

from __future__ import annotations

# QLoRA (Dettmers et al. 2023), appendix E: quantiles of a normal distribution with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# bitsandbytes' FP4: E2M1 whose odd subnormal is 0.0625 instead of 0.5, over 12. Not OCP's E2M1, which is the format "e2m1".
_FP4_MAGNITUDES = tuple(v / 12 for v in (0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
BNB_FP4 = (*(-v for v in reversed(_FP4_MAGNITUDES)), 0.0, *_FP4_MAGNITUDES)
