"""One image file, of whatever origin, to pixels: PNG, JPEG, GIF (its first frame) or BMP. And room for many images.

TensorFlow's decoders do the work. Before they see a file, its header is read here, because a file of a few
kilobytes may claim, and then take, any amount of memory.
"""
import os
import struct
from typing import Tuple

import numpy as np
import tensorflow as tf

FILE_LIMIT = 64 << 20  # bytes
PIXEL_LIMIT = 50000000  # of one image: more than a camera's photograph, and at most 1 GB while it is decoded
ALIGNMENT = 64  # bytes: at multiples of it TensorFlow uses memory as it is, and copies it from elsewhere


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

    Grey becomes RGB; what is transparent is laid over white. The largest square in the middle is taken and
    shrunk by averaging areas, or enlarged bilinearly. The turn that a camera notes in a JPEG (EXIF) is
    ignored.
    Raises Unusable for a file that is no such image, damaged, or beyond the limits above.
    """
    try:
        if os.path.getsize(path) > FILE_LIMIT:
            raise Unusable("larger than %d MB" % (FILE_LIMIT >> 20))
        with open(path, "rb") as file:
            data = file.read(FILE_LIMIT)
        return square(decode(data, image_size), image_size)
    except OSError as error:
        raise Unusable("cannot be read: %s" % error.strerror)


def decode(data: bytes, image_size: int = 0) -> np.ndarray:
    """Decode an image file's content to uint8 (height, width, 3). Raises Unusable.

    A JPEG whose sides are at least 8 times `image_size` comes out smaller by a factor of 2, 4 or 8, but still
    4 times that size: libjpeg averages areas by not decoding their details. With 0 it never does.
    """
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR":
            _check(*struct.unpack_from(">II", data, 16))
            # Asked for alpha where there is none, TensorFlow gives 1-bit images an alpha of 1 in 255.
            transparent = data[25] in (4, 6) or b"tRNS" in data[:data.find(b"IDAT")]
            return _over_white(tf.io.decode_png(data, channels=4 if transparent else 3).numpy())
        if data.startswith(b"\xff\xd8"):
            height, width = _jpeg_size(data)
            _check(width, height)
            ratio = 1
            while image_size and ratio < 8 and min(height, width) >= 8 * ratio * image_size:
                ratio *= 2
            return tf.io.decode_jpeg(data, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE").numpy()
        if data.startswith((b"GIF87a", b"GIF89a")):
            return tf.io.decode_gif(_first_frame(data)).numpy()[0]
        if data.startswith(b"BM"):
            width, height = struct.unpack_from("<ii", data, 18)
            _check(width, abs(height))
            return _bmp_colours(tf.io.decode_bmp(data).numpy(), data)
    except (struct.error, IndexError, tf.errors.OpError):
        raise Unusable("damaged")
    raise Unusable("not a PNG, JPEG, GIF or BMP image")


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


def _check(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise Unusable("damaged")
    if width * height > PIXEL_LIMIT:
        raise Unusable("%d x %d pixels, more than %d million" % (width, height, PIXEL_LIMIT // 1000000))


def _jpeg_size(data: bytes) -> Tuple[int, int]:
    """Height and width from a JPEG's frame header (ITU-T T.81, B.2.2): the segment SOF0 to SOF15."""
    position = 2
    while True:
        marker, length = struct.unpack_from(">HH", data, position)
        if marker == 0xffff:  # a fill byte
            position += 1
        elif 0xffc0 <= marker <= 0xffcf and marker not in (0xffc4, 0xffc8, 0xffcc):  # these three are tables
            return struct.unpack_from(">HH", data, position + 5)
        elif marker < 0xff02 or marker in (0xffd9, 0xffda):  # lost, or at the pixels without a frame header
            raise Unusable("damaged")
        else:
            position += 2 + length


def _first_frame(data: bytes) -> bytes:
    """A GIF of only the first frame of a GIF, whose transparent colour is white (GIF89a specification).

    TensorFlow's decoder would unpack all frames, however many, and its versions differ about transparency.
    """
    position = 13 + _table_size(data[10])  # the header, the screen, its colours
    head, transparent = bytearray(data[:position]), None
    while data[position] == 0x21:  # an extension
        if data[position + 1] == 0xf9 and data[position + 3] & 1:  # graphic control, transparent
            transparent = data[position + 6]
        position = _blocks_end(data, position + 2)
    if data[position] != 0x2c:
        raise Unusable("damaged")
    width, height = struct.unpack_from("<HH", data, position + 5)
    _check(width, height)
    pixels = position + 10 + _table_size(data[position + 9])
    frame = bytearray(data[position:pixels])
    if transparent is not None:
        table, start = (frame, 10) if len(frame) > 10 else (head, 13)
        if start + 3 * transparent + 3 <= len(table):
            table[start + 3 * transparent:start + 3 * transparent + 3] = b"\xff\xff\xff"
    head[6:10] = frame[5:9]  # the screen is as large as the frame
    frame[1:5] = bytes(4)  # which lies at its corner
    return bytes(head + frame) + data[pixels:_blocks_end(data, pixels + 1)] + b"\x3b"


def _table_size(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _blocks_end(data: bytes, position: int) -> int:
    while data[position]:
        position += 1 + data[position]
    return position + 1


def _bmp_colours(image: np.ndarray, data: bytes) -> np.ndarray:
    """RGB of a decoded BMP: TensorFlow leaves indices where there is a palette. A fourth channel is not alpha
    as a rule.
    """
    if image.shape[2] != 1:
        return image[..., :3]
    start, end = 14 + struct.unpack_from("<I", data, 14)[0], struct.unpack_from("<I", data, 10)[0]
    palette = np.zeros((256, 4), np.uint8)
    colours = np.frombuffer(data[start:min(end, start + 1024)], np.uint8)
    palette[:len(colours) // 4] = colours[:len(colours) // 4 * 4].reshape(-1, 4)
    return palette[image[..., 0], 2::-1]  # stored as B, G, R, 0


def _over_white(image: np.ndarray) -> np.ndarray:
    """Lay uint8 RGBA over white; RGB stays as it is."""
    if image.shape[2] == 3:
        return image
    alpha = image[..., 3].astype(np.uint16)
    result = np.empty(image.shape[:2] + (3,), np.uint8)
    for channel in range(3):  # one at a time, for the memory's sake; no product exceeds 255 x 255
        result[..., channel] = (image[..., channel] * alpha + 255 * (255 - alpha) + 127) // 255
    return result
