"""The Triton kernels, a family a file; nothing but these files imports triton, when a kernel first runs.

Here belongs code that runs on the GPU, its launch and its tilings. What decides that it runs belongs in ``backend``.
"""

__all__: list[str] = []
