"""Weights of pitch classes, from the tonic on, learnt by tools/fit_labels.py from 432 pieces."""

from typing import Final

MAJOR: Final = (
    22.862,
    -2.581,
    8.324,
    -6.303,
    16.046,
    9.616,
    -7.191,
    24.377,
    -0.174,
    12.554,
    -5.115,
    7.584,
)
MINOR: Final = (
    30.640,
    -13.244,
    5.522,
    15.633,
    -0.390,
    6.721,
    -2.018,
    22.527,
    11.393,
    -6.360,
    2.950,
    6.466,
)
MINOR_BIAS: Final = 0.858
