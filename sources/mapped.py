"""Images in a file, read as they are needed, through the memory of the operating system that all processes share."""
import mmap
import os
import stat
import sys
from typing import Any

import numpy as np

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # Python 3.12 names it


def pixels(path: str, number: int, image_size: int) -> np.ndarray:
    """The first `number` images of a file of images alone, uint8 (n, s, s, 3), mapped; fewer where it is too short, none without it.

    What changes them is not written to the file. The file may lose its name meanwhile.
    """
    image = image_size ** 2 * 3
    if os.path.exists(path) and stat.S_ISREG(os.stat(path).st_mode):
        with open(path, "rb") as file:
            number = min(number, os.fstat(file.fileno()).st_size // image)
            if number:  # private and writable, though nobody writes: the form that TensorFlow takes without a copy
                memory = mmap.mmap(file.fileno(), number * image, flags=mmap.MAP_PRIVATE | NO_RESERVE,
                                   prot=mmap.PROT_READ | mmap.PROT_WRITE)
                if hasattr(memory, "madvise"):  # from Python 3.8 on; without it, the system reads 128 kB for each image
                    memory.madvise(mmap.MADV_RANDOM)
                return np.frombuffer(memory, np.uint8).reshape(number, image_size, image_size, 3)
    return np.zeros((0, image_size, image_size, 3), np.uint8)


class Images:
    """Images of a store, uint8 (n, s, s, 3): len() counts them; an index, a slice or indices read them as an array, in memory.

    pixels: all images of the store, mapped: what is used of them comes from the disk through the memory of the operating system, which
    all processes share. rows: int64 (n,), which of them these are.
    """
    dtype = np.dtype(np.uint8)

    def __init__(self, pixels: np.ndarray, rows: np.ndarray) -> None:
        self.pixels, self.rows = pixels, rows
        self.shape = (len(rows),) + pixels.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.array(self.pixels[self.rows[index]])

    def take(self, indices: np.ndarray, axis: int = 0) -> "Images":
        """Some of the images, as NumPy's `take` along the first axis, but without reading them."""
        return Images(self.pixels, self.rows[indices])
