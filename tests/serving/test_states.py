"""Documents that are read once: by HTTP, in memory and in files."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from cumulant.models import PRESETS
from cumulant.serving.library import StateLibrary, UnknownState, model_fingerprint
from cumulant.serving.snapshots import SnapshotStore

from ..quick import slow_but
from .common import PIECE, build

FIXED = {"seed": 3, "max_tokens": 12, "logit_bias": {"256": -100}}
TEXT = "It was a dark and stormy night; " * 5


def text_of(server, **body):
    found = server.post("/v1/completions", **FIXED | body)
    return found["choices"][0]["text"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("preset", slow_but(["taylor", "softmax", "elita"], PRESETS))
@pytest.mark.parametrize("kept", ["memory", "files"])
def test_a_document_asked_many_times(make_server, tmp_path, preset, kept):
    folder = tmp_path if kept == "files" else None
    server = make_server({"small": build(preset)}, folder=folder)
    made = server.post("/v1/states", 201, input=TEXT)
    assert (made["object"], made["model"], made["tokens"]) == ("state", "small", len(TEXT))
    assert made["bytes"] > 1000
    for question in ("", " rain", " wind and more than a piece of further text"):
        budget = server.engine.store.budget
        assert server.engine.store.reserve(budget)  # nothing is known but the state
        server.engine.store.reserve(-budget)
        found, cached = text_of(server, prompt=question, state_id=made["id"])
        whole = len(TEXT) // PIECE * PIECE if preset in ("softmax", "flash") else len(TEXT)
        assert cached == (len(TEXT) if not question else whole)
        assert found == text_of(server, prompt=TEXT + question)[0]
    longer = server.post("/v1/states", 201, input="More.", state_id=made["id"])
    assert longer["tokens"] == len(TEXT) + 5
    assert (
        text_of(server, prompt="x", state_id=longer["id"])[0]
        == (text_of(server, prompt=TEXT + "More.x")[0])
    )


@pytest.mark.parametrize("preset", ["taylor", "softmax"])
def test_prefixes_survive_the_server(make_server, tmp_path, preset):
    model, question = build(preset), TEXT + " and what then?"
    server = make_server({"small": model}, folder=tmp_path)
    found, cached = text_of(server, prompt=question)
    assert cached == 0
    server.service.models["small"].engine.store.files.flush(30)
    lines = server.http.get("/metrics").text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(figures['cumulant_prefix_files{model="small"}']) >= 1
    assert float(figures['cumulant_prefix_file_bytes{model="small"}']) > 1000
    server.close()
    for _ in range(2):
        other = make_server({"small": model}, folder=tmp_path)
        assert text_of(other, prompt=question) == (found, len(question))
        longer, cached = text_of(other, prompt=question + " Nothing.")
        whole = len(question) // PIECE * PIECE
        assert cached >= (whole if preset == "softmax" else len(question))
        other.close()
    fresh = make_server({"small": model})
    assert text_of(fresh, prompt=question + " Nothing.")[0] == longer
    another = make_server({"small": build(preset, initializer_range=0.2)}, folder=tmp_path)
    assert text_of(another, prompt=question)[1] == 0


def test_files_have_a_limit(make_server, tmp_path):
    server = make_server({"small": build()}, folder=tmp_path, state_limit=100_000)
    made = server.post("/v1/states", 201, input=TEXT)
    size = made["bytes"]
    while True:
        response = server.http.post("/v1/states", json={"input": TEXT})
        if response.status_code != 201:
            break
    assert response.status_code == 507
    assert "--state-limit" in response.json()["error"]["message"]
    for i in range(20):
        text_of(server, prompt=f"{i} {TEXT}")
    server.close()
    held = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 100_000 - 2 * size < held <= 100_000
    one, other = (
        make_server({"small": build()}, folder=tmp_path, state_limit=100_000) for _ in range(2)
    )
    assert other.http.delete(f"/v1/states/{made['id']}").status_code == 200
    other.post("/v1/states", 201, input=TEXT)  # of which the first server knows nothing
    for i in range(20, 30):
        text_of(one, prompt=f"{i} {TEXT}")
    for each in (one, other):
        each.close()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 100_000


def test_list_fork_delete(make_server):
    server = make_server({"one": build(), "two": build("linear")})
    first = server.post("/v1/states", 201, model="one", input=TEXT)
    second = server.post("/v1/states", 201, model="two", input=list(TEXT.encode()))
    listed = server.http.get("/v1/states").json()["data"]
    assert [s["id"] for s in listed] == [first["id"], second["id"]]
    fork = server.post(f"/v1/states/{first['id']}/fork", 201)
    assert fork["id"] != first["id"]
    assert server.http.delete(f"/v1/states/{first['id']}").json()["deleted"]
    assert server.http.get(f"/v1/states/{first['id']}").status_code == 404
    assert text_of(server, model="one", prompt="x", state_id=fork["id"])[0]
    gone = server.post("/v1/completions", 404, model="one", prompt="x", state_id=first["id"])
    assert gone["error"]["code"] == "state_not_found"
    # a state of another model is not found there
    server.post("/v1/completions", 404, model="two", prompt="x", state_id=fork["id"])
    assert server.http.delete(f"/v1/states/{first['id']}").status_code == 404


def test_a_chat_goes_on_from_a_state(server):
    messages = [{"role": "system", "content": "s" * 50}, {"role": "user", "content": "hi"}]
    state = server.post("/v1/states", 201, messages=messages[:1])
    body = FIXED | {"messages": messages[1:], "state_id": state["id"]}
    found = server.post("/v1/chat/completions", **body)["choices"][0]["message"]["content"]
    whole = server.post("/v1/chat/completions", **FIXED | {"messages": messages})
    assert whole["choices"][0]["message"]["content"] == found


def test_files_travel(make_server, tmp_path):
    model = build()
    server = make_server({"small": model}, folder=tmp_path / "a")
    made = server.post("/v1/states", 201, input=TEXT)
    data = server.http.get(f"/v1/states/{made['id']}/file").content
    other = make_server({"renamed": model}, folder=None)
    up = other.upload(data)
    assert up.status_code == 201, up.text
    assert up.json()["tokens"] == len(TEXT)
    expected = text_of(server, prompt="x", state_id=made["id"])[0]
    assert text_of(other, prompt="x", state_id=up.json()["id"])[0] == expected
    # another server on the same folder
    beside = make_server({"small": model}, folder=tmp_path / "a")
    assert text_of(beside, prompt="x", state_id=made["id"])[0] == expected
    assert [s["id"] for s in beside.http.get("/v1/states").json()["data"]] == [made["id"]]


def damaged(data, path):
    """Files that are almost right."""
    whole = path / "whole.safetensors"
    whole.write_bytes(data)
    from safetensors import safe_open

    with safe_open(whole, "pt") as file:
        header = dict(file.metadata())
    tensors = load_file(whole)

    def written(changed=None, **metadata):
        save_file({**tensors, **(changed or {})}, path / "x", metadata=header | metadata)
        return (path / "x").read_bytes()

    tokens = tensors["tokens"]
    state = next(n for n in tensors if n.endswith("numerator"))
    yield "empty", b""
    yield "cut", data[:-10]
    yield "noise", b"\x00" * 1000
    yield "huge header", (2**40).to_bytes(8, "little") + b"{}"
    yield "weights", written(weights="0" * 64)
    yield "piece", written(piece="32")
    yield "shape", written({state: tensors[state][..., :-1].contiguous()})
    yield "dtype", written({state: tensors[state].double()})
    yield "nan", written({state: tensors[state] * float("nan")})
    yield "batch", written({state: tensors[state].repeat(2, 1, 1, 1)})
    yield "tokens", written({"tokens": tokens + 10**6})
    yield "token count", written({"tokens": tokens[:, :-20].contiguous()})
    yield (
        "positions",
        written({n: x + 1 for n, x in tensors.items() if n.endswith("position") and "layers" in n}),
    )
    yield "many logits", written({"end.logits": tensors["end.logits"].repeat(1, 3)})
    yield "half logits", written({"end.logits": tensors["end.logits"].bfloat16()})
    yield "nan logits", written({"end.logits": tensors["end.logits"] * float("inf")})
    yield "flat tokens", written({"tokens": tokens[0].contiguous()})
    yield "one token", written({"tokens": tokens[0, 0]})
    yield "logits", written({"end.logits": tensors["end.logits"][:, 1:].contiguous()})
    kind = json.loads(header["cumulant.state"])
    kind["kind"] = "cumulant.ops.state:LinearState"
    yield "another state", written(**{"cumulant.state": json.dumps(kind)})
    for name in ("cumulant.nope.deep:X", "cumulant.models.cache:StateLayer", "cumulant.ops:", 3):
        kind["kind"] = name
        yield f"kind {name}", written(**{"cumulant.state": json.dumps(kind)})
    for part in ("tokens", "end", "border"):
        for value in (None, [], "tensor", {"kind": "cumulant.ops.state:State", "parts": {}}):
            whole = json.loads(header["cumulant.state"])
            whole["parts"][part] = value
            if value != json.loads(header["cumulant.state"])["parts"][part]:
                yield f"{part} {value}", written(**{"cumulant.state": json.dumps(whole)})
    yield "deep", written(**{"cumulant.state": "[" * 100_000 + "]" * 100_000})
    kind["kind"] = "os:system"
    yield "no state", written(**{"cumulant.state": json.dumps(kind)})
    del header["weights"]
    yield "nameless", written()


def rewritten(data, path, changed, border_logits=False):
    """The file with other tensors."""
    from safetensors import safe_open

    (path / "old").write_bytes(data)
    with safe_open(path / "old", "pt") as file:
        header = dict(file.metadata())
    if border_logits:
        structure = json.loads(header["cumulant.state"])
        structure["parts"]["border"]["parts"]["logits"] = "tensor"
        header["cumulant.state"] = json.dumps(structure)
    save_file({**load_file(path / "old"), **changed}, path / "new", metadata=header)
    return (path / "new").read_bytes()


def test_an_uploaded_state_changes_nothing_for_others(make_server, tmp_path):
    """Its tokens say what others ask, and its numbers are another text's."""
    model = build()
    honest, server = make_server({"small": model}), make_server({"small": model})
    lie = honest.post("/v1/states", 201, input="z" * len(TEXT))["id"]
    ids = torch.tensor([list(TEXT.encode())])
    data = honest.http.get(f"/v1/states/{lie}/file").content
    up = server.upload(rewritten(data, tmp_path, {"tokens": ids})).json()
    further = "and more than a piece of further text"
    poisoned = text_of(server, prompt=further, state_id=up["id"])[0]
    answer_of = text_of(honest, prompt=TEXT + further)[0]
    assert poisoned != answer_of
    server.post("/v1/states", 201, input=further, state_id=up["id"])
    text_of(server, prompt=further, state_id=up["id"], max_tokens=40)
    found, cached = text_of(server, prompt=TEXT + further)
    assert (found, cached) == (answer_of, 0)


@pytest.mark.parametrize("preset", ["elita", "gated_taylor", "softmax"])
def test_numbers_without_measure_harm_their_own_reply_alone(make_server, tmp_path, preset):
    server = make_server({"small": build(preset)}, slots=3)
    body = FIXED | {"prompt": "hello", "max_tokens": 200}
    expected = server.post("/v1/completions", **body)["choices"][0]["text"]
    made = server.post("/v1/states", 201, input=TEXT)
    data = server.http.get(f"/v1/states/{made['id']}/file").content
    tensors = load_file_of(data, tmp_path)
    huge = {
        n: torch.full_like(x, 1e300 if x.dtype == torch.float64 else 3e38)
        for n, x in tensors.items()
        if n.startswith("end.state.layers.0") and n.endswith(("mean", "numerator", "value"))
    }
    up = server.upload(rewritten(data, tmp_path, huge)).json()
    bad = FIXED | {"prompt": "", "state_id": up["id"], "max_tokens": 50}
    texts, codes = [], []

    def ask(one, found):
        response = server.http.post("/v1/completions", json=one)
        found.append(response.json() if response.status_code == 200 else response.status_code)

    threads = [threading.Thread(target=ask, args=a) for a in ((body, texts), (bad, codes)) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [t["choices"][0]["text"] for t in texts] == [expected] * 2
    assert codes == [500, 500]
    assert server.post("/v1/completions", **body)["choices"][0]["text"] == expected


def load_file_of(data, path):
    (path / "file").write_bytes(data)
    return load_file(path / "file")


@pytest.mark.parametrize("preset", ["taylor", "flash"])
def test_uploads_that_are_refused(make_server, tmp_path, preset):
    server = make_server({"small": build(preset)})
    made = server.post("/v1/states", 201, input=TEXT)
    data = server.http.get(f"/v1/states/{made['id']}/file").content
    for name, bad in damaged(data, tmp_path):
        response = server.upload(bad)
        assert response.status_code == 400, name
        assert response.json()["error"]["message"].startswith("state: "), name
    if preset == "flash":
        logits = {"border.logits": torch.zeros(1, 10**4)}
        with_logits = rewritten(data, tmp_path, logits, border_logits=True)
        assert server.upload(with_logits).status_code == 400
    foreign = make_server({"small": build(preset, initializer_range=0.2)})
    response = foreign.upload(data)
    assert "another model" in response.json()["error"]["message"]
    assert len(server.http.get("/v1/states").json()["data"]) == 1
    assert server.upload(data).status_code == 201


def test_memory_for_states_ends(make_server):
    server = make_server({"small": build()}, snapshot_bytes=200_000)
    made, before = [], server.engine.store.budget
    while True:
        response = server.http.post("/v1/states", json={"input": TEXT})
        if response.status_code != 201:
            break
        made.append(response.json())
    assert response.status_code == 507
    assert "--state-dir" in response.json()["error"]["message"]
    assert sum(s["bytes"] for s in made) <= before
    for state in made:
        server.http.delete(f"/v1/states/{state['id']}")
    assert server.engine.store.budget == before


@pytest.mark.parametrize(
    "body", [{}, {"input": "a", "messages": [{"role": "user", "content": "x"}]}, {"input": []}]
)
def test_bad_states(server, body):
    assert server.http.post("/v1/states", json=body).status_code == 400
    for name in ("..%2f..%2fx", "state-xyz", "state-" + "0" * 32, "%00"):
        for call in (server.http.get, server.http.delete):
            assert call(f"/v1/states/{name}").status_code == 404
        assert server.http.get(f"/v1/states/{name}/file").status_code == 404


def test_a_crash_leaves_whole_files_only(tmp_path, monkeypatch):
    """What an unfinished write left behind is no document."""
    model = build()
    library = StateLibrary(model, PIECE, SnapshotStore(0), tmp_path)
    (library.folder / ".state-0.safetensors.1.tmp").write_bytes(b"half")
    (library.folder / f"state-{'1' * 32}.safetensors").write_bytes(b"damaged")
    assert library.entries() == []
    with pytest.raises(UnknownState):
        library.get("state-" + "0" * 32)


def test_fingerprints_tell_models_apart():
    first = model_fingerprint(build())
    assert model_fingerprint(build()) == first
    assert model_fingerprint(build("taylor", sliding_window=7)) != first
    changed = build()
    with torch.no_grad():
        next(iter(changed.model.layers[1].parameters())).view(-1)[0] += 1e-3
    assert model_fingerprint(changed) != first
