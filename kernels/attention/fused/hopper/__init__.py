"""The same kernels written for Hopper's asynchronous units, in Gluon, Triton's lower level."""
