"""Speed on GPUs, and what their compiler says of the kernels."""
