"""The HTML report in a real browser, as wide as a phone and as a desk: no overflow, no errors, not blank."""

import html
import json
import re
import shutil
import subprocess

import pytest
from peft_kernels.bench.case import Case
from peft_kernels.bench.html import html_report
from PIL import Image

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESK, HEIGHT = 390, 1280, 3000
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

MEASURE = """
<script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, shown = each => each.getBoundingClientRect().width > 0;
    const texts = [...page.querySelectorAll("svg text")].filter(shown);
    const size = each => each.ownerSVGElement.getScreenCTM().a * parseFloat(getComputedStyle(each).fontSize);
    return {
      width: page.documentElement.clientWidth,
      content: page.documentElement.scrollWidth,
      scrolling: [...page.querySelectorAll(".box")].filter(box => box.scrollWidth > box.clientWidth).length,
      smallest: Math.min(...texts.map(size)),
      charts: [...page.querySelectorAll("svg[role=img]")].filter(shown).length,
      outside: texts.filter(each => {
        const text = each.getBoundingClientRect(), chart = each.ownerSVGElement.getBoundingClientRect();
        return text.left < chart.left - 1 || text.right > chart.right + 1;
      }).map(each => each.textContent),
    };
  });
  console.error("planted");
  document.body.replaceChildren(JSON.stringify(found));
};
</script>
"""


@pytest.fixture
def browse(tmp_path, result_of, report_of, with_flops):
    """Opens a report in frames of both widths (windows have 500 pixels or more): stdout and stderr."""
    cases = [
        Case("linear", "nf4_linear", m, 4096, 11008, weight="nf4", dtype=dtype, label="llama-3.1-8b:gate,up")
        for m in (1, 16, 4096)
        for dtype in ("float32", "bfloat16")
    ]
    ours = {"scratch_bytes": 1 << 20, "saved_bytes": 8, "error": 1e-7, "tolerance_used": 0.1}
    ratios = {"eager": 30.0, "bitsandbytes": 2.0, "bitsandbytes_repacked": 0.6, "dense": None}
    results = [with_flops(result_of(case, ms=case.m, ours=ours, **ratios)) for case in cases]
    page = html.escape(html_report(report_of("quick", results)))

    def browse(*options, script=""):
        frames = "".join(
            f'<iframe srcdoc="{page}" style="border: 0; width: {width}px; height: {HEIGHT}px"></iframe>'
            for width in (PHONE, DESK)
        )
        style = "<style>body { margin: 0; display: flex }</style>"
        document = f"<!DOCTYPE html><meta charset=utf-8>{style}<body>{frames}</body>{script}"
        (tmp_path / "frames.html").write_text(document)
        command = [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
            *(f"--window-size={PHONE + DESK},{HEIGHT}", *options, (tmp_path / "frames.html").as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, done.stderr

    return browse


def test_nothing_overflows_and_the_console_is_silent(browse):
    out, err = browse("--dump-dom", script=MEASURE)
    phone, desk = json.loads(html.unescape(re.search(r"\[\{.*\}\]", out)[0]))
    for found, width in ((phone, PHONE), (desk, DESK)):
        assert found["width"] == width
        assert found["content"] == width  # the page itself never scrolls sideways
        assert found["charts"] == 5  # the roofline for this width; time and share of two dtypes
        assert found["smallest"] > 9  # pixels
        assert found["outside"] == []
    assert phone["scrolling"] > 0  # tables do, in their boxes
    assert desk["scrolling"] == 0
    consoles = [line for line in err.splitlines() if "CONSOLE" in line]
    assert len(consoles) == 1, consoles
    assert "planted" in consoles[0]


@pytest.mark.parametrize(("scheme", "dark"), [(1, False), (0, True)])
def test_a_screenshot_shows_a_page(browse, tmp_path, scheme, dark):
    path = tmp_path / "page.png"
    browse(f"--screenshot={path}", f"--blink-settings=preferredColorScheme={scheme}")
    with Image.open(path) as image:
        assert image.size == (PHONE + DESK, HEIGHT)
        for left, right in ((0, PHONE), (PHONE, PHONE + DESK)):
            part = image.convert("RGB").crop((left, 0, right, HEIGHT))
            colours = sorted(part.getcolors(1 << 24), reverse=True)
            (area, page), lightness = colours[0], sum(colours[0][1]) / 3
            assert (lightness < 64) == dark, page
            assert area < 0.97 * part.width * part.height  # text, lines and bars cover more than 3 %
            reds = sum(n for n, (red, _, blue) in colours if red > blue + 80)
            blues = sum(n for n, (red, _, blue) in colours if blue > red + 80)
            assert reds > 500  # losses
            assert blues > 500  # wins
