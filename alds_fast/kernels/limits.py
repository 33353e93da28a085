"""What the fused kernels take, and how they multiply float32: all that is known of them without triton."""

import torch

MAX_HIDDEN = 256  # groups * rank that fit on chip and pay: 512 took 2.4 times dense, 4096 x 4096 with 2048 rows (H200)
MAX_ROWS = 16  # rows of x that the kernels for few rows take
MAX_MERGED = 3  # layers that share one encoder launch


def precision() -> str:
    """How float32 products are computed: "tf32" where ``torch.backends.cuda.matmul`` asks for it, else "ieee"."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
