"""Pages in a browser: nothing is fetched, nothing fails, every image shows, and text can be read in light and dark.

They need Chromium and its driver (Debian: `apt-get install chromium chromium-driver`); without, they are skipped.
"""

import json
import shutil

import pytest
import torch

from latelier import run
from latelier.evaluation.results import Measurement, write_measurements
from latelier.images import make_grid, save_png
from latelier.recipe import build_recipe
from latelier.report.comparison import write_comparison
from latelier.report.run import write_report
from latelier.report.tables import RunSummary
from latelier.study import inspect as inspection

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
)  # fmt: skip
READABLE = 4.5  # contrast of text (WCAG 2.2, criterion 1.4.3)
IMAGES = """
const done = arguments[0], images = [...document.querySelectorAll("main img")];
images.forEach(image => image.loading = "eager");
Promise.allSettled(images.map(image => image.decode())).then(
  () => done(images.map(image => image.naturalWidth * image.naturalHeight)));
"""
COLOURS = """
const ground = e => { const c = getComputedStyle(e).backgroundColor;
  return c.endsWith(", 0)") && e.parentElement ? ground(e.parentElement) : c; };
return [...document.querySelectorAll("h1, p, .soft, .verdict b, .verdict li > div, td, th, .tile b, a, summary")].map(
  e => [e.outerHTML.slice(0, 60), getComputedStyle(e).color, ground(e)]);
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    from selenium.webdriver.chrome.service import Service

    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = selenium.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report, the page of an inspection and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    image = make_grid(torch.rand(4, 3, 8, 8), 2)
    for name in ("samples/grid", "samples/nearest", "reconstructions", "error-map", "latent-map", "channels"):
        save_png(image, folder / "run" / f"{name}.png")
    rows = [{"stage": "tokenizer", "images": 64 * i, "loss": 1 / i, "lr": 1e-4, "seconds": 2.0} for i in range(1, 41)]
    (folder / "run" / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [
        Measurement("psnr", 17.0, {"n": 100, "warning": "n is small", "reference": "photos"}, (16.0, 18.0)),
        Measurement("latent-std", 6.8, {"n": 100, "by_channel": [1.0, 1.1, 9.0, 0.9]}),
        *(Measurement(f"prefix-psnr@{k}", 14.0 + k, {"prefix": k}) for k in (1, 2, 3, 4)),
        Measurement("codebook-usage", 0.95, {}),
    ]
    write_measurements(folder / "run" / "metrics.json", found, "latent space")
    shown = [
        RunSummary(name, {m.name: {"value": m.value, "interval": m.interval, "receipt": m.receipt} for m in found},
                   images={"reconstructions": folder / "run" / "reconstructions.png"})
        for name in ("one", "two")
    ]  # fmt: skip
    comparison = write_comparison(folder / "both", "Two", "About both.", shown, {"Numbers": ["psnr"]}, None)
    return {"report": write_report(folder / "run"), "inspection": inspected(folder), "comparison": comparison}


def inspected(folder):
    """The page of a tokenizer whose latents are the pixels."""
    data = {"source": "emoji", "image_size": 8, "length": 64}
    tree = {"name": "pixels", "runs": str(folder), "data": data, "tokenizer": {"kind": "identity"}}
    run.complete(build_recipe({**tree, "evaluate": {"metrics": []}}))
    metrics = "evaluate.metrics=[l1,psnr,spectrum,channels,posterior,equivariance,smoothness]"
    inspection.inspect(str(folder / "pixels"), "emoji", 8, 64, folder / "judged", [metrics])
    return folder / "judged" / "report.html"


def visit(browser, path):
    """Open a page; what it complained of, and what it asked the network for."""
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri())
    pixels = browser.execute_async_script(IMAGES)
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    fetched = [url for url in asked if not url.startswith(("data:", path.as_uri(), "about:"))]
    return browser.get_log("browser"), fetched, pixels


@pytest.mark.parametrize("kind", ["report", "inspection", "comparison"])
def test_a_page_needs_nothing_else(browser, pages, kind):
    complaints, fetched, pixels = visit(browser, pages[kind])
    assert (complaints, fetched) == ([], [])
    assert pixels
    assert min(pixels) > 0
    assert browser.execute_script("return document.querySelectorAll('h2').length") > 2


def test_what_is_wrong_is_seen(browser, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text('<main><img src="http://127.0.0.1:9/x.png"></main><script>throw new Error("no")</script>')
    complaints, fetched, pixels = visit(browser, broken)
    assert any("Error: no" in entry["message"] for entry in complaints)
    assert (fetched, pixels) == (["http://127.0.0.1:9/x.png"], [0])


def test_the_verdict_stands_in_front(browser, pages):
    visit(browser, pages["inspection"])
    assert browser.execute_script("return document.querySelector('h2').textContent") == "Verdict"
    assert browser.execute_script("return document.querySelectorAll('.verdict li').length") >= 1


def test_an_image_grows_when_clicked(browser, pages):
    visit(browser, pages["report"])
    opened = "return document.querySelector('dialog').open"
    assert not browser.execute_script(opened)
    browser.execute_script("document.querySelector('main img').click()")
    assert browser.execute_script(opened)
    browser.execute_script("document.querySelector('dialog').click()")
    assert not browser.execute_script(opened)


def test_a_page_fits_a_telephone(browser, pages):
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for path in pages.values():
            visit(browser, path)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, path
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser, pages, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for path in pages.values():
        visit(browser, path)
        backgrounds = {ground for *_, ground in browser.execute_script(COLOURS)}
        assert (max(map(luminance, backgrounds)) > 0.5) == (scheme == "light")
        faint = [row for row in browser.execute_script(COLOURS) if contrast(*row[1:]) < READABLE]
        assert faint == []


def luminance(colour):
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.2)."""
    levels = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(ink, ground):
    dark, light = sorted((luminance(ink), luminance(ground)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_of_known_colours():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)
