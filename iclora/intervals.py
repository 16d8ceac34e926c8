"""95 % intervals of rates that have width where all answers are alike, where resampling has none."""

import math

import numpy as np

Z = 1.959964  # deviations on either side of 95 %


def wilson(values: np.ndarray) -> tuple[float, float]:
    """Give the ends of the interval of a rate, of answers that are 0 or 1.

    Source: Wilson, doi.org/10.1080/01621459.1927.10502953
    """
    count, rate = len(values), float(values.mean())
    centre, width = rate + Z**2 / (2 * count), Z * math.sqrt(rate * (1 - rate) / count + (Z / (2 * count)) ** 2)
    return max(0.0, (centre - width) / (1 + Z**2 / count)), min(1.0, (centre + width) / (1 + Z**2 / count))


def bonett_price(values: np.ndarray) -> tuple[float, float]:
    """Give the ends of the interval of a difference of paired rates: the normal one, with a pair more of +1 and of -1.

    values: differences, -1, 0 or 1
    Source: Bonett and Price, doi.org/10.3102/1076998611411915
    """
    values = np.append(values, (1, -1))
    centre, width = float(values.mean()), Z * float(values.std()) / math.sqrt(len(values))
    return max(-1.0, centre - width), min(1.0, centre + width)
