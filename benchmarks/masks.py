"""Time to draw the masks of 256 images of 14x14 cells: `python benchmarks/masks.py`.

Prints the median milliseconds of every strategy at three ratios; exits with 1 if one is over its limit.
"""

import statistics
import sys
import time

import numpy as np

from simmim.method.masks import MaskStrategy
from simmim.method.random_keys import sample_keys

IMAGES, CELL, SIZE = 256, 16, (224, 224)
RATIOS = (0.6, 0.75, 0.9)
REPEATS = 50
LIMIT_MS = dict.fromkeys(MaskStrategy.kinds, 20.0) | {"random": 2.0}


def median_ms(strategy: MaskStrategy) -> float:
    """Median milliseconds of one batch of masks, keys included, over epochs so that no two batches are alike."""
    times = []
    for epoch in range(REPEATS):
        start = time.perf_counter()
        strategy(sample_keys(0, epoch, np.arange(IMAGES), stream="mask"), SIZE)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> int:
    print("strategy " + "".join(f"{f'ratio {ratio}':>12}" for ratio in RATIOS) + "       limit   (ms)")
    over = False
    for name, strategy in MaskStrategy.kinds.items():
        times = [median_ms(strategy(ratio=ratio, cell=CELL)) for ratio in RATIOS]
        over |= max(times) > LIMIT_MS[name]
        print(f"{name:<9}" + "".join(f"{ms:12.2f}" for ms in times) + f"{LIMIT_MS[name]:12.0f}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
