"""Folders of reports: rows that survive, settings that must agree, pages drawn again."""

import io
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from cumulant.bench.redraw import redraw
from cumulant.bench.reports.environment import environment, revision
from cumulant.bench.reports.folder import ROWS_FILE, Folder
from cumulant.bench.reports.page import Page, Table, write_page


def test_rows_are_kept_and_found_again(tmp_path):
    folder = Folder.start(str(tmp_path / "a"), "test", {"lengths": (1, 2)})
    folder.append({"x": 1})
    again = Folder.start(str(tmp_path / "a"), "test", {"lengths": [1, 2]})
    again.append({"x": 2})
    assert Folder.open(str(tmp_path / "a")).rows() == [{"x": 1}, {"x": 2}]
    assert again.environment == folder.environment


def test_a_line_cut_short_is_lost_alone(tmp_path):
    folder = Folder.start(str(tmp_path), "test", {})
    folder.append({"x": 1})
    with (tmp_path / ROWS_FILE).open("a") as lines:
        lines.write('{"x": 2')
    assert folder.rows() == [{"x": 1}]
    folder.append({"x": 3}, {"x": 4})
    assert folder.rows() == [{"x": 1}, {"x": 3}, {"x": 4}]


def test_other_measurements_are_not_overwritten(tmp_path):
    Folder.start(str(tmp_path), "test", {"seed": 1}).append({"x": 1})
    for kind, settings in (("test", {"seed": 2}), ("other", {"seed": 1})):
        with pytest.raises(ValueError, match="another measurement.*--force"):
            Folder.start(str(tmp_path), kind, settings)
    assert Folder.start(str(tmp_path), "other", {}, force=True).rows() == []
    assert Folder.open(str(tmp_path)).kind == "other"
    Folder.start(str(tmp_path), "test", {})  # there were no rows to lose
    assert Folder.open(str(tmp_path)).kind == "test"


def test_a_folder_that_another_process_fills_is_refused(tmp_path):
    script = f"""
from cumulant.bench.reports.folder import Folder
folder = Folder.start({str(tmp_path)!r}, "test", {{}})
folder.append({{"x": 1}})
print("begun", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "begun\n"
        for force in (False, True):
            with pytest.raises(ValueError, match="another run is filling"):
                Folder.start(str(tmp_path), "test", {}, force=force)
        assert Folder.open(str(tmp_path)).rows() == [
            {"x": 1}
        ]  # reading it and drawing from it is not refused
        other.kill()  # nothing is left locked
    assert Folder.start(str(tmp_path), "test", {}).rows() == [{"x": 1}]


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(ValueError, match="holds something else"):
            Folder.start(str(tmp_path), "test", {}, force=force)
    with pytest.raises(ValueError, match="holds something else"):
        Folder.start(str(tmp_path / "thesis.txt"), "test", {})
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="not the folder of a report"):
            Folder.open(str(missing))


def test_what_may_become_more_goes_on(tmp_path):
    """Seeds and rates may be added; no other setting may change."""
    start = {"rates": [1, 2], "seeds": 2, "steps": 5}
    Folder.start(str(tmp_path), "other", start).append({"x": 1})
    extends = ("rates", "seeds")
    for other in ({"rates": [1, 3]}, {"seeds": 1}, {"steps": 6}, {"more": 1}):
        with pytest.raises(ValueError, match="another measurement"):
            Folder.start(str(tmp_path), "other", start | other, extends=extends)
    with pytest.raises(ValueError, match="another measurement"):
        Folder.start(str(tmp_path), "other", start | {"seeds": 3})
    more = start | {"rates": [0, 1, 2], "seeds": 3}
    Folder.start(str(tmp_path), "other", more, extends=extends).append({"x": 2})
    kept = Folder.open(str(tmp_path))
    assert kept.settings == more
    assert kept.rows() == [{"x": 1}, {"x": 2}]


def test_another_environment_is_noted(tmp_path, monkeypatch):
    """Rows of another revision or machine are marked, and the page says so."""
    first = {**environment(), "time": "noon", "revision": "a1", "threads": 2}
    monkeypatch.setattr("cumulant.bench.reports.folder.environment", lambda: dict(first))
    Folder.start(str(tmp_path), "test", {"threads": 1, "device": "cpu"}).append({"x": 1})
    first["time"] = "one"
    again = Folder.start(str(tmp_path), "test", {"threads": 1, "device": "cpu"})
    assert again.environments() == [{**first, "time": "noon"}]
    first |= {"time": "two", "revision": "b2"}
    again = Folder.start(str(tmp_path), "test", {"threads": 1, "device": "cpu"})
    again.append({"x": 2})
    assert again.rows() == [{"x": 1}, {"x": 2}]
    first |= {"time": "three", "revision": "a1"}
    again = Folder.start(str(tmp_path), "test", {"threads": 1, "device": "cpu"})
    assert [e["revision"] for e in again.environments()] == ["a1", "b2", "a1"]
    page = write_page(again, Page("t", ["a"])).read_text()
    assert "<dt>from three on</dt><dd>revision a1</dd>" in page
    assert "<dt>from two on</dt><dd>revision b2</dd>" in page
    assert "<dt>threads</dt><dd>1</dd>" in page  # what was asked, not what there is
    assert "<dt>device</dt><dd>cpu</dd>" in page


def test_the_revision_covers_the_whole_package(tmp_path, monkeypatch):
    package = tmp_path / "src" / "cumulant"
    (package / "bench").mkdir(parents=True)
    (package / "bench" / "a.py").write_text("")
    (package / "ops.py").write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    monkeypatch.setattr("cumulant.bench.reports.environment.PACKAGE", package)
    assert revision() is None
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    assert re.fullmatch("[0-9a-f]{12}", revision())
    (package / "ops.py").write_text("changed")
    assert re.fullmatch("[0-9a-f]{12}[+]", revision())


def test_environment_says_where_it_ran():
    found = environment()
    assert found["torch"]
    assert found["processor"]
    assert found["threads"] >= 1
    json.dumps(found)


def test_pages_are_whole_and_escape_what_they_are_given(tmp_path):
    folder = Folder.start(str(tmp_path), "test", {"note": "<script>"})
    page = Page("a < b", ["x & y"], [Table("t", ("h",), [("<i>",)])], notes=["done"])
    text = write_page(folder, page).read_text()
    assert "<title>a &lt; b</title>" in text
    assert "&lt;i&gt;" in text
    assert "<script>" not in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert (tmp_path / "report.md").read_text().startswith("# a < b\n\nx & y")


HEADER = {
    "kind": "bench",
    "settings": {"mechanisms": ["linear"], "passes": ["forward"]},
    "environment": {},
}
ROW = {"length": 8, "pass": "forward", "mechanism": "linear", "status": "measured"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["[]"], "is not the folder of a report"),
        (["3"], "is not the folder of a report"),
        (["null"], "is not the folder of a report"),
        (["{}"], "is not the folder of a report"),
        ([json.dumps({**HEADER, "kind": ["bench"]})], "is not the folder of a report"),
        ([json.dumps({**HEADER, "settings": []})], "is not the folder of a report"),
        ([json.dumps({**HEADER, "environment": "mine"})], "is not the folder of a report"),
        ([json.dumps(HEADER), "[1, 2]"], r"rows.jsonl: line 2 is no row: \[1, 2\]"),
        ([json.dumps(HEADER), "7"], "line 2 is no row: 7"),
        (
            [json.dumps(HEADER), json.dumps(ROW), '{"length": 8}'],
            "line 3 is no row of 'cumulant bench': it has no 'pass'",
        ),
        (
            [json.dumps(HEADER), json.dumps(ROW)],
            "cannot be drawn: its rows are not what 'cumulant bench' writes",
        ),
        ([json.dumps(HEADER), json.dumps({**ROW, "median": "fast"})], "cannot be drawn"),
        (
            [json.dumps({**HEADER, "kind": "elsewhere"}), json.dumps(ROW)],
            "which this version does not know",
        ),
        ([json.dumps(HEADER), '{"len'], "has no rows yet"),
    ],
)
def test_rows_that_no_command_wrote(lines, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        redraw(str(tmp_path), Console(file=io.StringIO()))
