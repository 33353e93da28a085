"""What the fused kernels take, and how they multiply float32: all that is known of them without triton."""

from collections.abc import Sequence
from typing import Any

import torch

MAX_HIDDEN = 256  # groups * rank that fit on chip and pay: 512 took 2.4 times dense, 4096 x 4096 with 2048 rows (H200)
MAX_ROWS = 16  # rows of x that the kernels for few rows take
MAX_MERGED = 3  # layers that share one encoder launch
LEAST_SAVED = 0.12  # share of the products' time that fusing must save: below it 10 rows of an H200 gave .33 to 1.06
TILE = 64  # pixels that a walk down the image takes at once: a row of one image, or of several
MAX_WALK = (64, 32, 64)  # channels, rank and filters of a walk down the image: all factors stay on chip
_FLOPS_PER_CLOCK = {(8, 0): 2048, (9, 0): 4096}  # of a multiprocessor, half types, by compute capability


def most_saved(properties: Any, inputs: int, outputs: int) -> float | None:
    """What fusing saves at most, as a share of the products' time; None for devices whose speed is not known.

    Hidden values need not be written and read: 4 bytes for each, beside 2 (inputs + outputs) operations; ``inputs`` are
    those of a hidden value, taps times channels of a slice, and ``outputs`` taps of the decoder times filters.
    ``properties`` are the device's, clocks in kHz, bits of the memory's bus.

    >>> from types import SimpleNamespace as Device
    >>> h200 = Device(major=9, minor=0, multi_processor_count=132, clock_rate=1980000, memory_clock_rate=3125000,
    ...               memory_bus_width=6144)
    >>> f"{most_saved(h200, 9 * 64, 64):.2f} {most_saved(h200, 9 * 512, 512):.2f}"
    '0.70 0.09'
    """
    per_clock = None if properties is None else _FLOPS_PER_CLOCK.get((properties.major, properties.minor))
    if per_clock is None:
        return None
    flops = per_clock * properties.multi_processor_count * properties.clock_rate
    bandwidth = 2 * properties.memory_clock_rate * properties.memory_bus_width / 8
    return 2 * flops / bandwidth / (inputs + outputs)


def why_no_walk(
    width: int, dtype: torch.dtype, encoder: Sequence[int], decoder: Sequence[int], groups: int,
    options: Sequence[Sequence[int]],
) -> str | None:  # fmt: skip
    """Why no kernel walks down images of that width, by the shapes of 1 x 1 encoders and larger decoders.

    ``options``: stride, padding and dilation. None if one does.

    >>> why_no_walk(56, torch.float16, (48, 64, 1, 1), (64, 48, 3, 3), 1, ((1, 1), (1, 1), (1, 1)))
    'the rank is 48, a 3 x 3 decoder takes 16 and 32'
    """
    stride, padding, dilation = (tuple(pair) for pair in options)
    if groups > 1:
        return f"there are {groups} channel slices, a 3 x 3 decoder takes 1"
    for name, value, wanted in (
        ("kernel", tuple(decoder[2:]), (3, 3)), ("stride", stride, (1, 1)), ("padding", padding, (1, 1)),
        ("dilation", dilation, (1, 1)),
    ):  # fmt: skip
        if value != wanted:
            return f"the decoder has {name} {value}, the kernel of scheme 3 takes {wanted}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"x is {dtype}, a 3 x 3 decoder takes float16 and bfloat16"
    sizes = zip(("channels are", "rank is", "filters are"), (encoder[1], encoder[0], decoder[0]), MAX_WALK, strict=True)
    for name, size, most in sizes:
        if size % 16 or size > most:
            taken = " and ".join(filter(None, (", ".join(map(str, range(16, most, 16))), str(most))))
            return f"the {name} {size}, a 3 x 3 decoder takes {taken}"
    return None if width <= TILE else f"images are {width} wide, a 3 x 3 decoder takes up to {TILE}"


def precision() -> str:
    """How float32 products are computed: "tf32" where ``torch.backends.cuda.matmul`` asks for it, else "ieee"."""
    asked: str = torch._C._get_fp32_precision_getter(
        "cuda", "matmul"
    )  # as the attribute does, in a quarter of its time
    return "tf32" if asked == "tf32" else "ieee"
