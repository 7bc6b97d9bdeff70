"""Waits until the *content* of a configuration's files has changed, in whatever way it was changed.

Files change in many ways: an editor writes in place or renames a new file over the old one, a tool deletes and
recreates, Kubernetes swaps the ``..data`` symlink that the files of a ConfigMap lead through. A watch on a file follows
its inode, and so misses most of these. The rules here:

1. *Directories* are watched, never files: all directories in which the path of a file is looked up, along all of its
   symlinks. If a part of a path is missing, the nearest existing directory above it is watched until the part appears.
2. Events only say when to take a snapshot of the files. What counts is the SHA-256 of each file, compared with the last
   known one: a touch, a rewrite of the same bytes, and a change of another file are no change. A missing file counts as
   one more content.
3. A change is reported once it has lasted for ``settle`` seconds, so that a writer of several steps is done by then.
4. A watch on a directory follows its inode, too. If a directory was replaced, or a symlink leads elsewhere, all
   directories are found and watched anew.
5. A change between a snapshot and the start of the watches would be lost. So there is always a snapshot *after* the
   watches are known to be in place. For the same reason the known content is kept between waits, and a wait begins with
   a snapshot: a change while nobody waits is found by the next wait.
6. Events can be missing altogether (network file systems, no inotify instance left). So there is a snapshot every
   ``recheck`` seconds even without an event; :attr:`Watcher.fault` says when there are no events at all.

This is a class and not an async generator, since it has a nursery inside, and a generator could stay suspended in it
(PEP 789). Nothing outlives :meth:`Watcher.wait_changed`: no task, no thread, no inotify instance.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio
from watchfiles import awatch

from frelay.config.load import route_files

__all__ = ["Watcher"]

# Of watchfiles, in milliseconds. A cancelled wait ends after one step, in the worst case after one timeout.
_STEP: Final = 50
_DEBOUNCE: Final = 200  # it only bundles the events of one write: ``settle`` decides when a change is reported
_RUST_TIMEOUT: Final = 300

_MAX_SYMLINKS: Final = 40  # MAXSYMLINKS of Linux
_NOTHING: Final = "nothing"  # stands for the content of a missing file, and of a directory itself


class Watcher:
    """Reports changes in the content of files; only one task at a time may wait.

    ``files`` is called before each snapshot and returns the paths to watch. A directory among them (or a path that may
    become one) stands for the route files in it. After the first wait or mark, a path that was not named before counts
    as changed: it may have changed since it was loaded.

    The known content is that of the last :meth:`wait_changed` or :meth:`mark`. So load the files *after* one of them,
    and no change is lost: a change in between is loaded, and the next wait reports it once more. At the start::

        config = load(path)                                 # to learn the files
        watcher = Watcher(lambda: relay.config.watched_files)
        await watcher.mark()
        config = load(path)                                 # this one runs
        while True:
            changed = await watcher.wait_changed()
            ...

    Args:
        files: gives the paths to watch, absolute.
        settle: seconds that a change must last before it is reported.
        recheck: seconds between two snapshots without an event.
    """

    def __init__(self, files: Callable[[], Collection[Path]], *, settle: float = 0.25, recheck: float = 5.0) -> None:
        self._files = files
        self._settle = settle
        self._recheck = recheck
        self._known: Mapping[Path, str] | None = None
        self._snapshot_lock = trio.Lock()
        self._is_waiting = False
        self._is_armed = False
        self._fault: str | None = None

    @property
    def is_armed(self) -> bool:
        """Whether a task waits and file events arrive; otherwise a change is found ``recheck`` seconds later."""
        return self._is_armed

    @property
    def fault(self) -> str | None:
        """Why there are no file events, or None. Without events the files are compared every ``recheck`` seconds."""
        return self._fault

    async def mark(self) -> None:
        """Make the present content the known one. Call it before a load that does not follow a :meth:`wait_changed`."""
        async with self._snapshot_lock:
            self._known = (await _in_thread(_take_snapshot, tuple(self._files()))).contents

    async def wait_changed(self) -> frozenset[Path]:
        """Wait for a change, and return the files whose content differs from the known one.

        Without an earlier wait or :meth:`mark`, the known content is that of the first snapshot. Cancellation leaves
        the known content as it was, so the next wait reports a change that this one has not.
        """
        if self._is_waiting:
            raise trio.BusyResourceError("another task is already waiting for changes")
        self._is_waiting = True
        try:
            if self._known is None:
                await self.mark()
            settling = _Settling(self._settle)
            while True:
                found = await self._watch(settling)
                if found is not None:
                    # Only here: from here to the caller there is no checkpoint, so a cancellation cannot lose it.
                    self._known = found.contents
                    return found.changed
        finally:
            self._is_waiting = False

    async def _watch(self, settling: _Settling) -> _Found | None:
        """Wait for a change with one set of watches; None if the watches must be set up again."""
        watched = (await _in_thread(_take_snapshot, tuple(self._files()))).watched
        wake, woken = trio.open_memory_channel[None](1)
        stop = trio.Event()
        found: _Found | None = None
        async with trio.open_nursery() as nursery:
            try:
                nursery.start_soon(self._listen, watched, wake, stop)
                found = await self._poll_until_changed(watched, woken, settling)
                nursery.cancel_scope.cancel(reason="the wait for a changed file is over")
            finally:
                stop.set()  # ends the thread in watchfiles within one step, cancelled or not
        return found

    async def _poll_until_changed(
        self, watched: _Watched, woken: trio.MemoryReceiveChannel[None], settling: _Settling
    ) -> _Found | None:
        while True:
            async with self._snapshot_lock:
                paths = tuple(self._files())
                seen = await _in_thread(_take_snapshot, paths)
                changed = _changed(self._known or {}, seen.contents, paths)
                left = settling.seconds_left(seen.contents)
            if changed and left <= 0:
                return _Found(changed, seen.contents)
            if seen.watched != watched:
                return None
            with trio.move_on_after(left if changed else self._recheck):
                await woken.receive()

    async def _listen(self, watched: _Watched, wake: trio.MemorySendChannel[None], stop: trio.Event) -> None:
        """Wake the poll at each event that may concern the files, and once when the watches are in place."""

        def wake_once() -> None:
            with suppress(trio.WouldBlock):  # a wake-up is pending already
                wake.send_nowait(None)

        while not stop.is_set():
            try:
                await self._pass_on(watched, wake_once, stop)
            except FileNotFoundError:
                # A directory vanished before it could be watched: wake the poll, which finds other directories.
                wake_once()
                await trio.sleep(_RUST_TIMEOUT / 1000)
            except Exception as error:
                # watchfiles or the kernel failed in another way, for example no inotify instance is left. The relay
                # goes on without events.
                self._fault = f"{type(error).__name__}: {error}"
                wake_once()
                await trio.sleep(self._recheck)
            finally:
                self._is_armed = False

    async def _pass_on(self, watched: _Watched, wake_once: Callable[[], None], stop: trio.Event) -> None:
        watching = awatch(
            *watched.directories,
            watch_filter=None,  # with a filter a batch may yield nothing, but we need the first yield
            debounce=_DEBOUNCE,
            step=_STEP,
            stop_event=stop,
            rust_timeout=_RUST_TIMEOUT,
            yield_on_timeout=True,
            recursive=False,
            ignore_permission_denied=True,
        )
        async with aclosing(watching) as batches:
            async for batch in batches:
                paths = [path for _, path in batch]
                if not self._is_armed or any(watched.concerns(path) for path in paths):
                    wake_once()
                self._is_armed = True  # the first yield, even that of a timeout, proves that the watch is in place
                self._fault = None
                if not watched.directories.keys().isdisjoint(paths):
                    return  # a directory itself was deleted or moved, and its watch with it


class _Settling:
    """Measures how long the content has stayed the same."""

    def __init__(self, settle: float) -> None:
        self._settle = settle
        self._contents: Mapping[Path, str] | None = None
        self._since = 0.0

    def seconds_left(self, contents: Mapping[Path, str]) -> float:
        """Seconds until ``contents``, which was just read, counts as settled; 0 or less if it does."""
        now = trio.current_time()
        if contents != self._contents:
            self._contents, self._since = contents, now
        return self._since + self._settle - now


# --- snapshots of the files; taken in a thread, since disks can be slow --------------------------------------------


@dataclass(frozen=True, slots=True)
class _Watched:
    """Where the files are looked up: the directories with their inodes, and the names in them that matter."""

    directories: Mapping[str, tuple[int, int]]
    names: frozenset[str]
    route_directories: frozenset[str]

    def concerns(self, path: str) -> bool:
        """Whether an event at ``path`` may concern the files."""
        directory, name = os.path.split(path)
        return (
            name in self.names
            or path in self.directories
            or (name.endswith(".toml") and directory in self.route_directories)
        )


@dataclass(frozen=True, slots=True)
class _Found:
    changed: frozenset[Path]
    contents: Mapping[Path, str]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    contents: Mapping[Path, str]
    watched: _Watched


async def _in_thread(function: Callable[[tuple[Path, ...]], _Snapshot], paths: tuple[Path, ...]) -> _Snapshot:
    # It only reads, so it can be abandoned: a dead network disk must not delay the end of the relay.
    return await trio.to_thread.run_sync(function, paths, abandon_on_cancel=True)


def _take_snapshot(paths: tuple[Path, ...]) -> _Snapshot:
    walk = _PathWalk()
    contents: dict[Path, str] = {}
    for path in paths:
        walk.follow(path)
        if path.is_dir():
            walk.add_route_directory(path)
            contents[path] = _NOTHING
            with suppress(OSError):
                for file in route_files(path):
                    walk.follow(file)
                    contents[file] = _content(file)
        else:
            contents[path] = _content(path)
    return _Snapshot(contents, walk.watched())


def _changed(known: Mapping[Path, str], found: Mapping[Path, str], paths: Iterable[Path]) -> frozenset[Path]:
    changed = {path for path, content in found.items() if known.get(path, _NOTHING) != content}
    listed = set(paths)
    for path in known.keys() - found.keys():
        # It was deleted from a directory that is still watched. A path that is no longer watched is no change.
        if known[path] != _NOTHING and path.parent in listed:
            changed.add(path)
    return frozenset(changed)


def _content(path: Path) -> str:
    """A text that stands for the content of a file: its digest, or why it has none."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return "special"
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return _NOTHING
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "unreadable")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(
        path, flags | os.O_NONBLOCK | os.O_NOCTTY
    )  # without O_NONBLOCK, open(2) of a FIFO would wait for its other end


class _PathWalk:
    """Collects the directories in which paths are looked up, along their symlinks."""

    def __init__(self) -> None:
        self._directories: dict[str, tuple[int, int]] = {}
        self._names: set[str] = set()
        self._route_directories: set[str] = set()

    def watched(self) -> _Watched:
        return _Watched(self._directories, frozenset(self._names), frozenset(self._route_directories))

    def add_route_directory(self, directory: Path) -> None:
        real = os.path.realpath(directory)
        self._add(real)
        self._route_directories.add(real)

    def follow(self, path: Path) -> None:
        """Walk ``path`` as the kernel does, and record where each symlink and the file itself is looked up."""
        here = "/"
        steps = list(reversed(path.absolute().parts[1:]))
        symlinks = 0
        while steps:
            step = steps.pop()
            if step == "..":
                here = os.path.dirname(here)
                continue
            place = os.path.join(here, step)
            try:
                is_symlink = stat.S_ISLNK(os.lstat(place).st_mode)
                target = os.readlink(place) if is_symlink else ""
            except OSError:
                self._add(here, step)  # the path ends here; the missing part may appear in this directory
                return
            if is_symlink:
                self._add(here, step)
                symlinks += 1
                if symlinks > _MAX_SYMLINKS:
                    return
                here = "/" if target.startswith("/") else here
                steps += [part for part in reversed(target.split("/")) if part not in ("", ".")]
            elif steps:
                here = place
            else:
                self._add(here, step)

    def _add(self, directory: str, name: str | None = None) -> None:
        try:
            found = os.stat(directory)
        except OSError:
            return
        if not stat.S_ISDIR(found.st_mode):
            # The path needs a directory here, but this is a file: watch the file itself.
            directory, name = os.path.split(directory)
            self._add(directory, name)
            return
        self._directories[directory] = (found.st_dev, found.st_ino)
        if name is not None:
            self._names.add(name)
