"""The report: one page that stands alone, and says what the table says."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from sharpkern import cli
from sharpkern.sweep.diagrams import Map, Square, boundary, heatmap, rounded
from sharpkern.sweep.grid import Cell, read_sweep
from sharpkern.sweep.report import write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome", "chrome"))), None
)
TEXT = """
loss = "mse"
steps = 40
[sweep]
lr_unit = "1/sharpness"
[sweep.grid]
model.parameterisation = ["sp", "mup"]
optimizer.lr = [1, 2, 4, 8, 16, 32, 64]
optimizer.warmup_steps = [1, 4, 16, 64, 256]
seed = [0, 1]
"""


def ending(cell: Cell) -> str:
    """A made-up boundary: SP holds 4 sqrt(T) (seed 1: half of it), muP 8."""
    o, c = cell.config.optimizer, cell.config
    limit = 8.0 if c.model.parameterisation == "mup" else 4 * math.sqrt(o.warmup_steps) / (1 + c.seed)
    return "trained" if o.lr <= limit else "failed" if o.lr <= 2 * limit else "diverged"


def finish(cell: Cell) -> None:
    """Write what a run would leave behind."""
    status, o = ending(cell), cell.config.optimizer
    rows = []
    for step in range(1, 41):
        lr, sharpness = o.lr / 20 * min(1.0, step / o.warmup_steps), 20 * 0.97**step
        rows.append(
            {"step": step, "loss": 0.9**step, "lr": lr, "sharpness": sharpness, "preconditioned_sharpness": None,
             "threshold": 2 / lr, "ratio": lr * sharpness / 2}
        )  # fmt: skip
    if status == "diverged":
        rows = [*rows[:5], {"step": 6, "loss": None, "diverged": True}]
    result = {
        "status": status, "learning_rate": o.lr / 20, "steps": 40, "best_test_accuracy": 0.5 + o.lr / 200,
        "best_test_loss": 0.05 / o.lr, "train_accuracy": 0.8, "train_loss": 0.01, "initial_sharpness": 20.0,
        "initial_curvature": 20.0, "crossing_step": 3, "crossing_lr": 0.12, "crossing_sharpness": 15.0, "catapults": 2,
        "largest_catapult": 1.5, "largest_drop": 0.25, "regime": "C2", "trend": 0.75, "regime_is_sure": False,
        "near_threshold": 0.5, "seconds": 1.5, "critical_lr": 0.15,
        "T_reach": 7, "T_save": o.warmup_steps / 2 - 4,
    }  # fmt: skip
    cell.folder.mkdir(parents=True)
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (cell.folder / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweeps") / "warmup"
    out.mkdir()
    (out / "sweep.toml").write_text(TEXT)
    for cell in read_sweep(out / "sweep.toml", out).cells:
        finish(cell)
    assert cli.main(["report", str(out)]) == 0
    return out


class Page(HTMLParser):
    """The page's text by tag, its images and what it loads from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            assert values["alt"]
            self.images.append(values["src"] or "")
        self.links += [v for key in ("src", "href") if (v := values.get(key))]


def test_page_stands_alone_and_its_images_lie_beside_it(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    files = {path.read_bytes() for path in (folder / "figures").glob("*.png")}
    assert len(files) == 2 * 5  # accuracy, loss, T_reach, T_save, trajectories
    inside = {base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in page.images}
    assert inside == files
    assert all(link.startswith("data:") for link in page.links)


def test_page_says_what_the_table_says(folder: Path) -> None:
    text = re.sub(r"<[^>]+>", "|", (folder / "report.html").read_text())
    text = re.sub(r"[|\s]*\|[|\s]*", "|", text)
    trained = sum(ending(c) == "trained" for c in read_sweep(folder / "sweep.toml", folder).cells)
    assert f"140 cells: {trained} trained" in text
    assert "Best test accuracy: 0.820, by|parameterisation=sp,lr=64,warmup_steps=256,seed=0" in text
    assert "|warmup steps|seed 0|seed 1|1|4|2|4|8|4|16|16|8|64|32|16|256|≥ 64|32|" in text
    assert "From 1 to 256 warmup steps the boundary moves by a factor of 16 (each seed: 16, 16)" in text
    assert "|1|diverged|step 3|0.12|0.75|2|× 1.5|25%|C2 ?|" in text
    assert "lr_unit = &quot;1/sharpness&quot;" in text


def test_boundary_runs_between_squares_that_differ() -> None:
    held, lost = Square(0.5, 2, 3), Square(None, 1, 3, "div.")
    content = Map([1, 2], [1, 4], {(1, 1): held, (2, 1): lost, (1, 4): held, (2, 4): held}, (0, 1), ".2f", "viridis")
    assert sorted(boundary(content)) == [[(0.5, -0.5), (0.5, 0.5)], [(0.5, 0.5), (1.5, 0.5)]]
    missing = Map([1, 2], [1], {(1, 1): held}, (0, 1), ".2f", "viridis")
    assert boundary(missing) == []


@pytest.mark.parametrize("colours", ["viridis", "viridis_r", "cividis", "cividis_r"])
@pytest.mark.parametrize("values", [(7.0, 7.0), (1.0, 7.0)])
def test_numbers_stand_out_from_their_squares(tmp_path: Path, colours: str, values: tuple[float, float]) -> None:
    squares = {(x, 1): Square(value, 1, 1) for x, value in zip((1, 2), values, strict=True)}
    heatmap(Map([1, 2], [1], squares, (min(values), max(values)), ".0f", colours), "", "", tmp_path / "map.png")
    picture = imread(tmp_path / "map.png")[..., :3]
    grey = picture @ np.array([0.3, 0.59, 0.11])
    tops, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    for top in tops[np.argsort(counts)[-4:]]:  # the page's white and the squares' colours
        where = np.argwhere((picture == top).all(-1))
        (y0, x0), (y1, x1) = where.min(0), where.max(0)
        shown = grey[y0 : y1 + 1, x0 : x1 + 1]
        assert shown.max() - shown.min() > 0.4


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(-0.4, ".0f", "0"), (-0.6, ".0f", "-1"), (-0.001, ".2f", "0.00"), (0.1, "#.2g", "0.10"), (12.0, ".0f", "12")],
)
def test_what_rounds_to_zero_has_no_sign(value: float, form: str, text: str) -> None:
    assert rounded(value, form) == text


def test_unfinished_sweep_needs_partial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.toml").write_text("[sweep.grid]\noptimizer.lr = [1, 2, 4]\n")
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "nowhere is not a sweep's folder: it has no sweep.toml."),
        ([str(tmp_path), "--partial"], "3 of 3 cells are not finished: call sharpkern sweep again."),
    ):
        assert cli.main(["report", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
    finish(read_sweep(tmp_path / "sweep.toml", tmp_path).cells[0])
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "2 of 3 cells are not finished" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    assert cli.main(["report", str(tmp_path), "--partial"]) == 0
    assert "1 trained, 2 unfinished" in (tmp_path / "report.html").read_text()


def test_sweep_in_which_nothing_trained_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text("[sweep.grid]\noptimizer.lr = [100, 200]\n")
    for cell in read_sweep(tmp_path / "sweep.toml", tmp_path).cells:
        finish(cell)
    text = write_report(tmp_path).read_text()
    assert "No cell trained" in text
    assert "2 diverged" in text


PROBE = """<script>
const errors = [];
window.addEventListener("error", e => errors.push(e.message || "an element did not load"), true);
window.addEventListener("load", () => {
  const images = [...document.images];
  const broken = images.filter(i => !(i.complete && i.naturalWidth > 0)).length;
  const boxes = [...document.querySelectorAll("h1,h2,h3,p,figcaption,img,td,th,pre")]
    .map(e => e.getBoundingClientRect());
  let overlaps = 0;
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const a = boxes[i], b = boxes[j];
    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1) overlaps++;
  }
  const found = {errors, images: images.length, broken, overlaps, width: window.innerWidth,
                 content: document.documentElement.scrollWidth, narrowest: Math.min(...images.map(i => i.width))};
  parent.postMessage(JSON.stringify(found), "*");
});
</script>"""
# a frame, because Chromium's own window is at least 500 pixels wide
FRAME = """<!doctype html><style>body {{ margin: 0 }} iframe {{ border: 0; height: 900px; width: {width}px }}</style>
<script>onmessage = event => document.documentElement.setAttribute("data-found", event.data);</script>
<iframe src="{page}"></iframe>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(folder: Path, tmp_path: Path, width: int) -> None:
    page = tmp_path / "probed.html"
    page.write_text((folder / "report.html").read_text().replace("<head>", "<head>" + PROBE))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, page=page.as_uri()))
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--virtual-time-budget=9000", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1280,900", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    raw = re.search(r'data-found="([^"]*)"', done.stdout)
    assert raw is not None, done.stderr[-2000:]
    found = json.loads(raw[1].replace("&quot;", '"'))
    assert (found["errors"], found["images"], found["broken"], found["overlaps"]) == ([], 10, 0, 0)
    assert found["width"] == width and found["content"] <= width
    assert found["narrowest"] >= 340
