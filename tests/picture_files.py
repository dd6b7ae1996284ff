"""Image files for the tests, made by hand where TensorFlow has no encoder."""
import struct
import zlib

import numpy as np
import tensorflow as tf


def png(rows, bit_depth=8, colour_type=2, size=None, before=b""):
    """rows: the bytes of each line. size: (width, height) to claim. before: chunks to put before the pixels.
    """
    width, height = size or (len(rows[0]) // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type], len(rows))
    head = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def gif(frames, palette, transparent=None, local=False, screen=None):
    """frames: (h, w) arrays of indices below 128, written uncompressed: a clear code before every 100 pixels.
    """
    height, width = frames[0].shape
    colours = bytes(np.array(palette, np.uint8)).ljust(3 * 128, b"\0")
    out = b"GIF89a" + struct.pack("<HH", *(screen or (width, height)))
    out += b"\x00\0\0" if local else b"\xf6\0\0" + colours
    for frame in frames:
        if transparent is not None:
            out += b"\x21\xf9\x04\x01\0\0" + bytes([transparent]) + b"\0"
        out += b"\x21\xfe\x05hello\0"  # a comment
        out += b"\x2c" + struct.pack("<HHHH", 0, 0, width, height)
        out += (b"\x86" + colours if local else b"\x00") + b"\x07"
        pixels = bytes(frame.reshape(-1).astype(np.uint8))
        for start in range(0, len(pixels), 100):
            out += bytes([len(pixels[start:start + 100]) + 1, 128]) + pixels[start:start + 100]
        out += b"\x01\x81\0"
    return out + b"\x3b"


def bmp(image, palette=None, size=None):
    """image: (h, w, 3 or 4), or (h, w) of indices. Lines are filled up to four bytes and go from bottom to
    top.
    """
    height, width = image.shape[:2]
    if palette is None:
        bits, colours, image = 8 * image.shape[2], b"", image[..., [2, 1, 0, 3][:image.shape[2]]]
    else:
        bits, colours = 8, b"".join(bytes([b, g, r, 0]) for r, g, b in palette)
    lines = b"".join(bytes(line).ljust(-(-bits // 8 * width // 4) * 4, b"\0") for line in image[::-1])
    start = 54 + len(colours)
    claimed = size or (width, height)
    return (b"BM" + struct.pack("<IHHI", start + len(lines), 0, 0, start)
            + struct.pack("<IiiHHII", 40, claimed[0], claimed[1], 1, bits, 0, len(lines))
            + struct.pack("<iiII", 0, 0, len(colours) // 4, 0) + colours + lines)


def jpeg(image):
    return tf.io.encode_jpeg(image, quality=98).numpy()


def picture(height, width, seed=0):
    """Smooth colours, which a JPEG keeps."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    return (np.stack([x, y, (x + y + seed % 7 / 7) / 3], -1) * 255).astype(np.uint8)


PALETTE = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 20, 30)]
INDICES = (np.arange(12).reshape(3, 4) % 4).astype(np.uint8)
COLOURED = np.array(PALETTE, np.uint8)[INDICES]
