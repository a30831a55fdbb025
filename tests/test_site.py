"""The documentation's site: dead links are found, formulas become MathML, code fits its column."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def site(folder, body):
    """A site of two pages, the first with `body`."""
    (folder / "log").mkdir()
    (folder / "picture.svg").write_text("<svg/>")
    (folder / "index.html").write_text(f"<html><body id='top'>{body}</body></html>")
    (folder / "log" / "page.html").write_text(
        "<h2 id='heading'>Heading</h2><a href='../index.html#top'>up</a>"
    )
    return tool("links").dead_links(folder)


@pytest.mark.parametrize(
    "body",
    [
        "<a href='log/page.html'>page</a>",
        "<a href='log/page.html#heading'>anchor</a>",
        "<a href='#top'>here</a>",
        "<a href='https://example.org/x#y'>elsewhere</a>",
        "<img src='picture.svg'>",
    ],
)
def test_living_links_pass(tmp_path, body):
    assert site(tmp_path, body) == []


@pytest.mark.parametrize(
    "body",
    [
        "<a href='gone.html'>page</a>",
        "<a href='../DESIGN.md'>outside the site</a>",
        "<a href='log/page.html#gone'>anchor</a>",
        "<a href='#gone'>anchor of the same page</a>",
        "<a href='log/'>folder</a>",
        "<img src='gone.svg'>",
        "<script src='gone.js'></script>",
        "<script src='https://example.org/library.js'></script>",
        "<link rel='stylesheet' href='https://example.org/style.css'>",
    ],
)
def test_dead_links_are_found(tmp_path, body):
    found = site(tmp_path, body)
    assert len(found) == 1
    assert found[0].startswith("index.html: ")


def test_formulas_become_mathml():
    pytest.importorskip("latex2mathml", reason="pip install '.[docs]'")
    write = tool("formulas").on_page_content
    page = write(
        r'<p>a <span class="arithmatex">\(x \le y\)</span></p><div'
        r' class="arithmatex">\[\frac{1}{2}\]</div>'
    )
    assert page.count("<math") == 2
    assert "<mfrac>" in page
    assert 'display="block"' in page
    assert "arithmatex" not in page
    assert write(r"<pre><code>\(x\)</code></pre>") == r"<pre><code>\(x\)</code></pre>"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT / "docs")))
def test_code_fits_its_column(page):
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    wide = [line for block in blocks for line in block.splitlines() if len(line) > 80]
    assert not wide


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT / "docs")))
def test_formulas_are_not_code(page):
    """An indented block outside a list would be a formula shown as code, cut off at the edge."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    options = re.sub(r"^:::.*\n( +.*\n)*", "", text, flags=re.MULTILINE)
    assert not re.search(r"\n\n    \S", options)


def test_the_site_defines_every_letter():
    """Letters of DESIGN.md's table are on the site's page of letters."""

    def letters(path):
        rows = re.findall(r"^\| (`.*?) \|", path.read_text(), re.MULTILINE)
        return {letter for row in rows for letter in re.findall(r"`(\w)`", row)}

    expected = letters(ROOT / "DESIGN.md")
    assert len(expected) > 10
    assert expected <= letters(ROOT / "docs" / "letters.md")


def documented(obj):
    """The names under "Args" of a docstring, where an entry may name several."""
    part = re.search(
        r"^Args:\n((?:    .*\n|\n)+)", inspect.cleandoc(obj.__doc__ or "") + "\n", re.MULTILINE
    )
    entries = re.findall(
        r"^    (\w[\w, ]*?)(?: \([^)]*\))?: ", part[1] if part else "", re.MULTILINE
    )
    return {name.strip() for entry in entries for name in entry.split(",")}


def accepted(obj):
    """The parameters of a function, or of a class's constructor and those that it extends."""
    makers = [c.__init__ for c in obj.__mro__[:-1]] if inspect.isclass(obj) else [obj]
    return {name for maker in makers for name in inspect.signature(maker).parameters}


@pytest.mark.parametrize(
    "module", ["cumulant", "cumulant.nn", "cumulant.models", "cumulant.interop"]
)
def test_documented_arguments_exist(module):
    """mkdocstrings cannot check entries that name several parameters."""
    module = importlib.import_module(module)
    public = [getattr(module, name) for name in module.__all__]
    callables = [x for x in public if inspect.isclass(x) or inspect.isfunction(x)]
    unknown = {
        x.__name__: documented(x) - accepted(x) for x in callables if documented(x) - accepted(x)
    }
    assert not unknown
    assert sum(len(documented(x)) for x in callables) > 10
