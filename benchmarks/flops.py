"""How much arithmetic a train step is, in FLOP, 2 for a multiply-add, counted from the shapes of the kernels.

That is what convolutions and matrix products do; BatchNorm, ReLU, additions and the optimiser are not counted.
"""
from typing import Any


def convolution(layer: Any, side: int) -> int:
    """Of one image, by a convolution that gives side x side pixels."""
    return 2 * side * side * layer.kernel.shape.num_elements()


def dense(head: Any) -> int:
    """Of one image, by a ProjectionHead."""
    return sum(2 * layer.kernel.shape.num_elements() for layer in (head.hidden, head.output_layer))


def forward(encoder: Any, image_size: int = 32) -> int:
    """Of one image, by an encoder (models.ResNet) in one direction: 1.1108e9 for ResNet-18 at 32 x 32."""
    side = -(-image_size // encoder.stem_conv.strides[0])  # of what a convolution gives; 'same' padding
    total = convolution(encoder.stem_conv, side)
    side = -(-side // 2) if encoder.stem == "imagenet" else side  # the max-pool
    for block in encoder.blocks:
        for number in range(1, block.convolutions + 1):
            layer = getattr(block, "conv%d" % number)
            side = -(-side // layer.strides[0])
            total += convolution(layer, side)
        if block.project:
            total += convolution(block.shortcut_conv, side)
    return total


def step(f: Any, g: Any, q: Any, image_size: int = 32) -> int:
    """Of one image of the batch, by a train step: 8.883e9 for ResNet-18 at 32 x 32, 8 x 1.1108e9 but for 0.04 %.

    Two views, each forward (1) and backward (2: with respect to inputs and to kernels) through the online f, g and q, and
    forward (1) through the target's f and g. The stem has no gradient with respect to its inputs, the images.
    """
    networks = forward(f, image_size) + dense(g)
    return 2 * (3 * (networks + dense(q)) - convolution(f.stem_conv, -(-image_size // f.stem_conv.strides[0])) + networks)
