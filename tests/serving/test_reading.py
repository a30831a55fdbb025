"""A prompt has the same state and logits on every way to its end."""

import pytest
import torch

from cumulant.models import PRESETS
from cumulant.serving import watch
from cumulant.serving.reading import Reading
from cumulant.serving.snapshots import Snapshot, SnapshotStore, piece_keys
from cumulant.serving.watch import MemoryWatch

from .common import PIECE, build, prompt


def read(model, store, tokens, **options):
    reading = Reading(model, store, tokens, PIECE, **options)
    while not reading.done:
        reading.read_piece()
    return reading


def same(a, b):
    mine, other = a.tensors(), b.tensors()
    return mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)


@pytest.mark.parametrize("preset", PRESETS)
def test_snapshots_change_no_bit(preset):
    model, tokens = build(preset), prompt(75)
    expected = read(model, SnapshotStore(0), tokens)
    assert expected.cached == 0
    store = SnapshotStore(2**30)
    for length in (75, 20, 49, 64, 70, 75):
        reading = read(model, store, tokens[:length])
        if length == 75:
            assert same(reading.snapshot(), expected.snapshot())
    assert reading.cached == 75  # the same text again is not read at all
    for length in (64, 48, 16):  # from a state on the way
        fresh = SnapshotStore(2**30)
        read(model, fresh, tokens[:length])
        reading = read(model, fresh, tokens)
        assert reading.cached == length
        assert same(reading.snapshot(), expected.snapshot())
    other = read(model, store, (*tokens[:50], 1, 2, 3))
    assert other.cached == 48
    assert same(other.snapshot(), read(model, SnapshotStore(0), (*tokens[:50], 1, 2, 3)).snapshot())


def test_it_reads_what_the_model_reads():
    model, tokens = build(), prompt(75)
    reading = read(model, SnapshotStore(0), tokens, scored=3)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0].double()
    torch.testing.assert_close(reading.logits[0].double(), logits[-1], rtol=1e-4, atol=1e-4)
    log = logits.log_softmax(-1)
    assert len(reading.scores) == 75
    assert reading.scores[0].log_probability is None
    for i, score in enumerate(reading.scores[1:]):
        assert score.token == tokens[i + 1]
        assert score.log_probability == pytest.approx(float(log[i, tokens[i + 1]]), abs=1e-4)
        best = log[i].topk(3)
        assert [token for token, _ in score.top] == best.indices.tolist()
        assert [x for _, x in score.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_where_snapshots_are_kept():
    model, tokens, store = build(), prompt(200), SnapshotStore(2**30)
    read(model, store, tokens, every=3, borders=(40, 111))
    keys = piece_keys(tokens, PIECE)
    kept = {i * PIECE for i, key in enumerate(keys) if key in store}
    assert kept == {32, 48, 96, 144, 192, 13 * PIECE}  # the last is that of all 200
    assert store.get(keys[-1]).logits is not None
    assert store.get(keys[3]).logits is None


def test_a_named_border_and_an_unscored_prefix():
    model, tokens, store = build(), prompt(70), SnapshotStore(2**30)
    read(model, store, tokens)
    kept = read(model, store, tokens, keep_border=True)
    assert kept.cached == 64  # the end alone would not tell the border
    snapshot, at = kept.border
    assert at == 64
    assert snapshot.logits is None
    assert snapshot.state.position.item() == 64
    from_border = read(model, SnapshotStore(0), (*tokens, 5, 6), start=kept.border)
    assert from_border.cached == 64
    assert same(from_border.snapshot(), read(model, SnapshotStore(0), (*tokens, 5, 6)).snapshot())
    assert read(model, store, tokens, scored=0).cached == 0
    part = read(model, SnapshotStore(0), tokens, whole=False)
    assert part.position == 64


def test_keys_tell_prefixes_apart():
    a, b = prompt(50), prompt(50, 1)
    keys = piece_keys(a, 16)
    assert len(keys) == 5
    assert piece_keys(a[:32], 16) == keys[:3]
    assert piece_keys(a[:40], 16)[:3] == keys[:3]
    assert piece_keys(a[:40], 16)[3] != keys[3]
    assert not set(piece_keys(b, 16)[1:]) & set(keys)
    assert piece_keys((*b[:16], *a[16:32]), 16)[2] != keys[2]


def snapshot(size):
    from cumulant.models import ModelState

    state = ModelState((torch.zeros(1, size // 4),), torch.zeros(1, dtype=torch.int64))
    return Snapshot(state, None)


def test_the_least_valuable_goes_first():
    store = SnapshotStore(4 * 1008)
    for name, saved in ((b"a", 100), (b"b", 10), (b"c", 1000), (b"d", 50)):
        assert store.put(name, snapshot(1000), saved)
    assert store.size == 4 * 1008
    store.put(b"e", snapshot(1000), 70)
    assert b"b" not in store
    store.put(b"f", snapshot(1000), 70)
    assert b"d" not in store
    assert {n for n in (b"a", b"c", b"e", b"f") if n in store} == {b"a", b"c", b"e", b"f"}
    for i in range(200):  # what is not used goes in the end, also if it was dear
        store.put(b"x%d" % i, snapshot(1000), 40)
        assert store.size <= store.budget
    assert b"c" not in store
    assert not store.put(b"huge", snapshot(5000), 10**6)
    assert store.evicted > 200


def test_snapshots_go_when_the_process_is_too_large(monkeypatch):
    store, sizes = SnapshotStore(100 * 1008), iter([900, 960, 955, 3000, 3000])
    for i in range(10):
        store.put(b"%d" % i, snapshot(1000), 1 + i)
    look = MemoryWatch(store, 1000)
    monkeypatch.setattr(watch, "PERIOD", 0)
    monkeypatch.setattr(MemoryWatch, "_resident", lambda self: next(sizes))
    look.look()
    assert len(store) == 10
    look.look()  # 5 bytes too many after trimming
    assert len(store) == 9
    assert b"0" not in store
    look.look()
    assert len(store) == 6
    MemoryWatch(store, None).look()


def test_reserving_makes_room():
    store = SnapshotStore(4 * 1008)
    for i in range(4):
        store.put(b"%d" % i, snapshot(1000), 1 + i)
    assert store.reserve(2000)
    assert len(store) == 2
    assert not store.reserve(3000)
    assert store.reserve(-2000)
    assert store.budget == 4 * 1008
