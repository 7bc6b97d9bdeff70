"""The watcher reports each real change of content once, in whatever way it was made. All tests use real files.

"Once" is shown without waiting for something not to happen: after the change under test another file, the sentinel,
is changed, and the next report must be of the sentinel alone.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import watchfiles

from frelay.config import watch
from frelay.config.watch import Watcher

SETTLE = 0.1  # seconds
DEADLINE = 30  # seconds; a watcher takes well under one


class Bench:
    """A directory with a watched file and a sentinel, and a watcher that has seen both."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "relay.toml"
        self.sentinel = directory / "sentinel.toml"
        self.file.write_text("one")
        self.sentinel.write_text("0")
        self.paths = [self.file, self.sentinel]
        self.watcher = Watcher(lambda: self.paths, settle=SETTLE, recheck=DEADLINE * 10)

    async def next_change(self) -> frozenset[Path]:
        with trio.fail_after(DEADLINE):
            return await self.watcher.wait_changed()

    async def change_during_wait(self, change: Callable[[], object]) -> frozenset[Path]:
        """What the watcher reports of a ``change`` that is made while it waits, with its watches in place."""
        found: list[frozenset[Path]] = []

        async def wait() -> None:
            found.append(await self.next_change())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await armed(self.watcher)
            change()
        return found[0]

    async def expect_nothing_but_the_sentinel(self) -> None:
        self.sentinel.write_text(f"{self.sentinel.read_text()}+")
        assert await self.next_change() == {self.sentinel}


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(DEADLINE):
        while True:
            if condition():
                return
            await trio.sleep(0.01)


async def armed(watcher: Watcher) -> None:
    """Wait until a task waits, with its watches in place."""
    await until(lambda: watcher.is_armed)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    (tmp_path / "etc").mkdir()
    bench = Bench(tmp_path / "etc")
    await bench.watcher.mark()
    yield bench
    assert bench.watcher.fault is None


@pytest.fixture(autouse=True)
def _quickly_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the 300 ms to the first yield, which proves that the watch is in place."""
    monkeypatch.setattr(watch, "_RUST_TIMEOUT", 20)
    monkeypatch.setattr(watch, "_STEP", 10)


# --- each way to change a file -------------------------------------------------------------------------------------


def in_place(path: Path) -> None:
    path.write_text("two")


def by_rename(path: Path) -> None:
    new = path.with_name(".new")
    new.write_text("two")
    new.rename(path)


def by_delete_and_recreate(path: Path) -> None:
    path.unlink()
    path.write_text("two")


def by_rename_away_and_recreate(path: Path) -> None:
    """As an editor that keeps a backup does it."""
    path.rename(path.with_name(f"{path.name}~"))
    path.write_text("two")


def by_directory_swap(path: Path) -> None:
    directory = path.parent
    new = directory.with_name("new")
    shutil.copytree(directory, new)
    (new / path.name).write_text("two")
    directory.rename(directory.with_name("old"))
    new.rename(directory)


def by_directory_recreation(path: Path) -> None:
    directory = path.parent
    contents = {file.name: file.read_text() for file in directory.iterdir()}
    shutil.rmtree(directory)
    directory.mkdir()
    for name, content in contents.items():
        (directory / name).write_text(content)
    path.write_text("two")


WAYS = [
    in_place,
    by_rename,
    by_delete_and_recreate,
    by_rename_away_and_recreate,
    by_directory_swap,
    by_directory_recreation,
]


@pytest.mark.parametrize("change", WAYS, ids=lambda way: way.__name__)
async def test_a_change_of_content_is_reported_exactly_once(bench: Bench, change: Callable[[Path], None]) -> None:
    """TESTPLAN 41: write in place, rename, delete and recreate."""
    assert await bench.change_during_wait(lambda: change(bench.file)) == {bench.file}
    await bench.expect_nothing_but_the_sentinel()


@pytest.mark.parametrize("change", WAYS, ids=lambda way: way.__name__)
async def test_a_change_between_two_waits_is_not_lost(bench: Bench, change: Callable[[Path], None]) -> None:
    await bench.expect_nothing_but_the_sentinel()
    change(bench.file)
    assert await bench.next_change() == {bench.file}
    await bench.expect_nothing_but_the_sentinel()


@pytest.fixture
async def config_map(tmp_path: Path) -> Bench:
    """A ConfigMap as Kubernetes mounts it: relay.toml -> ..data/relay.toml, ..data -> ..version."""
    bench = Bench(tmp_path)
    make_config_map(bench)
    await bench.watcher.mark()
    return bench


def make_config_map(bench: Bench) -> None:
    bench.file.unlink()
    (bench.directory / "..one").mkdir()
    (bench.directory / "..one" / "relay.toml").write_text("one")
    (bench.directory / "..data").symlink_to("..one")
    bench.file.symlink_to("..data/relay.toml")


def swap_data(directory: Path, version: str, content: str) -> None:
    old = os.readlink(directory / "..data")
    (directory / version).mkdir()
    (directory / version / "relay.toml").write_text(content)
    (directory / "..data_tmp").symlink_to(version)
    (directory / "..data_tmp").rename(directory / "..data")
    shutil.rmtree(directory / old)


async def test_a_swap_of_data_is_reported_exactly_once(config_map: Bench) -> None:
    """TESTPLAN 41: the ``..data`` swap; twice, as the second time other directories have to be watched."""
    for version in ("..two", "..three"):
        swap = partial(swap_data, config_map.directory, version, version)
        assert await config_map.change_during_wait(swap) == {config_map.file}
        await config_map.expect_nothing_but_the_sentinel()


async def test_a_swap_of_data_with_the_same_content_is_no_change(config_map: Bench) -> None:
    swap_data(config_map.directory, "..two", "one")
    await config_map.expect_nothing_but_the_sentinel()


async def test_a_change_behind_a_symlink_is_seen_where_the_file_really_is(config_map: Bench) -> None:
    real = config_map.directory / "..one" / "relay.toml"
    assert await config_map.change_during_wait(lambda: real.write_text("two")) == {config_map.file}


def swap_data_of(bench: Bench) -> Path:
    swap_data(bench.directory, "..two", "one")
    return bench.directory / "..two" / "relay.toml"


def swap_directory_of(bench: Bench) -> Path:
    by_directory_swap(bench.file)
    bench.file.write_text("one")
    return bench.file


def recreate_directory_of(bench: Bench) -> Path:
    by_directory_recreation(bench.file)
    bench.file.write_text("one")
    return bench.file


@pytest.mark.parametrize("shift", [swap_data_of, swap_directory_of, recreate_directory_of])
async def test_directories_that_are_replaced_without_a_change_are_watched_anew(
    bench: Bench, shift: Callable[[Bench], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one wait: watches on the old inodes would no longer report anything."""
    if shift is swap_data_of:
        make_config_map(bench)
    monkeypatch.setattr(watch, "_RUST_TIMEOUT", 300)  # long enough to see that nothing is armed for a moment
    bench.watcher = Watcher(lambda: bench.paths, settle=1, recheck=DEADLINE * 10)
    await bench.watcher.mark()
    found: list[frozenset[Path]] = []

    async def wait() -> None:
        found.append(await bench.next_change())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await armed(bench.watcher)
        real = shift(bench)
        await until(lambda: not bench.watcher.is_armed)
        await armed(bench.watcher)
        assert found == []
        real.write_text("two")
    assert found == [{bench.file}]


async def test_a_change_before_the_watches_are_in_place_is_not_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No event reports it, and the first snapshot came too early: a second one finds it."""

    def change_then_watch(*paths: str, **options: Any) -> AsyncGenerator[set[tuple[watchfiles.Change, str]], None]:
        bench.file.write_text("two")
        return watchfiles.awatch(*paths, **options)

    async def late(watcher: Watcher, *arguments: Any) -> None:
        await looked.wait()
        await listen(watcher, *arguments)

    def looks(*arguments: Any) -> Any:
        seen = changed(*arguments)
        looked.set()
        return seen

    looked, listen, changed = trio.Event(), Watcher._listen, watch._changed
    monkeypatch.setattr(watch, "awatch", change_then_watch)
    monkeypatch.setattr(watch, "_changed", looks)
    monkeypatch.setattr(Watcher, "_listen", late)
    assert await bench.next_change() == {bench.file}
    await bench.expect_nothing_but_the_sentinel()


@pytest.mark.load
async def test_a_half_written_file_is_one_change(bench: Bench) -> None:
    """TESTPLAN 41: a quick writer in several steps is reported when it is done.

    It only shows something if this process was not held up for as long as the settling takes; else it tries again, with
    more time for everything.
    """
    seen: list[str] = []

    async def wait() -> None:
        assert await bench.next_change() == {bench.file}
        seen.append(bench.file.read_text())

    for settle in (0.7, 1.4, 2.8, 5.6, 11.2):
        bench.watcher = Watcher(lambda: bench.paths, settle=settle)
        await bench.watcher.mark()
        seen.clear()
        longest = 0.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await armed(bench.watcher)
            with bench.file.open("w") as file:
                last = trio.current_time()
                for part in range(10):
                    file.write(f"{settle}-{part}\n")
                    file.flush()
                    await trio.sleep(0.15 * settle)
                    longest = max(longest, trio.current_time() - last)
                    last = trio.current_time()
                assert seen == [] or longest > 0.5 * settle
                file.write("end")
        if longest < 0.5 * settle:
            assert seen[0].endswith("end")
            await bench.expect_nothing_but_the_sentinel()
            return
    raise AssertionError("this machine stalls for five seconds and more, all the time")


# --- what is no change -----------------------------------------------------------------------------------------


def touch(path: Path) -> None:
    path.touch()


def same_bytes_in_place(path: Path) -> None:
    path.write_text("one")


def same_bytes_by_rename(path: Path) -> None:
    new = path.with_name(".new")
    new.write_text("one")
    new.rename(path)


def another_file(path: Path) -> None:
    path.with_name("other.toml").write_text("x")


def its_mode(path: Path) -> None:
    path.chmod(0o600)


@pytest.mark.parametrize(
    "change", [touch, same_bytes_in_place, same_bytes_by_rename, another_file, its_mode], ids=lambda way: way.__name__
)
async def test_what_leaves_the_content_alone_is_no_change(bench: Bench, change: Callable[[Path], None]) -> None:
    def both() -> None:
        change(bench.file)
        bench.sentinel.write_text("1")

    assert await bench.change_during_wait(both) == {bench.sentinel}


async def test_a_change_that_is_taken_back_while_it_settles_is_none(bench: Bench) -> None:
    bench.watcher = Watcher(lambda: bench.paths, settle=2)
    await bench.watcher.mark()

    def there_and_back() -> None:
        bench.file.write_text("two")
        bench.file.write_text("one")
        bench.sentinel.write_text("1")

    assert await bench.change_during_wait(there_and_back) == {bench.sentinel}


# --- files that come and go --------------------------------------------------------------------------------------


async def test_deleting_and_restoring_are_two_changes(bench: Bench) -> None:
    assert await bench.change_during_wait(bench.file.unlink) == {bench.file}
    assert await bench.change_during_wait(lambda: bench.file.write_text("one")) == {bench.file}
    await bench.expect_nothing_but_the_sentinel()


async def test_a_directory_that_goes_and_comes_does_not_end_the_watch(bench: Bench) -> None:
    deep = bench.directory / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "cert.pem").write_text("one")
    bench.paths.append(deep / "cert.pem")
    await bench.watcher.mark()
    assert await bench.change_during_wait(lambda: shutil.rmtree(bench.directory / "a")) == {deep / "cert.pem"}

    def restore() -> None:
        deep.mkdir(parents=True)
        (deep / "cert.pem").write_text("two")

    assert await bench.change_during_wait(restore) == {deep / "cert.pem"}
    assert await bench.change_during_wait(lambda: (deep / "cert.pem").write_text("three")) == {deep / "cert.pem"}
    await bench.expect_nothing_but_the_sentinel()


async def test_a_file_may_stand_where_a_directory_is_needed(bench: Bench) -> None:
    place = bench.directory / "certs"
    place.write_text("not a directory")
    bench.paths.append(place / "relay.pem")
    await bench.watcher.mark()

    def mend() -> None:
        place.unlink()
        place.mkdir()
        (place / "relay.pem").write_text("pem")

    assert await bench.change_during_wait(mend) == {place / "relay.pem"}


async def test_routes_dir_stands_for_the_route_files_in_it(bench: Bench) -> None:
    routes = bench.directory / "routes.d"
    bench.paths.append(routes)
    await bench.watcher.mark()
    route = routes / "a.toml"

    def add() -> None:
        routes.mkdir()
        route.write_text("one")

    assert await bench.change_during_wait(add) == {route}
    assert await bench.change_during_wait(lambda: route.write_text("two")) == {route}

    def noise() -> None:
        (routes / ".hidden.toml").write_text("x")
        (routes / "a.toml.tmp").write_text("x")
        (routes / "b.toml").write_text("one")

    assert await bench.change_during_wait(noise) == {routes / "b.toml"}
    assert await bench.change_during_wait(route.unlink) == {route}
    assert await bench.change_during_wait(lambda: shutil.rmtree(routes)) == {routes / "b.toml"}
    await bench.expect_nothing_but_the_sentinel()


async def test_a_symlinked_routes_dir_is_watched_where_it_really_is(bench: Bench) -> None:
    real = bench.directory / "elsewhere"
    real.mkdir()
    (bench.directory / "routes.d").symlink_to(real)
    bench.paths.append(bench.directory / "routes.d")
    await bench.watcher.mark()
    assert await bench.change_during_wait(lambda: (real / "a.toml").write_text("x")) == {
        bench.directory / "routes.d" / "a.toml"
    }


async def test_loops_and_things_that_are_no_files_are_survived(bench: Bench) -> None:
    loop, fifo = bench.directory / "loop", bench.directory / "fifo"
    loop.symlink_to("loop")
    os.mkfifo(fifo)
    bench.paths += [loop, fifo, Path("/dev/zero"), bench.directory]
    await bench.watcher.mark()
    await bench.expect_nothing_but_the_sentinel()

    def mend() -> None:
        loop.unlink()
        loop.write_text("x")

    assert await bench.change_during_wait(mend) == {loop}


# --- the set of files ----------------------------------------------------------------------------------------------


async def test_the_files_are_asked_anew_and_a_new_one_counts_as_changed(bench: Bench) -> None:
    """It may have changed after it was loaded, and before the first snapshot of it."""
    extra = bench.directory / "extra" / "crl.pem"
    extra.parent.mkdir()
    extra.write_text("one")
    bench.paths.append(extra)
    assert await bench.next_change() == {extra}
    assert await bench.change_during_wait(lambda: extra.write_text("two")) == {extra}
    bench.paths.remove(extra)
    await bench.expect_nothing_but_the_sentinel()


async def test_no_files_at_all_is_a_wait_that_can_be_cancelled() -> None:
    with trio.move_on_after(0.5) as scope:
        await Watcher(list).wait_changed()
    assert scope.cancelled_caught


async def test_the_first_wait_takes_what_is_there_for_known(bench: Bench) -> None:
    bench.watcher = Watcher(lambda: bench.paths, settle=SETTLE)
    assert await bench.change_during_wait(lambda: bench.file.write_text("two")) == {bench.file}


async def test_a_mark_makes_what_is_there_known(bench: Bench) -> None:
    bench.file.write_text("two")
    await bench.watcher.mark()
    await bench.expect_nothing_but_the_sentinel()


async def test_a_mark_during_a_wait_settles_what_was_about_to_be_reported(bench: Bench) -> None:
    """For example, SIGHUP loads a file just after it was written."""
    bench.watcher = Watcher(lambda: bench.paths, settle=2)
    await bench.watcher.mark()
    found: list[frozenset[Path]] = []

    async def wait() -> None:
        found.append(await bench.next_change())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await armed(bench.watcher)
        bench.file.write_text("two")
        await bench.watcher.mark()
        bench.sentinel.write_text("1")
    assert found == [{bench.sentinel}]


async def test_a_mark_waits_for_a_snapshot_under_way(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the older content, which was read before the mark, would count as a change after it."""
    is_held, was_seen, release = threading.Event(), threading.Event(), threading.Event()
    take_snapshot = watch._take_snapshot

    def slow_snapshot(paths: tuple[Path, ...]) -> Any:
        seen = take_snapshot(paths)
        if is_held.is_set():
            is_held.clear()
            was_seen.set()
            assert release.wait(DEADLINE)
        return seen

    bench.watcher = Watcher(lambda: bench.paths, settle=0)
    await bench.watcher.mark()
    monkeypatch.setattr(watch, "_take_snapshot", slow_snapshot)
    found: list[frozenset[Path]] = []

    async def wait() -> None:
        found.append(await bench.next_change())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await armed(bench.watcher)
        is_held.set()
        bench.file.touch()
        await until(was_seen.is_set)
        bench.file.write_text("two")
        async with trio.open_nursery() as marking:
            marking.start_soon(bench.watcher.mark)
            await trio.sleep(
                0.3
            )  # enough for a mark that does not wait; if it is too short, the test only misses the fault
            release.set()
        bench.sentinel.write_text("1")
    assert found == [{bench.sentinel}]


# --- faults and endings --------------------------------------------------------------------------------------------


async def test_without_file_events_the_content_is_compared_now_and_then(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, no inotify instance is left; when there is one again, it is used."""

    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError(24, "Too many open files")

    bench.watcher = Watcher(lambda: bench.paths, settle=SETTLE, recheck=0.05)
    await bench.watcher.mark()
    monkeypatch.setattr(watch, "awatch", refuse)
    found: list[frozenset[Path]] = []

    async def wait() -> None:
        found.append(await bench.next_change())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await until(lambda: bench.watcher.fault is not None)
        assert "Too many open files" in str(bench.watcher.fault)
        assert not bench.watcher.is_armed
        bench.file.write_text("two")
    assert found == [{bench.file}]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        monkeypatch.setattr(watch, "awatch", watchfiles.awatch)
        await armed(bench.watcher)
        bench.file.write_text("three")
    assert found == [{bench.file}, {bench.file}]


async def test_a_directory_that_vanishes_before_it_can_be_watched_is_no_fault(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_once(*paths: str, **options: Any) -> Any:
        monkeypatch.setattr(watch, "awatch", watchfiles.awatch)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(watch, "awatch", refuse_once)
    assert await bench.change_during_wait(lambda: bench.file.write_text("two")) == {bench.file}


async def test_a_directory_recreated_under_the_same_inode_is_watched_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems use the inode number again at once; then only the event shows the change."""

    was_used = trio.Event()

    async def dead_watch(*paths: str, **options: Any) -> AsyncGenerator[set[tuple[watchfiles.Change, str]], None]:
        monkeypatch.setattr(watch, "awatch", watchfiles.awatch)
        was_used.set()
        yield set()
        yield {(watchfiles.Change.deleted, str(bench.directory))}
        await trio.sleep_forever()

    monkeypatch.setattr(watch, "awatch", dead_watch)
    found: list[frozenset[Path]] = []

    async def wait() -> None:
        found.append(await bench.next_change())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await was_used.wait()
        await until(lambda: not bench.watcher.is_armed)
        await armed(bench.watcher)
        bench.file.write_text("two")
    assert found == [{bench.file}]


def descriptors() -> set[str]:
    return {
        f"{number} {os.readlink(f'/proc/self/fd/{number}')}"
        for number in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{number}")
    }


@pytest.mark.load
async def test_a_cancelled_wait_ends_soon_and_leaves_nothing_and_loses_nothing(bench: Bench) -> None:
    before = descriptors()
    tasks = trio.lowlevel.current_statistics().tasks_living
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.watcher.wait_changed)
        await armed(bench.watcher)
        assert any("inotify" in descriptor for descriptor in descriptors() - before)
        cancelled_at = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - cancelled_at < 5  # it takes about 50 ms; this only tells it from "never"
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    # watchfiles closes it in a thread of its own
    await until(lambda: not any("inotify" in descriptor for descriptor in descriptors() - before))
    bench.file.write_text("two")
    assert await bench.next_change() == {bench.file}


async def test_a_wait_cancelled_while_a_change_settles_leaves_it_to_the_next(bench: Bench) -> None:
    bench.watcher = Watcher(lambda: bench.paths, settle=3600)
    await bench.watcher.mark()
    bench.file.write_text("two")
    with trio.move_on_after(0.5) as scope:
        await bench.watcher.wait_changed()
    assert scope.cancelled_caught
    bench.watcher = _with_settle(bench.watcher, SETTLE)
    assert await bench.next_change() == {bench.file}


def _with_settle(watcher: Watcher, settle: float) -> Watcher:
    watcher._settle = settle
    return watcher


async def test_two_tasks_cannot_wait_at_once(bench: Bench) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.watcher.wait_changed)
        await armed(bench.watcher)
        with pytest.raises(trio.BusyResourceError):
            await bench.watcher.wait_changed()
        nursery.cancel_scope.cancel()
    bench.file.write_text("two")
    assert await bench.next_change() == {bench.file}


async def test_noise_beside_the_files_neither_hides_nor_delays_a_change(bench: Bench) -> None:
    """For example, a log in the same directory that is written all the time."""
    stop = threading.Event()

    def write_log() -> None:
        with (bench.directory / "relay.log").open("w") as log:
            while not stop.wait(0.01):
                log.write("line\n")
                log.flush()

    writer = threading.Thread(target=write_log)
    writer.start()
    try:
        assert await bench.change_during_wait(lambda: bench.file.write_text("two")) == {bench.file}
        await bench.expect_nothing_but_the_sentinel()
    finally:
        stop.set()
        await trio.to_thread.run_sync(writer.join)


async def test_many_changes_under_way_end_in_the_last_content(bench: Bench) -> None:
    """At whatever times changes are reported, the last report comes after the last write."""
    reports: list[str] = []

    async def wait_for_the_end() -> None:
        while not reports or reports[-1] != "end":
            await bench.next_change()
            reports.append(bench.file.read_text())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_the_end)
        for number in range(40):
            WAYS[number % 4](bench.file)
            bench.file.write_text(str(number))
            await trio.sleep(0.02)
        bench.file.write_text("end")
    await bench.expect_nothing_but_the_sentinel()
