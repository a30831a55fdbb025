"""Snapshots in files, which several servers share and any of them may lose."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import DynamicCache

from cumulant.models import export_state
from cumulant.ops.state import load_state, save_state
from cumulant.serving import prefix_files
from cumulant.serving.place import Place
from cumulant.serving.prefix_files import SETTLED, PrefixFiles
from cumulant.serving.snapshots import Snapshot

from .common import PIECE, build, prompt, wait_until

ABOUT = {"weights": "abc", "piece": str(PIECE)}
NAME = f"{'0' * 32}-1-{'1' * 32}-l.safetensors"


def read_prompt(model, seed=0):
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt(PIECE, seed)]), past_key_values=cache).logits
        return Snapshot(export_state(cache), logits[:, -1].float())


@pytest.fixture(scope="module")
def snapshots():
    """Snapshots of one size, with logits."""
    model = build()
    return [read_prompt(model, seed) for seed in range(6)]


@pytest.fixture
def opened(tmp_path):
    """Opens files in a folder, and closes all at the end."""
    made = []

    def open_files(limit=1 << 30, metadata=ABOUT, fits=lambda *_: True, **options):
        made.append(PrefixFiles(tmp_path / "files", limit, metadata, fits=fits, **options))
        return made[-1]

    yield open_files
    for files in made:
        files.close()
        assert not files._writer.is_alive()


def place(count=PIECE, seed=0):
    text, whole = bytes(prompt(count, seed)), count // PIECE * PIECE
    chain = hashlib.sha256(text[:whole]).digest() if whole else b""
    return Place(chain, count - whole, hashlib.sha256(text).digest(), count)


def bare(snapshot):
    return Snapshot(snapshot.state, None)


def write(files, where, snapshot):
    files.put(where, snapshot)
    assert files.flush(30)


def fill(files, snapshots):
    """One snapshot for each of some places, the first the least recently used."""
    places = [place(seed=i) for i in range(len(snapshots))]
    for i, (where, snapshot) in enumerate(zip(places, snapshots)):
        write(files, where, snapshot)
        os.utime(path_of(files, where), (i, i))
    return places


def path_of(files, where):
    (found,) = files.folder.glob(f"*-{where.tail}-{where.key[:16].hex()}-*")
    return found


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def holds(files, where, snapshot):
    found = files.get(where)
    known, other = snapshot.tensors(), {} if found is None else found.tensors()
    return known.keys() == other.keys() and all(
        x.dtype == other[n].dtype and torch.equal(x, other[n]) for n, x in known.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["taylor", "softmax"])
def test_they_come_back_bit_for_bit(opened, preset, dtype):
    snapshot, asked = read_prompt(build(preset).to(dtype)), []
    files = opened(fits=lambda found, tokens: not asked.append((type(found), tokens)))
    cases = ((place(20), snapshot), (place(20, seed=1), bare(snapshot)), (place(4), snapshot))
    for where, written in cases:
        write(files, where, written)
        assert holds(files, where, written)
        assert (files.get(where).logits is None) == (written.logits is None)
        assert asked[-2:] == [(Snapshot, where.tokens)] * 2
        # otherwise the disk would not get its bytes back when it is deleted
        assert path_of(files, where).name not in Path("/proc/self/maps").read_text()
    assert (len(files), files.size) == (3, bytes_in(files.folder))


def test_tails_and_another_start(opened, snapshots):
    files, chain = opened(), place().chain
    assert files.tails(chain) == ()
    for count in (PIECE + 3, PIECE, PIECE + 11, PIECE + 9, 2 * PIECE + 1, 5):
        files.put(place(count), snapshots[0])
    other = Place(chain, 3, b"x" * 32, PIECE + 3)  # another text that begins alike
    files.put(other, bare(snapshots[1]))
    files.close()  # writes what waits
    files.put(place(PIECE + 4), snapshots[2])
    for opening in (files, opened()):
        assert opening.tails(chain) == (11, 9, 3, 0)
        assert opening.tails(b"") == (5,)
        assert holds(opening, other, bare(snapshots[1]))
        assert holds(opening, place(PIECE + 3), snapshots[0])
        assert (len(opening), opening.size) == (7, bytes_in(files.folder))
    path_of(files, other).unlink()
    assert files.tails(chain) == (11, 9, 3, 0)
    path_of(files, place(PIECE + 3)).unlink()
    wait_until(lambda: files.tails(chain) == (11, 9, 0))  # it is not listed at every call


def test_two_servers_see_each_others_files(opened, snapshots):
    one, two = opened(), opened()
    for i, (writer, reader) in enumerate([(one, two), (two, one), (two, one)] * 2):
        time.sleep(2 * SETTLED if i > 2 else 0)
        assert reader.get(place(PIECE + i)) is None
        write(writer, place(PIECE + i), snapshots[i])
        wait_until(lambda: len(reader.tails(place().chain)) == i + 1)  # noqa: B023
        assert holds(reader, place(PIECE + i), snapshots[i])
        assert (len(reader), reader.size) == (len(writer), writer.size)
    path_of(one, place()).unlink()
    for server in (one, two):
        wait_until(lambda: server.tails(place().chain) == (5, 4, 3, 2, 1))  # noqa: B023


def test_a_settled_folder_is_not_listed_again(opened, snapshots, monkeypatch):
    files = opened()
    (where,) = fill(files, snapshots[:1])
    time.sleep(2 * SETTLED)
    files.tails(where.chain)
    monkeypatch.setattr(files, "_list", lambda: pytest.fail("listed"))
    files.put(where, snapshots[0])
    assert not files._pending  # known, and so not even queued
    assert files.tails(where.chain) == (0,)
    assert holds(files, where, snapshots[0])


def test_the_limit(opened, snapshots, caplog):
    files = opened()
    places = fill(files, snapshots[:4])
    one = files.size // 4
    assert files.get(places[0]) is not None  # is the most recently used now
    files.limit = 3 * one + one // 2
    files.trim()
    assert [files.get(p) is not None for p in places] == [True, False, True, True]
    for i in (0, 2, 3):
        os.utime(path_of(files, places[i]), (i, i))
    write(files, place(seed=9), snapshots[4])
    (files.folder / NAME).write_bytes(bytes(4 * one))  # does not drive out the others
    files.trim()
    assert files.get(places[0]) is None
    assert holds(files, place(seed=9), snapshots[4])
    assert (len(files), files.size) == (3, bytes_in(files.folder))
    for limit in (snapshots[5].nbytes, snapshots[5].nbytes - 1):  # the file has a header too
        files.limit = limit
        write(files, place(seed=5), snapshots[5])
        assert len(list(files.folder.iterdir())) == 3
    assert files.get(places[2]) is None  # is too large as well, whoever wrote it
    assert (len(caplog.records), files.dropped) == (1, 0)
    files.trim()
    assert (len(files), files.size, files.tails(places[2].chain)) == (0, 0, ())


def test_one_with_logits_replaces_one_without(opened, snapshots):
    files, where = opened(), place(20)
    write(files, where, bare(snapshots[0]))
    for other in (snapshots[1], bare(snapshots[2]), snapshots[2]):
        write(files, where, other)
        assert holds(files, where, snapshots[1])
        assert (len(files), files.size) == (1, path_of(files, where).stat().st_size)
        assert files.tails(where.chain) == (4,)


def test_the_queue_is_bounded(opened, snapshots, monkeypatch):
    files, gate, asked = opened(queue_bytes=3 * snapshots[0].nbytes), threading.Event(), []

    def save(*arguments):
        asked.append(arguments)
        assert gate.wait(30)
        save_state(*arguments)

    monkeypatch.setattr(prefix_files, "save_state", save)
    files.put(place(seed=0), snapshots[0])
    wait_until(lambda: asked)
    # the better for a place takes the room of the worse
    for snapshot in (bare(snapshots[5]), snapshots[1], bare(snapshots[3]), snapshots[4]):
        files.put(place(seed=1), snapshot)
    for i in range(2, 6):
        files.put(place(seed=i), snapshots[i])
    assert files.dropped == 3
    assert not files.flush(0.01)
    gate.set()
    assert files.flush(30)
    assert len(asked) == 3
    assert [holds(files, place(seed=i), snapshots[i]) for i in range(6)] == [True] * 3 + [False] * 3
    small = opened(queue_bytes=1)
    write(small, place(seed=5), snapshots[5])
    assert (holds(small, place(seed=5), snapshots[5]), small.dropped) == (False, 1)


def rewrite(change):
    return lambda path: save_state(path, *change(*load_state(path, return_metadata=True)))


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "random": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    "a part": lambda path: path.write_bytes(path.read_bytes()[:-50] + os.urandom(50)),
    "renamed": lambda path: shutil.copy(*({*path.parent.iterdir()} - {path}), path),
    "tokens": rewrite(lambda state, about: (state, about | {"prefix.tokens": "17"})),
    "kind": rewrite(lambda state, about: (state.state, about)),
    "does not fit": lambda path: None,
    "error": lambda path: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_deleted(opened, snapshots, caplog, damage):
    fits = Mock(return_value=damage != "does not fit")
    fits.side_effect = IndexError if damage == "error" else None
    files = opened(fits=fits)
    places = fill(files, snapshots[:2])
    path = path_of(files, places[0])
    DAMAGES[damage](path)
    assert files.get(places[0]) is None
    assert not path.exists()
    assert len(caplog.records) == 1
    assert files.tails(places[0].chain) == ()
    fits.side_effect, fits.return_value = None, True
    assert holds(files, places[1], snapshots[1])
    write(files, places[0], snapshots[0])
    assert holds(files, places[0], snapshots[0])


@pytest.mark.parametrize("metadata", [ABOUT | {"weights": "x"}, ABOUT | {"more": "y"}])
def test_foreign_files_are_left_alone(opened, snapshots, metadata, caplog):
    writer, files = opened(), opened(metadata=metadata)
    for where in fill(writer, snapshots[:2]):
        assert files.tails(where.chain) == (0,)
        for _ in range(2):
            assert files.get(where) is None
            assert files.tails(where.chain) == ()
        assert writer.get(where) is not None
    assert len(caplog.records) == 1
    assert files.size == writer.size  # they take room
    write(files, where, snapshots[2])
    assert files.tails(where.chain) == (0,)
    assert holds(files, where, snapshots[2])


def test_deletion_underneath_is_harmless(opened, snapshots, monkeypatch):
    files = opened()
    places = fill(files, snapshots[:4])
    path_of(files, places[0]).unlink()
    assert files.get(places[0]) is None
    with monkeypatch.context() as patch:  # between the listing and the reading
        patch.setattr(files, "_refresh", lambda: None)
        path_of(files, places[1]).unlink()
        assert files.get(places[1]) is None
        path_of(files, places[2]).unlink()
        files.limit = files.size // 2
        files.trim()
        assert len(files) == 1
    assert holds(files, places[3], snapshots[3])
    shutil.rmtree(files.folder)
    assert files.get(places[3]) is None
    assert (len(files), files.size, files.tails(places[3].chain)) == (0, 0, ())
    files.limit = 1 << 30
    for i in (3, 0):  # also what it knew
        write(files, places[i], snapshots[i])
        assert holds(files, places[i], snapshots[i])


BROKEN = [
    (prefix_files, "save_state", OSError(28, "No space left on device")),
    (prefix_files, "save_state", TypeError()),
    (prefix_files, "load_state", OSError(5, "Input/output error")),
    (prefix_files, "load_state", MemoryError()),
    (prefix_files, "load_state", RuntimeError("out of memory")),
    *((os, name, PermissionError(13, name)) for name in ("utime", "scandir", "stat")),
    (Path, "unlink", PermissionError(13, "unlink")),
]


@pytest.mark.parametrize(("owner", "name", "error"), BROKEN)
def test_errors_of_the_disk(opened, snapshots, monkeypatch, caplog, owner, name, error):
    files = opened()
    (where,) = fill(files, snapshots[:1])
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Mock(side_effect=error))
        for i in range(1, 3):
            assert (files.get(where) is None) == (name in ("load_state", "stat"))
            write(files, place(seed=i), snapshots[i])
        if name == "unlink":
            files.limit = 0
            files.trim()
            files.limit = 1 << 30
    assert (name not in ("utime", "stat")) <= len(caplog.records) <= 2
    assert holds(files, where, snapshots[0])
    fill(files, snapshots[:3])
    assert holds(files, place(seed=2), snapshots[2])


def test_only_its_own_and_orphaned_files_are_deleted(opened, snapshots, monkeypatch):
    folder, files = opened().folder, {}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_state(folder / f".{'0' * 16}.77.tmp", snapshots[0])
        names = [os.path.basename(os.replace.call_args[0][0]), f".{'0' * 16}.77.tmp"]
    others = [".0.hidden", "state-0.safetensors", NAME.replace("-1-", "-01-")]
    for name in names + others:
        for digit, age in (("1", 3700), ("2", 3500)):
            files[digit, name] = folder / name.replace("0", digit, 1)
            files[digit, name].write_bytes(b"half")
            os.utime(files[digit, name], (time.time() - age,) * 2)
    fresh = opened(limit=0)
    fresh.trim()
    assert (len(fresh), fresh.size, fresh.tails(b"")) == (0, 0, ())
    gone = {key for key, path in files.items() if not path.exists()}
    assert gone == {("1", name) for name in names}


CHILD = """
import sys, hashlib
from pathlib import Path
from cumulant.ops.state import load_state
from cumulant.serving.prefix_files import Place, PrefixFiles
files = PrefixFiles(Path(sys.argv[2]), 1 << 30, {}, fits=lambda *_: True)
for i in range(1_000_000):
    key = hashlib.sha256(str(i).encode()).digest()
    files.put(Place(key, 0, key, i), load_state(sys.argv[1]))
    files.flush()
"""


def test_a_killed_server_leaves_only_complete_files(opened, snapshots, tmp_path):
    save_state(tmp_path / "one", snapshots[0])
    files = opened(metadata={})
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "one", files.folder])
    try:
        wait_until(lambda: len(list(files.folder.glob("*.safetensors"))) > 5, 120)
    finally:
        child.kill()
        child.wait()
    paths = list(files.folder.glob("*.safetensors"))
    fresh = opened(metadata={})
    assert len(fresh) == len(paths) > 5
    for path in paths:
        _, about = load_state(path, return_metadata=True)
        key, tokens = bytes.fromhex(about["prefix.key"]), int(about["prefix.tokens"])
        assert holds(fresh, Place(key, 0, key, tokens), snapshots[0])
    assert files.tails(key) == (0,)


def test_many_threads(opened, snapshots, caplog):
    both = [opened(limit=4 * snapshots[0].nbytes) for _ in range(2)]

    def work(begin):
        files = both[begin % 2]
        for i in range(begin, begin + 40):
            files.put(place(seed=i % 6), snapshots[i % 6])
            found = files.get(place(seed=i % 5))
            assert found is None or found.logits.equal(snapshots[i % 5].logits)
        return files.flush(30)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [True] * 3
    for files in both:
        files.trim()
        assert len(files) == len(list(files.folder.iterdir())) > 0
        assert files.size == bytes_in(files.folder) <= files.limit
    assert not caplog.records
