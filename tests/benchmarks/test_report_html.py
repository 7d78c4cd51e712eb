"""The page as a browser sees it."""

import dataclasses
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.reporting import results

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
VOID = {"meta", "link", "br", "img", "input", "hr"}


@pytest.fixture(scope="module")
def page(gpu_folder) -> str:
    return report.render_html(results.load(gpu_folder), gpu_folder)


class Reader(HTMLParser):
    """Collects elements and complains where one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed(page):
    assert page.startswith("<!DOCTYPE html>")
    elements = Reader(page).elements
    assert [tag for tag, _ in elements].count("h1") == 1
    assert sum(tag == "svg" for tag, _ in elements) == 23
    with pytest.raises(AssertionError):
        Reader("<p><b></p>")


def test_page_ids_are_unique_and_links_have_targets(page):
    elements = Reader(page).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    links = [attributes["href"] for _, attributes in elements if "href" in attributes]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)
    labels = {attributes["aria-labelledby"] for _, attributes in elements if "aria-labelledby" in attributes}
    assert labels <= set(ids)


def test_page_loads_nothing(page):
    elements = Reader(page).elements
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in elements}
    for tag, attributes in elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "data", "action", "xlink:href"):
                assert value.startswith("#"), (tag, name, value)
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) == {"#"}
    assert "default-src 'none'" in page


def test_page_escapes_hostile_text(fixtures, rewrite):
    evil = '<script>alert("1")</script>'

    def edit(data):
        data["machine_info"]["gptfast"]["device"] = evil
        data["not_measured"][0]["reason"] = evil
        for item in data["benchmarks"]:
            if item["extra_info"]["case"] == "bfloat16 512x4096":
                item["extra_info"]["case"] = evil
            if item["extra_info"]["provider"] == "Liger-Kernel":
                item["extra_info"]["provider"] = "$a_b$ & <b>"

    path = rewrite(fixtures / "fixture-gpu" / "operators.json", edit)
    text = report.render_html(results.load(path), path.parent)
    assert "script" not in {tag for tag, _ in Reader(text).elements}
    assert "<script" not in text
    assert html.escape(evil, quote=False).replace('"', "&#34;") in text
    drawn = [found for found in re.findall(r"<text[^>]*>(.*?)</text>", text) if "a_b" in found]
    assert drawn
    assert set(drawn) == {"$a_b$ &amp; &lt;b&gt;"}, "set as a formula"


def test_page_marks_losses_by_more_than_a_color(page):
    cells = re.findall(r'<td class="loss">([^<]*)</td>', page)
    assert cells
    assert all(cell.endswith("▼") for cell in cells)
    assert page.count("▼</td>") == len(cells)
    assert "slower" in page


def framed(page: str, width: int) -> str:
    """The page in a frame of this width, for a window cannot be as narrow as a telephone; with what was measured.

    Elements that stick out of the frame count, unless they lie in a container of their own that scrolls.
    """
    measure = """
    const view = document.querySelector("iframe").contentDocument, root = view.documentElement;
    const tables = [...view.querySelectorAll(".scroll")];
    const out = [...view.body.querySelectorAll("*")].filter(e => !e.closest(".scroll"))
        .filter(e => e.getBoundingClientRect().right > root.clientWidth + 0.5);
    Object.assign(document.body.dataset, {
        width: root.clientWidth, overflow: root.scrollWidth - root.clientWidth, out: out.length,
        scrolling: tables.filter(t => t.scrollWidth > t.clientWidth).length,
        color: view.defaultView.getComputedStyle(view.body).backgroundColor,
        text: view.defaultView.getComputedStyle(view.querySelector("svg text")).fill,
    });"""
    return (
        f'<!DOCTYPE html><body style="margin:0"><iframe style="border:0;width:{width}px;height:2000px" '
        f"srcdoc=\"{html.escape(page)}\" onload='{measure}'></iframe></body>"
    )


def measured(folder: Path, page: str, width: int, *options: str) -> dict[str, str]:
    """Open the framed page in the browser without a window."""
    path = folder / "page.html"
    path.write_text(framed(page, width), encoding="utf-8")
    fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    fixed += ["--virtual-time-budget=3000", "--dump-dom"]
    command = [BROWSER, *fixed, f"--user-data-dir={folder / 'profile'}", *options, path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    body = re.search(r"<body[^>]*>", dom)
    assert body is not None
    return dict(re.findall(r'data-(\w+)="([^"]*)"', body[0]))


needs_browser = pytest.mark.skipif(BROWSER is None, reason="found neither chromium nor google-chrome")


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_page_does_not_scroll_sideways(tmp_path, page, width):
    """Its tables do, in containers of their own."""
    found = measured(tmp_path, page, width)
    assert found["width"] == str(width)
    assert (found["overflow"], found["out"]) == ("0", "0")
    if width == 390:
        assert int(found["scrolling"]) > 20


@needs_browser
def test_page_breaks_long_words(stored, tmp_path):
    folder = stored / "fixture-cpu"
    run = results.load(folder)
    machine = run.machine.model_copy(update={"device": "x" * 200, "torch": "y" * 200})
    missing = run.not_measured.assign(reason="z" * 200)
    run = dataclasses.replace(run, machine=machine, not_measured=missing, problems=["w" * 200])
    found = measured(tmp_path, report.render_html(run, folder), 390)
    assert (found["overflow"], found["out"]) == ("0", "0")


@needs_browser
def test_page_turns_dark_with_its_figures(tmp_path, page):
    """Blink's settings: 0 prefers dark, 1 light."""
    dark, light = (measured(tmp_path, page, 1280, f"--blink-settings=preferredColorScheme={at}") for at in (0, 1))

    def brightness(color: str) -> float:
        return sum(map(int, re.findall(r"\d+", color)[:3])) / 3

    assert brightness(light["color"]) > 240 > 130 > brightness(light["text"])
    assert brightness(dark["color"]) < 40 < 120 < brightness(dark["text"])
