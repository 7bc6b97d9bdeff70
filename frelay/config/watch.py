"""Waits until the *content* of a configuration's files has changed, however that came about.

Files change in many ways: an editor writes in place or renames a new file over the old one, a tool deletes and
recreates, Kubernetes swaps the ``..data`` symlink that a ConfigMap's files lead through. Watching a file follows its
inode and so misses most of these. The rules here:

1. *Directories* are watched, never files: those in which the path of each file is looked up, along all of its
   symlinks. Where a part of a path is missing, the nearest directory above it is watched, so that it may come (back).
2. Events only say when to look. What counts is a SHA-256 of each file, compared with the last known one: a touch, a
   rewrite of the same bytes, an unrelated file are no change. A missing file is a content like any other.
3. A change is reported once it has lasted for ``settle`` seconds, so that a quick writer is seen when it is done.
4. Watches follow inodes too. If the ground shifts (a directory was replaced, a symlink leads elsewhere), it is
   surveyed and watched anew.
5. Between arming a watch and the first look there must be no gap, or a change in it would be lost: so there is always
   a look *after* the watch is known to be armed. For the same reason the known content is kept between waits, and a
   wait begins with a look: what happens while nobody waits is found by the next wait.
6. Events can be missed altogether (network file systems, no inotify instance left). So there is a look every
   ``recheck`` seconds even without one; :attr:`Watcher.fault` says when that is all there is.

A class and not an async generator, as there is a nursery inside, and a generator could be left suspended in it
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
_DEBOUNCE: Final = 200  # our own settling decides; this only bundles the events of one write
_RUST_TIMEOUT: Final = 300

_MAX_SYMLINKS: Final = 40  # MAXSYMLINKS of Linux
_NOTHING: Final = "nothing"  # the content of a file that is not there, and of a directory as such


class Watcher:
    """Reports changes in the content of files; in one task at a time.

    ``files`` is asked before each look for the paths to watch. A directory among them (or a path that may become one)
    stands for the route files in it. A path that it names for the first time, after the first wait or mark, counts as
    changed: nobody knows whether it held the same when it was loaded.

    The known content is what the last :meth:`wait_changed` or :meth:`mark` has seen. So whoever loads *after* either
    of them loses nothing: a change in between is loaded, and reported once more by the next wait. At the start::

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
        recheck: seconds between two looks where no event asks for one.
    """

    def __init__(self, files: Callable[[], Collection[Path]], *, settle: float = 0.25, recheck: float = 5.0) -> None:
        self._files = files
        self._settle = settle
        self._recheck = recheck
        self._known: Mapping[Path, str] | None = None
        self._looking = trio.Lock()
        self._is_waiting = False
        self._is_armed = False
        self._fault: str | None = None

    @property
    def is_armed(self) -> bool:
        """Whether a task waits and file events are arriving; else a change is found at the next look."""
        return self._is_armed

    @property
    def fault(self) -> str | None:
        """Why file events are not available, or None; until they are again, files are compared every ``recheck``."""
        return self._fault

    async def mark(self) -> None:
        """Take the content as it is now for known; to be called before a load that no :meth:`wait_changed` caused."""
        async with self._looking:
            self._known = (await _in_thread(_look, tuple(self._files()))).contents

    async def wait_changed(self) -> frozenset[Path]:
        """Wait for a change, and return the files whose content is another one than the last known.

        Without an earlier wait or :meth:`mark`, what the files hold at the first look is the known content.
        Cancellation leaves the known content as it was: a change under way is reported by the next wait.
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
                    # Only here, where no cancellation can come between this and the caller.
                    self._known = found.contents
                    return found.changed
        finally:
            self._is_waiting = False

    async def _watch(self, settling: _Settling) -> _Found | None:
        """Wait for a change with one set of watches; None if they have to be set anew."""
        ground = (await _in_thread(_look, tuple(self._files()))).ground
        ring, bell = trio.open_memory_channel[None](1)
        stop = trio.Event()
        found: _Found | None = None
        async with trio.open_nursery() as nursery:
            try:
                nursery.start_soon(self._listen, ground, ring, stop)
                found = await self._look_until_changed(ground, bell, settling)
                nursery.cancel_scope.cancel(reason="the wait for a changed file is over")
            finally:
                stop.set()  # ends the thread in watchfiles within one step, cancelled or not
        return found

    async def _look_until_changed(
        self, ground: _Ground, bell: trio.MemoryReceiveChannel[None], settling: _Settling
    ) -> _Found | None:
        while True:
            async with self._looking:
                paths = tuple(self._files())
                seen = await _in_thread(_look, paths)
                changed = _changed(self._known or {}, seen.contents, paths)
                left = settling.seconds_left(seen.contents)
            if changed and left <= 0:
                return _Found(changed, seen.contents)
            if seen.ground != ground:
                return None
            with trio.move_on_after(left if changed else self._recheck):
                await bell.receive()

    async def _listen(self, ground: _Ground, ring: trio.MemorySendChannel[None], stop: trio.Event) -> None:
        """Ring for every event that may concern the files, and once as soon as events are sure to arrive."""

        def ring_once() -> None:
            with suppress(trio.WouldBlock):  # it rings already
                ring.send_nowait(None)

        while not stop.is_set():
            try:
                await self._pass_on(ground, ring_once, stop)
            except FileNotFoundError:
                # A directory vanished before it could be watched: the look that this rings for will find new ground.
                ring_once()
                await trio.sleep(_RUST_TIMEOUT / 1000)
            except Exception as error:
                # Whatever else watchfiles or the kernel cannot do, as when no inotify instance is left: a relay goes
                # on without it.
                self._fault = f"{type(error).__name__}: {error}"
                ring_once()
                await trio.sleep(self._recheck)
            finally:
                self._is_armed = False

    async def _pass_on(self, ground: _Ground, ring_once: Callable[[], None], stop: trio.Event) -> None:
        watching = awatch(
            *ground.directories,
            watch_filter=None,  # a batch that is filtered away yields nothing, and we need the first yield
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
                if not self._is_armed or any(ground.concerns(path) for path in paths):
                    ring_once()
                self._is_armed = True  # only a yield, if after a timeout, tells that the watch is in place
                self._fault = None
                if not ground.directories.keys().isdisjoint(paths):
                    return  # a directory itself was deleted or moved, and its watch with it


class _Settling:
    """How long the same content has been there."""

    def __init__(self, settle: float) -> None:
        self._settle = settle
        self._contents: Mapping[Path, str] | None = None
        self._since = 0.0

    def seconds_left(self, contents: Mapping[Path, str]) -> float:
        """The seconds until ``contents``, just seen, counts as settled; not above 0 once it does."""
        now = trio.current_time()
        if contents != self._contents:
            self._contents, self._since = contents, now
        return self._since + self._settle - now


# --- looking at the files; in a thread, since disks can be slow ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ground:
    """Where the files are looked up: the directories with their inodes, and the names that matter in them."""

    directories: Mapping[str, tuple[int, int]]
    names: frozenset[str]
    route_directories: frozenset[str]

    def concerns(self, path: str) -> bool:
        """Whether an event at ``path`` may have to do with the files."""
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
class _Look:
    contents: Mapping[Path, str]
    ground: _Ground


async def _in_thread(look: Callable[[tuple[Path, ...]], _Look], paths: tuple[Path, ...]) -> _Look:
    # To abandon it harms nobody: it only reads. A dead network disk must not hold up the end of the relay.
    return await trio.to_thread.run_sync(look, paths, abandon_on_cancel=True)


def _look(paths: tuple[Path, ...]) -> _Look:
    survey = _Survey()
    contents: dict[Path, str] = {}
    for path in paths:
        survey.follow(path)
        if path.is_dir():
            survey.add_route_directory(path)
            contents[path] = _NOTHING
            with suppress(OSError):
                for file in route_files(path):
                    survey.follow(file)
                    contents[file] = _content(file)
        else:
            contents[path] = _content(path)
    return _Look(contents, survey.ground())


def _changed(known: Mapping[Path, str], found: Mapping[Path, str], paths: Iterable[Path]) -> frozenset[Path]:
    changed = {path for path, content in found.items() if known.get(path, _NOTHING) != content}
    listed = set(paths)
    for path in known.keys() - found.keys():
        # Gone from a directory that is still asked for; a path that is no longer asked for is no change.
        if known[path] != _NOTHING and path.parent in listed:
            changed.add(path)
    return frozenset(changed)


def _content(path: Path) -> str:
    """What stands for the content of a file: its digest, or in what way there is none."""
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
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # opening a FIFO would wait for its other end


class _Survey:
    """Collects the directories in which paths are looked up, symlinks included."""

    def __init__(self) -> None:
        self._directories: dict[str, tuple[int, int]] = {}
        self._names: set[str] = set()
        self._route_directories: set[str] = set()

    def ground(self) -> _Ground:
        return _Ground(self._directories, frozenset(self._names), frozenset(self._route_directories))

    def add_route_directory(self, directory: Path) -> None:
        real = os.path.realpath(directory)
        self._add(real)
        self._route_directories.add(real)

    def follow(self, path: Path) -> None:
        """Walk ``path`` as the kernel does, and note where each symlink and the file itself is looked up."""
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
                self._add(here, step)  # as far as it goes; here it may come to be
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
            # A file stands where the path needs a directory; it is that file which has to change.
            directory, name = os.path.split(directory)
            self._add(directory, name)
            return
        self._directories[directory] = (found.st_dev, found.st_ino)
        if name is not None:
            self._names.add(name)
