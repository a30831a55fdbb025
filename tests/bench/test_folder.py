"""Folders of reports: rows that survive, settings that must agree, pages drawn again."""

import json

import pytest

from cumulant.bench.folder import LINES, Folder, environment
from cumulant.bench.page import Page, TableOf, write


def test_rows_are_kept_and_found_again(tmp_path):
    folder = Folder.start(str(tmp_path / "a"), "bench", {"lengths": (1, 2)})
    folder.append({"x": 1})
    again = Folder.start(str(tmp_path / "a"), "bench", {"lengths": [1, 2]})
    again.append({"x": 2})
    assert Folder.open(str(tmp_path / "a")).rows() == [{"x": 1}, {"x": 2}]
    assert again.environment == folder.environment


def test_a_line_cut_short_is_lost_alone(tmp_path):
    folder = Folder.start(str(tmp_path), "bench", {})
    folder.append({"x": 1})
    with (tmp_path / LINES).open("a") as lines:
        lines.write('{"x": 2')
    assert folder.rows() == [{"x": 1}]
    folder.append({"x": 3}, {"x": 4})
    assert folder.rows() == [{"x": 1}, {"x": 3}, {"x": 4}]


def test_other_measurements_are_not_overwritten(tmp_path):
    Folder.start(str(tmp_path), "bench", {"seed": 1}).append({"x": 1})
    for kind, settings in (("bench", {"seed": 2}), ("recall", {"seed": 1})):
        with pytest.raises(ValueError, match="another measurement.*--force"):
            Folder.start(str(tmp_path), kind, settings)
    assert Folder.start(str(tmp_path), "recall", {}, force=True).rows() == []
    assert Folder.open(str(tmp_path)).kind == "recall"
    Folder.start(str(tmp_path), "bench", {})  # there were no rows to lose
    assert Folder.open(str(tmp_path)).kind == "bench"


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        Folder.start(str(tmp_path), "bench", {})
    with pytest.raises(ValueError, match="holds something else"):
        Folder.start(str(tmp_path / "thesis.txt"), "bench", {})
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="not the folder of a report"):
            Folder.open(str(missing))


def test_environment_says_where_it_ran():
    found = environment()
    assert found["torch"]
    assert found["processor"]
    assert found["threads"] >= 1
    json.dumps(found)


def test_pages_are_whole_and_escape_what_they_are_given(tmp_path):
    folder = Folder.start(str(tmp_path), "bench", {"note": "<script>"})
    page = Page("a < b", ["x & y"], [TableOf("t", ("h",), [("<i>",)])], notes=["done"])
    text = write(folder, page).read_text()
    assert "<title>a &lt; b</title>" in text
    assert "&lt;i&gt;" in text
    assert "<script>" not in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert (tmp_path / "report.md").read_text().startswith("# a < b\n\nx & y")
