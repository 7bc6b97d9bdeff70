"""The border to the kernel: sockets, names, descriptors, and who may hold how many of them."""
