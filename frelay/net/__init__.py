"""The border to the kernel: sockets, name resolution, and how many connections and descriptors a caller may have."""
