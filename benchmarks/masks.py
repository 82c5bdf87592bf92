"""Time to draw the masks of 256 images of 14x14 cells: `python benchmarks/masks.py [PICTURE.png]`.

Prints the median milliseconds of every strategy at three ratios; exits with 1 if one is over its limit. A picture shows
eight masks of each strategy, in rows in the order of the table, at the lowest and the highest ratio.
"""

import statistics
import sys
import time

import numpy as np
from PIL import Image

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


def draw(path: str) -> None:
    """Draw masks of every strategy, hidden cells black."""
    keys = sample_keys(0, 0, np.arange(8), stream="mask")
    rows = []
    for strategy in MaskStrategy.kinds.values():
        masks = np.concatenate([strategy(ratio=ratio, cell=CELL)(keys, SIZE) for ratio in (RATIOS[0], RATIOS[-1])])
        tiles = np.where(masks, 0, 255).repeat(6, axis=1).repeat(6, axis=2)
        rows.append(np.concatenate([np.pad(tile, 3, constant_values=128) for tile in tiles], axis=1))
    Image.fromarray(np.concatenate(rows).astype(np.uint8)).save(path)


def main() -> int:
    print("strategy     " + "".join(f"{f'ratio {ratio}':>12}" for ratio in RATIOS) + "       limit   (ms)")
    over = False
    for name, strategy in MaskStrategy.kinds.items():
        times = [median_ms(strategy(ratio=ratio, cell=CELL)) for ratio in RATIOS]
        over |= max(times) > LIMIT_MS[name]
        print(f"{name:<13}" + "".join(f"{ms:12.2f}" for ms in times) + f"{LIMIT_MS[name]:12.0f}")
    for path in sys.argv[1:]:
        draw(path)
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
