"""The compiled PTX of the kernels, executed on a CPU."""
