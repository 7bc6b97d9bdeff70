"""The kernel pipes through which raw pumps splice, and the pool that keeps empty ones."""

from __future__ import annotations

import fcntl
import os
from typing import Final

__all__ = ["Pipe", "PipePool"]

# Twice a typical socket buffer's worth, and the most that an unprivileged process may ask for by default
# (fs.pipe-max-size). Splice moves whole pages, so a pipe of this size never limits a step.
_PIPE_SIZE: Final = 1024 * 1024
# How many empty pipes are kept for the next transfer. Each holds two descriptors; bulk transfers come in bursts.
_POOLED_PIPES: Final = 32
_F_SETPIPE_SZ: Final = 1031


class Pipe:
    """A kernel pipe: two descriptors and the size it was granted."""

    __slots__ = ("read_end", "size", "write_end")

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.size = fcntl.fcntl(self.write_end, _F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:
            # Over the user's soft limit (fs.pipe-user-pages-soft) the pipe keeps its default size, and still works.
            self.size = 65536

    def close(self) -> None:
        """Close both ends."""
        os.close(self.read_end)
        os.close(self.write_end)


class PipePool:
    """Empty pipes for the next bulk transfers; raw pumps take them and give them back."""

    def __init__(self, *, capacity: int = 4096) -> None:
        self._free: list[Pipe] = []
        self.in_use = 0
        self._capacity = capacity

    @property
    def descriptors(self) -> int:
        """How many descriptors all pipes, used and free, hold."""
        return 2 * (self.in_use + len(self._free))

    def limit(self, capacity: int) -> None:
        """Allow at most ``capacity`` pipes from now on. A pipe in use beyond that is closed when it is given back."""
        self._capacity = capacity
        while self._free and self.in_use + len(self._free) > capacity:
            self._free.pop().close()

    def take(self) -> Pipe | None:
        """An empty pipe; None if there are ``capacity`` pipes in use, or no descriptor is left."""
        if self._free:
            pipe = self._free.pop()
        elif self.in_use >= self._capacity:
            return None
        else:
            try:
                pipe = Pipe()
            except OSError:
                return None
        self.in_use += 1
        return pipe

    def give(self, pipe: Pipe, *, is_empty: bool) -> None:
        """Take ``pipe`` back. One that is not empty is closed, or its next user would deliver the bytes of another."""
        self.in_use -= 1
        has_room = len(self._free) < _POOLED_PIPES and self.in_use + len(self._free) < self._capacity
        if is_empty and has_room:
            self._free.append(pipe)
        else:
            pipe.close()

    def close(self) -> None:
        """Close the free pipes."""
        while self._free:
            self._free.pop().close()
