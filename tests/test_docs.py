"""The documentation's Python runs as it stands, and links between pages lead somewhere."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LENGTHS = {1024: "1k", 8192: "8k", 32768: "32k", 131072: "128k and more"}  # of docs/choosing.md
BLOCK = re.compile(r"(?:<!-- needs (\w+) -->\n)?```python\n(.*?)```", re.DOTALL)


def stand_in(scope):
    """The names that the block with fast_transformers defines, from the package's formula."""
    from .interop.test_fast_transformers import AttentionLayer, CausalLinearAttention

    x = scope["x"]
    scope["layer"] = AttentionLayer(CausalLinearAttention(), dim=64, heads=4, keys=16, values=16)
    scope["expected"] = scope["layer"](x, x, torch.ones(2, 100, dtype=torch.bool))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda p: p.stem
)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope, text = {}, page.read_text()
    for block in BLOCK.finditer(text):
        needed, code = block.groups()
        if needed and find_spec(needed) is None:
            if needed == "fast_transformers":
                stand_in(scope)
        else:
            above = "\n" * text.count(
                "\n", 0, block.start(2)
            )  # so that errors name the page's line
            exec(compile(above + code, str(page), "exec"), scope)
    assert len(scope) > 2


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize(
    "page",
    [*PAGES, *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("examples/*/*.md"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


def test_choosing_says_what_was_measured():
    """The page's figures for recall of 32 pairs are those of the report."""
    from cumulant.bench.recall.best import best_rates
    from cumulant.bench.reports.folder import Folder

    found = {
        (b.mechanism, b.width): b
        for b in best_rates(Folder.open(str(ROOT / "docs/reports/recall")).rows())
        if b.conv
    }

    def figures(mechanism):
        b = found[mechanism, 64]
        return f"{b.hardest_accuracy:.0%}", f"{b.state_bytes / 1000:.3g}"

    few, kept = figures("taylor-8")
    more, of_more = figures("taylor-16")
    based, of_based = figures("based")
    page = (ROOT / "docs" / "choosing.md").read_text()
    line = (
        f"Taylor attention recalls {few} from {kept} kB and {more} from {of_more}, Based {based}"
        f" from {of_based};"
    )
    assert line in page


def test_choosing_by_length_says_what_was_measured():
    """The tables' times and states of one attention layer are the report's."""
    from cumulant.bench.reports.folder import Folder

    rows = Folder.open(str(ROOT / "docs/reports/bench")).rows()
    found = {
        (row["pass"], row["mechanism"], row["length"]): row for row in rows if row.get("median")
    }
    table = (ROOT / "docs" / "choosing.md").read_text()
    lines = {
        length: table.split(f"\n| {name} |")[1].split("\n")[0] for length, name in LENGTHS.items()
    }
    for length, line in lines.items():
        training, taylor, softmax = (
            found.get((kind, mechanism, length))
            for kind, mechanism in (
                ("training", "taylor"),
                ("decode", "taylor"),
                ("decode", "softmax"),
            )
        )
        time = training["median"] * 1e3
        shown = f"{time:,.0f}" if time >= 1000 else f"{time:#.3g}".rstrip(".")
        assert f"{shown} ms" in line
        assert f"{taylor['median'] * 1e6:.0f} µs" in line
        assert f"{softmax['median'] * 1e6:,.0f} µs" in line
        if length > 1024:
            assert f"{taylor['peak_bytes'] / 2**20:.1f} MiB" in line
            assert f"{softmax['peak_bytes'] / 2**20:.0f} MiB" in line
    assert f"softmax {found['training', 'softmax', 1024]['median'] * 1e3:.1f} ms" in lines[1024]
    assert f"softmax {found['training', 'softmax', 8192]['median'] * 1e3:,.0f} ms" in lines[8192]
    assert f"{found['training', 'softmax', 16384]['median'] * 1e3:,.0f} ms at 16k" in lines[32768]
    assert f"{found['training', 'elita', 131072]['median'] * 1e3:.0f} ms" in lines[131072]


def test_the_figure_of_lengths_is_the_reports(tmp_path):
    """The script draws the committed picture from the committed rows."""
    import importlib.util

    path = ROOT / "docs/figures/lengths.py"
    spec = importlib.util.spec_from_file_location("lengths", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows, module.HERE = module.measured_rows(), tmp_path
    module.measured_rows = lambda: rows
    module.main()

    def numbers(file):
        return [float(x) for x in re.findall(r"[ML] ([\d.]+) [\d.]+", file.read_text())]

    drawn, kept = numbers(tmp_path / "lengths.svg"), numbers(path.with_suffix(".svg"))
    assert len(drawn) == len(kept) > 20


def test_approximation_says_what_was_measured():
    """The table of the page is the report's."""
    from cumulant.bench.approximation.report import REPORT, as_percent, median_errors, read_cases
    from cumulant.bench.reports.folder import Folder

    folder = Folder.open(str(ROOT / "docs/reports/approximation"))
    page = (ROOT / "docs" / "approximation.md").read_text()
    lines = [
        line
        for line in page.splitlines()
        if re.match(r"\| (random|LayerNorm|softmax|taylor), ?", line)
    ]
    found = median_errors(read_cases(folder.rows(REPORT.fields)))
    expected = [
        f"| {' | '.join([name, *map(as_percent, errors.values())])} |"
        for name, errors in found.items()
    ]
    assert lines == expected
