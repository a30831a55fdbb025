"""A prompt has the same state and logits on every way to its end."""

import os
import time

import pytest
import torch

from cumulant.kernels.native import library
from cumulant.models import PRESETS
from cumulant.models.rows import make_rows, state_numerics
from cumulant.serving import prefix_files, watch
from cumulant.serving.place import Place
from cumulant.serving.prefix_files import PrefixFiles
from cumulant.serving.reading import BlockReading, EndedTexts, Plan, SlotReading
from cumulant.serving.snapshots import Snapshot, SnapshotStore, TextKeys
from cumulant.serving.watch import MemoryWatch

from .common import PIECE, build, prompt

EXACT = [p for p in PRESETS if p not in ("softmax", "flash")]


def read(model, store, tokens, *, blocks=False, most=PIECE, **plan):
    """Read a text as the engine does, or by the model's layers."""
    with torch.inference_mode():
        if blocks:
            reading = BlockReading(model, store, tokens, PIECE, Plan(**plan))
            while not reading.done:
                reading.read_piece()
            return reading
        rows = make_rows(model, 1, 1, PIECE)
        reading = SlotReading(rows, 0, store, tokens, PIECE, Plan(**plan))
        while not reading.done:
            piece = reading.next_piece(most)
            reading.take(piece, rows.run([piece]))
        return reading


def same(a, b):
    mine, other = a.tensors(), b.tensors()
    return mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)


@pytest.mark.parametrize("preset", PRESETS)
def test_snapshots_change_no_bit_in_blocks(preset):
    model, tokens = build(preset), prompt(75)
    expected = read(model, SnapshotStore(0), tokens, blocks=True)
    assert expected.cached == 0
    store = SnapshotStore(2**30)
    for length in (75, 20, 49, 64, 70, 75):
        reading = read(model, store, tokens[:length], blocks=True)
        if length == 75:
            assert same(reading.snapshot(), expected.snapshot())
    assert reading.cached == 75  # the same text again is not read at all
    for length in (64, 48, 16):  # from a state on the way
        fresh = SnapshotStore(2**30)
        read(model, fresh, tokens[:length], blocks=True)
        reading = read(model, fresh, tokens, blocks=True)
        assert reading.cached == length
        assert same(reading.snapshot(), expected.snapshot())
    changed = (*tokens[:50], 1, 2, 3)
    other = read(model, store, changed, blocks=True)
    assert other.cached == 48
    alone = read(model, SnapshotStore(0), changed, blocks=True)
    assert same(other.snapshot(), alone.snapshot())


@pytest.mark.parametrize("preset", EXACT)
def test_snapshots_change_no_bit(preset):
    """They may be anywhere, and pieces of any size."""
    model, tokens = build(preset), prompt(75)
    expected = read(model, SnapshotStore(0), tokens)
    assert expected.cached == 0
    store = SnapshotStore(2**30)
    for length in (20, 49, 64, 70, 75, 75):
        reading = read(model, store, tokens[:length], most=7)
    assert same(reading.snapshot(), expected.snapshot())
    assert reading.cached == 75
    for length in (1, 15, 16, 17, 48, 63, 74):
        fresh = SnapshotStore(2**30)
        read(model, fresh, tokens[:length])
        reading = read(model, fresh, tokens, most=5)
        assert reading.cached == length
        assert same(reading.snapshot(), expected.snapshot())
    changed = (*tokens[:50], 1, 2, 3)
    other = read(model, store, changed)
    assert other.cached == 49
    assert same(other.snapshot(), read(model, SnapshotStore(0), changed).snapshot())


@pytest.mark.parametrize("blocks", [False, True])
def test_it_reads_what_the_model_reads(blocks):
    model, tokens = build(), prompt(75)
    reading = read(model, SnapshotStore(0), tokens, scored=3, blocks=blocks)
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


def kept_at(store, tokens):
    keys = TextKeys(tokens, PIECE)
    return {n for n in range(1, len(tokens) + 1) if keys.place(n) in store}


def test_where_snapshots_are_kept():
    model, tokens, store = build(), prompt(200), SnapshotStore(2**30)
    read(model, store, tokens, every=3, borders=(40, 111))
    assert kept_at(store, tokens) == {40, 48, 96, 111, 144, 192, 200}
    keys = TextKeys(tokens, PIECE)
    assert store.get(keys.place(200)).logits is not None
    assert store.get(keys.place(48)).logits is None
    store = SnapshotStore(2**30)
    read(model, store, tokens, every=3, borders=(40, 111), blocks=True)
    assert kept_at(store, tokens) == {32, 48, 96, 144, 192, 200}


def test_a_named_border_and_an_unscored_prefix():
    model, tokens, store = build(), prompt(70), SnapshotStore(2**30)
    read(model, store, tokens, blocks=True)
    kept = read(model, store, tokens, keep_border=True, blocks=True)
    assert kept.cached == 64  # the end alone would not tell the border
    snapshot, at = kept.border
    assert at == 64
    assert snapshot.logits is None
    assert snapshot.state.position.item() == 64
    longer = (*tokens, 5, 6)
    from_border = read(model, SnapshotStore(0), longer, start=kept.border, blocks=True)
    assert from_border.cached == 64
    alone = read(model, SnapshotStore(0), longer, blocks=True)
    assert same(from_border.snapshot(), alone.snapshot())
    assert read(model, store, tokens, scored=0, blocks=True).cached == 0


def test_from_a_snapshot_that_is_handed_over():
    model, tokens, store = build(), prompt(70), SnapshotStore(2**30)
    start = read(model, SnapshotStore(0), tokens).snapshot(), 70
    longer = (*tokens, 5, 6)
    found = read(model, store, longer, start=start)
    assert found.cached == 70
    assert len(store) == 0  # it may come from anywhere
    assert same(found.snapshot(), read(model, SnapshotStore(0), longer).snapshot())
    again = read(model, store, tokens, start=start)
    assert again.cached == 70
    assert same(again.snapshot(), start[0])


def test_ended_texts_are_read_in_whole_pieces():
    model, store = build("softmax"), SnapshotStore(2**30)
    ended = EndedTexts(model, store, PIECE)
    ended.add(list(prompt(31)), 20)
    assert not ended
    ended.add(list(prompt(40)), 30)
    assert ended
    with torch.inference_mode():
        while ended:
            ended.read_piece()
    assert kept_at(store, prompt(40)) == {32}


def test_keys_tell_prefixes_apart():
    a, b = prompt(50), prompt(50, 1)
    keys = TextKeys(a, 16)
    assert len(keys.chain) == 4
    assert keys.place(32) == Place(keys.chain[2], 0, keys.chain[2], 32)
    assert keys.place(40)[:2] == (keys.chain[2], 8)
    assert keys.place(40).tokens == 40
    assert TextKeys(a[:40], 16).place(40) == keys.place(40)
    assert TextKeys(a[:40], 16).extended(a[40:]).chain == keys.chain
    assert TextKeys(a[:40], 16).extended(a[40:]).place(50) == keys.place(50)
    places = [keys.place(n).key for n in range(1, 51)]
    assert len(set(places)) == 50
    assert not {TextKeys(b, 16).place(n).key for n in range(1, 51)} & set(places)
    assert TextKeys((*b[:16], *a[16:32]), 16).place(32) != keys.place(32)


def snapshot(size):
    from cumulant.models import ModelState

    state = ModelState((torch.zeros(1, size // 4),), torch.zeros(1, dtype=torch.int64))
    return Snapshot(state, None)


def at(name):
    return Place(name, 0, name, 1)


def test_the_least_valuable_goes_first():
    store = SnapshotStore(4 * 1008)
    for name, saved in ((b"a", 100), (b"b", 10), (b"c", 1000), (b"d", 50)):
        assert store.put(at(name), snapshot(1000), saved)
    assert store.size == 4 * 1008
    store.put(at(b"e"), snapshot(1000), 70)
    assert at(b"b") not in store
    store.put(at(b"f"), snapshot(1000), 70)
    assert at(b"d") not in store
    assert {n for n in (b"a", b"c", b"e", b"f") if at(n) in store} == {b"a", b"c", b"e", b"f"}
    for i in range(200):  # what is not used goes in the end, also if it was dear
        store.put(at(b"x%d" % i), snapshot(1000), 40)
        assert store.size <= store.budget
    assert at(b"c") not in store
    assert not store.put(at(b"huge"), snapshot(5000), 10**6)
    assert store.evicted > 200


def test_snapshots_go_when_the_process_is_too_large(monkeypatch):
    store, sizes = SnapshotStore(100 * 1008), iter([900, 960, 955, 3000, 3000])
    for i in range(10):
        store.put(at(b"%d" % i), snapshot(1000), 1 + i)
    look = MemoryWatch(store, 1000)
    monkeypatch.setattr(watch, "PERIOD", 0)
    monkeypatch.setattr(MemoryWatch, "_resident", lambda self: next(sizes))
    look.look()
    assert len(store) == 10
    look.look()  # 5 bytes too many after trimming
    assert len(store) == 9
    assert at(b"0") not in store
    look.look()
    assert len(store) == 6
    MemoryWatch(store, None).look()


def test_reserving_makes_room():
    store = SnapshotStore(4 * 1008)
    for i in range(4):
        store.put(at(b"%d" % i), snapshot(1000), 1 + i)
    assert store.reserve(2000)
    assert len(store) == 2
    assert not store.reserve(3000)
    assert store.reserve(-2000)
    assert store.budget == 4 * 1008


def test_logits_are_found_where_they_are(tmp_path):
    """Memory may have the state alone, and a file its logits, too."""
    model, tokens, where = build(), prompt(40), TextKeys(prompt(40), PIECE).place(40)
    whole = read(model, SnapshotStore(0), tokens).snapshot()
    files = PrefixFiles(tmp_path, 2**20, {}, fits=lambda *_: True)
    files.put(where, whole)
    assert files.flush(30)
    store = SnapshotStore(2**20, files)
    store.put(where, Snapshot(whole.state, None), 1)
    assert read(model, store, tokens).cached == 40
    files.close()


def test_a_prefix_in_use_stays_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_files, "TOUCH_SECONDS", 0.0)
    model, texts = build(), [prompt(20, i) for i in range(6)]
    one = read(model, SnapshotStore(0), texts[0]).snapshot()
    files = PrefixFiles(tmp_path, 5 * one.nbytes, {}, fits=lambda *_: True)
    store = SnapshotStore(2**24, files)
    for text in texts:
        read(model, store, texts[0])
        read(model, store, text)
        assert files.flush(30)
        time.sleep(0.02)
    files.close()
    again = PrefixFiles(tmp_path, 5 * one.nbytes, {}, fits=lambda *_: True)
    assert 2 <= len(again) <= 4
    assert read(model, SnapshotStore(2**24, again), texts[0]).cached == 20
    assert read(model, SnapshotStore(2**24, again), texts[1]).cached == 0
    again.close()


def test_a_folder_that_changes_is_listed_seldom(tmp_path, monkeypatch):
    files, listed = PrefixFiles(tmp_path, 2**20, {}, fits=lambda *_: True), []
    store = SnapshotStore(2**20, files)
    ahead = time.time() + 60
    os.utime(tmp_path, (ahead, ahead))
    monkeypatch.setattr(files, "_list", lambda: listed.append(1) or {})
    assert store.longest(TextKeys(prompt(5000), 1), 0, lambda count: True) is None
    assert len(listed) < 20
    files.close()


def test_states_of_other_kernels_have_other_keys(isa):
    keys = {state_numerics(build(p), n, 1) for p in ("taylor", "softmax") for n in (16, 32)}
    assert len(keys) == 4
    hooked = build()
    hooked.model.layers[0].register_forward_hook(lambda *a: None)
    assert state_numerics(hooked, 16, 1) != state_numerics(build(), 16, 1)
    assert state_numerics(build(), 16, 1) in keys


def test_and_so_have_other_instruction_sets(monkeypatch):
    def key(isa):
        monkeypatch.setattr(library, "instruction_set_name", lambda: isa)
        return state_numerics(build(), 16, 1)

    assert len({key(isa) for isa in library.INSTRUCTIONS}) == len(library.INSTRUCTIONS)
    assert key("avx2") == key("avx2")
