"""One image file, of whatever origin, to pixels, by Pillow. And room for many images."""
import io
import itertools
import logging
import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterable, Iterator

import numpy as np
import PIL
import tensorflow as tf
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

FILE_LIMIT = 64 << 20  # bytes
PIXEL_LIMIT = 50000000  # of one image: more than a camera's photograph, and at most 1 GB while it is decoded
THREADS = min(8, os.cpu_count() or 1)  # eight images of the largest size take up to 8 GB
WAITING = 128 << 20  # bytes of decoded images that may wait in memory
ALIGNMENT = 64  # bytes: at multiples of it TensorFlow uses memory as it is, and copies it from elsewhere
_PILLOW = [int(part) for part in PIL.__version__.split(".")[:2]]
# Of the many that Pillow knows. Its WebP could be made to run code (CVE-2023-4863) before 10.0.1.
FORMATS = ["JPEG", "PNG", "GIF", "BMP", "TIFF"] + ["WEBP"] * (_PILLOW >= [10, 1]) + ["AVIF"] * (_PILLOW >= [11, 3])
ORIENTATION, TILE_WIDTH, TILE_LENGTH = 0x0112, 0x0142, 0x0143  # tags of EXIF and TIFF

# What Pillow has to say about odd files: they are read, or skipped by name.
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class Unusable(Exception):
    """Why a file cannot be used, in a few words."""


def empty(number: int, image_size: int) -> np.ndarray:
    """Room for images, uint8 (number, image_size, image_size, 3), that a tensor can share.

    >>> empty(5, 7).ctypes.data % ALIGNMENT, empty(5, 7).shape
    (0, (5, 7, 7, 3))
    """
    size = number * image_size ** 2 * 3
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start:start + size].reshape(number, image_size, image_size, 3)


def load(path: str, image_size: int) -> np.ndarray:
    """Read an image file as uint8 (image_size, image_size, 3).

    The image is as `decode` gives it. The largest square in the middle is taken and shrunk by averaging areas, or enlarged bilinearly.
    Raises Unusable for what is no file, no such image, damaged, or beyond the limits above.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe, from which reading would wait for ever, or a device
            raise Unusable("no regular file")
        if status.st_size > FILE_LIMIT:
            raise Unusable("larger than %d MB" % (FILE_LIMIT >> 20))
        with open(path, "rb") as file:
            data = file.read(FILE_LIMIT)
    except OSError as error:
        raise Unusable("cannot be read: %s" % error.strerror)
    return square(decode(data, image_size), image_size)


def decode(data: bytes, image_size: int = 0) -> np.ndarray:
    """Decode an image file's content, in one of FORMATS, to uint8 (height, width, 3). Raises Unusable.

    The image is turned as the camera noted (EXIF). Grey becomes RGB, 16 bits become 8; what is transparent is laid over white; of an
    animation it is the first frame. A JPEG whose sides are at least 8 times `image_size` comes out smaller by a factor of 2, 4 or 8,
    but still 4 times that size: libjpeg averages areas by not decoding their details. With 0 it never does.
    """
    many = "more than %d million pixels" % (PIXEL_LIMIT // 1000000)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        tags = getattr(image, "tag_v2", {})  # a TIFF's tile can be larger than the image, and is decoded whole
        for width, height in (image.size, (tags.get(TILE_WIDTH, 0), tags.get(TILE_LENGTH, 0))):
            if width * height > PIXEL_LIMIT:
                raise Unusable("%s: %d x %d" % (many, width, height))
        if image.format == "TIFF" and image.mode in ("I", "F"):
            raise Unusable("its pixels are numbers of no known range")
        pixels = _rgb(_upright(_loaded(image, image_size)))
        if not pixels.size:  # a GIF's frame may be of no width
            raise Unusable("damaged")
        return pixels
    except Unusable:
        raise
    except UnidentifiedImageError:
        raise Unusable("not a readable %s or %s image" % (", ".join(FORMATS[:-1]), FORMATS[-1]))
    except Image.DecompressionBombError:
        raise Unusable(many)
    except MemoryError:
        raise Unusable("it takes more memory than there is")
    except Exception:  # a damaged file makes Pillow stumble over anything
        raise Unusable("damaged")


def _loaded(image: ImageFile.ImageFile, image_size: int) -> Image.Image:
    """Read the pixels, and do what Pillow leaves undone."""
    if image_size:
        image.draft(None, (4 * image_size, 4 * image_size))
    tile = image.tile[0] if image.tile else None
    if image.format == "PNG" and tile and "transparency" in image.info:  # a colour, still in as many bits as the file has
        colour = image.info["transparency"]
        if tile[3] in ("L;2", "L;4"):
            image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[tile[3]]
        elif tile[3] == "RGB;16B":
            image.info["transparency"] = tuple(part >> 8 for part in colour)
    image.load()
    if image.format == "GIF" and tile:
        return image.crop(tile[1])  # the frame, without the rest of its screen
    return image.convert("RGB") if image.format == "BMP" else image  # whose alpha is as a rule not set


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) != 1  # a TIFF comes turned
    except Exception:  # damaged, but the pixels are good
        return image
    # exif_transpose would also write the note anew, which fails where any of it is odd, if it were still there.
    image.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return ImageOps.exif_transpose(image) if turned else image


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip
        grey = np.asarray(image)
        grey = np.where(grey == image.info.get("transparency"), 255, grey >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, 2)
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return np.asarray(white)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def square(image: np.ndarray, image_size: int) -> np.ndarray:
    """Cut the largest square out of the middle of a uint8 image (h, w, 3) and bring it to `image_size`."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top:top + side, left:left + side]
    if side == image_size:
        return image
    resized = tf.image.resize(image, (image_size, image_size), "area" if side > image_size else "bilinear")
    return np.clip(np.round(resized.numpy()), 0, 255).astype(np.uint8)


def several_at_once(function: Callable[[Any], Any], items: Iterable[Any], image_size: int) -> Iterator[Any]:
    """`function` of each item, in order, by threads. As many items are under way as images of this size may wait in memory.

    >>> list(several_at_once(lambda i: i ** 2, range(5), 32))
    [0, 1, 4, 9, 16]
    """
    together, items = max(4 * THREADS, min(1024, WAITING // (3 * image_size ** 2))), iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        while True:
            group = list(itertools.islice(items, together))
            if not group:
                return
            yield from list(pool.map(function, group))
