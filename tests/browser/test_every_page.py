"""What index and article share: themes, sizes, print, copying, accessibility."""

import json

import pytest

from stiefel.papers import get

PAGES = ("index.html", "papers/s4d.html")
INK = "getComputedStyle(document.body).color"
LIGHT, DARK = "rgb(28, 29, 32)", "rgb(231, 229, 224)"


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(tab, site, axe, page, scheme):
    tab.look(scheme=scheme)
    tab.go(site / page)
    assert tab.js(INK) == (LIGHT if scheme == "light" else DARK)
    tab.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    tab.js(axe + "; true")
    found = tab.js("axe.run().then(r => JSON.stringify([r.violations, r.passes.length]))")
    violations, passes = json.loads(found)
    assert passes > 15
    assert [(v["id"], v["nodes"][0]["html"][:200], len(v["nodes"])) for v in violations] == []


def test_axe_would_find_something(tab, site, axe):
    tab.go(site / "index.html")
    tab.js("document.querySelector('.counts').classList.add('grey')")
    tab.js(
        "(() => { const s = new CSSStyleSheet(); s.replaceSync('.grey span {color: #aaa}'); "
        "document.adoptedStyleSheets = [s]; "
        "document.querySelector('h3').replaceWith(document.createElement('h6')); "
        "document.querySelector('#search').removeAttribute('placeholder'); "
        "document.querySelector('.search span').remove(); })()"
    )
    tab.js(axe + "; true")
    found = tab.js("axe.run().then(r => r.violations.map(v => v.id))")
    assert {"color-contrast", "label"} <= set(found)


def test_theme_is_chosen_and_kept(tab, site):
    tab.look(scheme="dark")
    tab.go(site / "index.html")
    assert tab.js("document.querySelector('.theme').textContent") == "Light"
    tab.click(".theme")
    assert tab.js(INK) == LIGHT
    tab.go(site / "papers/s4d.html")
    assert tab.js(INK) == LIGHT  # against the system, on every page
    tab.click(".theme")
    assert tab.js(INK) == DARK
    tab.look(scheme="light")
    assert tab.js(INK) == DARK


def test_code_is_copied(tab, site):
    tab.go(site / "papers/s4d.html")
    tab.click("#use + .code .copy")
    tab.wait("document.querySelector('#use + .code .copy').textContent", "Copied")
    assert tab.js("navigator.clipboard.readText()") == get("s4d").snippet.strip("\n")
    tab.click("#repeat + .code .copy")
    tab.wait("document.querySelector('#repeat + .code .copy').textContent", "Copied")
    assert tab.js("navigator.clipboard.readText()").startswith("stiefel reproduce s4d --scale")
    tab.wait("document.querySelector('#use + .code .copy').textContent", "Copy")


def test_without_a_clipboard_the_code_is_selected(tab, site):
    tab.go(site / "papers/s4d.html")
    tab.js("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    tab.click("#repeat + .code .copy")
    tab.wait("document.querySelector('#repeat + .code .copy').textContent", "Selected")
    assert tab.js("String(getSelection())").startswith("stiefel reproduce s4d")


@pytest.mark.parametrize("width", [320, 768, 2560])
def test_every_width(tab, site, width):
    tab.look(width, 800)
    for page in [*PAGES, *(f"papers/{slug}.html" for slug in ("learned-sor", "lemon"))]:
        tab.go(site / page)
        assert tab.js("document.documentElement.scrollWidth") <= width, page
        # Nothing that can be clicked lies outside.
        outside = tab.js(
            "[...document.querySelectorAll('main a, button, input, select')].filter(e => "
            "e.checkVisibility() && !e.closest('.scroll, pre')).filter(e => { "
            "const b = e.getBoundingClientRect(); "
            f"return b.width && (b.left < 0 || b.right > {width} + 0.5); }}).map(e => e.outerHTML)"
        )
        assert outside == [], page
    tab.go(site / "index.html")
    tops = tab.js(
        "[...document.querySelectorAll('.topic .card')].slice(0, 6)"
        ".map(c => Math.round(c.getBoundingClientRect().y))"
    )
    assert tops.count(tops[0]) == {320: 1, 768: 2}.get(width, 5)


def test_on_paper(tab, site):
    tab.look(media="print", scheme="dark")
    for page in PAGES:
        tab.go(site / page)
        for selector in (".tools", ".theme", ".copy", ".skip", ".topics", ".around"):
            visible = f"[...document.querySelectorAll('{selector}')].some(e => e.checkVisibility())"
            assert tab.js(visible) is False, selector
        assert tab.js(INK) == "rgb(0, 0, 0)"
        assert tab.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(tab.call("Page.printToPDF")["data"]) > 10_000


def test_the_report_is_filled_in(tab, site):
    tab.go(site / "papers/s4d.html")
    link = tab.js("document.querySelector('a.report').href")
    text = tab.js("new URL(document.querySelector('a.report').href).searchParams.get('body')")
    assert link.startswith("mailto:?subject=")
    for word in ("Commit: ", "Machine: ", "Mean: ", "seed 2: ", "stiefel reproduce s4d"):
        assert word in text.replace("\r", "")


def test_the_policy_stops_what_is_not_ours(chromium, site):
    with chromium.tab() as tab:
        tab.go(site / "index.html")
        tab.js(
            "(() => { const s = document.createElement('script'); s.textContent = 'window.x = 1'; "
            "document.body.append(s); const i = new Image(); i.src = 'https://example.org/a.png'; "
            "document.body.append(i); fetch('https://example.org/').catch(() => 0); })()"
        )
        tab.wait("typeof window.x", "undefined")
        tab.js("new Promise(r => setTimeout(r, 100))")
        assert not [url for url in tab.requests if url.startswith("http")]
        assert len([e for e in tab.errors if "Content Security Policy" in e]) >= 3
