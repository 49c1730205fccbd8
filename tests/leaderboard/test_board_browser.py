"""The page in a browser: it sorts, filters, and fits."""

import shutil
import subprocess
from dataclasses import replace
from html import unescape

import pytest
from boards import COMMITTED, worst_of

from purify.leaderboard import read_runs, write_leaderboard


def opened(page, tmp_path, script="", address="", width=1280):
    """The DOM of a page after ``script`` ran in it, and the page's title, which the script may set to its findings."""
    driven = page.with_name("driven.html")
    tell = "setTimeout(() => parent.postMessage(document.documentElement.outerHTML, '*'), 100)"
    driven.write_text(page.read_text().replace("</body>", f"<script>{script};{tell}</script></body>"))
    frame = f'<iframe src="driven.html{address}" style="width: {width}px; height: 800px; border: 0"></iframe>'
    told = "<script>addEventListener('message', e => { document.documentElement.innerHTML = e.data; })</script>"
    page.with_name("frame.html").write_text(f"<!doctype html>{told}{frame}")  # a window is never as narrow as a phone
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    chromium += [f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom"]
    address = page.with_name("frame.html").as_uri()
    dom = subprocess.run([*chromium, address], capture_output=True, text=True, check=True).stdout
    return dom, dom.split("<title>")[1].split("</title>")[0]


in_a_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")


@pytest.mark.slow
@in_a_browser
def test_the_page_sorts_and_filters_in_a_browser(run, certified, tmp_path):
    rows, found = read_runs([run, *certified])
    full = replace(rows[1], name="full", reduced=False, clean=worst_of(rows[1], 0.0).worst)
    write_leaderboard([*rows, full, worst_of(full, 1.0)], tmp_path, found)
    script = (
        "document.querySelectorAll('#board thead button')[4].click();"
        "const f=document.querySelector('[name=q]');f.value='diffpure';"
        "f.dispatchEvent(new Event('input', {bubbles: true}));"
        "for (const t of document.querySelectorAll('table')) if (t.id !== 'board') t.querySelector('button').click();"
    )
    dom, _ = opened(tmp_path / "index.html", tmp_path, script)
    assert "2 of 10 rows" in dom
    assert dom.count('aria-sort="descending"') == 3
    heads = [row.split("</th>")[0] for row in dom.split('<th scope="row" rowspan="')[1:]]
    names = [head[3:].split("</small>")[0].replace("<small>", ", ") for head in heads]
    assert names[0] == "full, digits-standard"  # before all others, which have reduced budgets
    assert heads[0].startswith("3")  # with a weaker measurement below
    clean = {f"{r.title}, {r.classifier}": r.clean["mean"].value for r in rows}
    values = [clean[n.removesuffix(", adversarial training")] for n in names[1:5]]
    assert values == sorted(values, reverse=True)
    assert [n.split(",")[0] for n in names[5:]] == ["ssn", "dssn", "multiscale", "cohen 0.25", "cohen 0.1"]


@pytest.mark.slow
@in_a_browser
def test_filters_stand_in_the_address(run, certified, tmp_path):
    """Each is read from it, all are written to it, and Clear empties it."""
    rows, found = read_runs([run, *certified])
    rows = [replace(row, failed_checks=("c",) * (row.name == "diffpure")) for row in rows]
    write_leaderboard(rows, tmp_path, found)
    names = {row.name: row.title for row in rows}
    seen = (
        "document.title = [...document.querySelectorAll('tbody')].filter(e => e.checkVisibility())"
        ".map(e => e.querySelector('th').firstChild.textContent).sort().join() + location.hash"
    )
    expected = {
        "#threat=Linf+0.3": names.values(),
        "#classifier=digits-at": ["no purifier"],
        "#classifier=digits-standard&threat=L1+radius": ["dssn", "ssn"],
        "#threat=L2+radius&q=0.25": ["cohen 0.25"],
        "#threat=Linf+0.3&passed=on": [names[row.name] for row in rows if not row.marked],
        "#dataset=digits&threat=L1+radius&passed=on": ["dssn", "ssn"],
        "#dataset=unknown": [*names.values(), *(row.name for row in found)],
    }
    for address, shown in expected.items():
        _, title = opened(tmp_path / "index.html", tmp_path, seen, address)
        assert unescape(title) == ",".join(sorted(shown)) + address
    script = (
        "document.querySelector('[name=passed]').click();"
        "const f = document.querySelector('[name=threat]'); f.value = 'L1 radius';"
        "f.dispatchEvent(new Event('input', {bubbles: true}));" + seen
    )
    _, title = opened(tmp_path / "index.html", tmp_path, script, "#q=dssn")
    assert unescape(title) == "dssn#q=dssn&threat=L1+radius&passed=on"
    script = f"document.querySelector('[type=reset]').click(); setTimeout(() => {{ {seen} }}, 50)"
    _, title = opened(tmp_path / "index.html", tmp_path, script, "#q=dssn")
    assert title == ",".join(sorted([*names.values(), *(row.name for row in found)]))


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("width", [1280, 1000, 390])
def test_no_column_is_lost(width, tmp_path):
    """The committed page: what is wider than the page scrolls, with a hint; on a phone nothing is."""
    shutil.copytree(COMMITTED, tmp_path / "board", ignore=shutil.ignore_patterns("runs"))
    script = (
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "const wide = [...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth);"
        "const cells = [...document.querySelectorAll('tr.main > *')].filter(c => c.getBoundingClientRect().width < 20);"
        "const fits = document.documentElement.scrollWidth <= innerWidth;"
        "const told = wide.every(s => s.tabIndex === 0 && s.previousElementSibling.checkVisibility());"
        "document.title = [innerWidth, fits, told, wide.length > 0, cells.length].join()"
    )
    _, title = opened(tmp_path / "board" / "index.html", tmp_path, script, width=width)
    assert title == f"{width},true,true,{'true' if width == 1000 else 'false'},0"
