"""The report command: its file in a real browser, and what it refuses."""

import json
import shutil
import sys
import time
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("bokeh")

from marginops.commands import cli
from marginops.training import RunRecorder, TrainingDynamics, report_epoch
from marginops.training.recording import folder as folders

SAMPLES, CLASSES, EPOCHS = 400, 4, 6
EVIL = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
IDLE = "window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle"


def record(folder, report=True, epochs=EPOCHS, share=0.5):
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, 8, generator=random)
    network = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    target = torch.arange(SAMPLES) % CLASSES
    recorder = RunRecorder(
        folder, TrainingDynamics(SAMPLES), name=EVIL, class_names=[EVIL, "two", "three"]
    )
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(SAMPLES, generator=random)[: int(share * SAMPLES)].split(50):
            logits = epoch * torch.eye(CLASSES)[target[rows]]
            noise = 2 * torch.randn(len(rows), CLASSES, generator=random)
            recorder.update(rows, logits + noise, target[rows])
        seen = report_epoch(network, inputs, target) if report else None
        recorder.end_epoch(epoch, report=seen, loss=1 / epoch, rate=0.1)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torchmetrics")
    return record(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


class Page:
    """A page of a browser without network, and what it asked for and complained of."""

    def __init__(self, browser, file, width=1400):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        self.page = self.context.new_page()
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda message: message.type == "error" and self.errors.append(message.text),
        )
        begin = time.monotonic()
        self.page.goto(file.as_uri())
        self.page.wait_for_function(IDLE, timeout=30_000)
        self.seconds = time.monotonic() - begin

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


def run(*arguments):
    return cli.main(["report", *map(str, arguments)])


def samples_module(tmp_path, monkeypatch, body):
    name = f"samples_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(f"import numpy as np\ndef show(index):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield_name = f"{name}:show"
    monkeypatch.delitem(sys.modules, name, raising=False)
    return yield_name


@pytest.fixture(scope="module")
def written(folder):
    file = folder.parent / "report.html"
    assert run(folder, "--output", file) == 0
    return file


@pytest.mark.parametrize("width", [1400, 500])
def test_the_file_opens_without_network_and_without_errors(written, browser, width):
    with Page(browser, written, width) as opened:
        assert opened.errors == []
        known = "file:", "data:", "blob:"
        assert [url for url in opened.requests if not url.startswith(known)] == []
        titles = opened.page.eval_on_selector_all("h2", "found => found.map(e => e.textContent)")
        assert {"Accuracy", "Data map", "Neural collapse", "Class geometry"} <= set(titles)
        assert opened.page.locator(".missing").count() == 0
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        for section in opened.page.locator("section").all():
            assert section.bounding_box()["height"] > 150


def test_the_slider_changes_the_histogram(written, folder, browser):
    with Page(browser, written) as opened:
        state = """() => {
            const source = Bokeh.documents[0].get_model_by_name("histogram")
            const slider = Bokeh.documents[0].get_model_by_name("epoch")
            return [Array.from(source.data.share), Array.from(source.data.to), slider.value]
        }"""
        after, edges, place = opened.page.evaluate(state)
        assert place == EPOCHS - 1
        track = opened.page.locator("#histogram .noUi-base").first
        box = track.bounding_box()
        opened.page.mouse.click(box["x"] + 0.4 * box["width"], box["y"] + box["height"] / 2)
        opened.page.wait_for_function(
            "Bokeh.documents[0].get_model_by_name('epoch').value == 2", timeout=5000
        )
        first, _, _ = opened.page.evaluate(state)
    for shares, epoch in ((first, 2), (after, EPOCHS - 1)):
        quantiles = folders.read(folder).epochs[epoch]["margins"]
        assert sum(shares) == pytest.approx(100, abs=0.01)
        below = sum(share for share, edge in zip(shares, edges, strict=True) if edge <= 1e-9)
        assert below == pytest.approx(100 * np.mean(np.array(quantiles) < 0), abs=1)
    assert first != after


def test_a_tooltip_tells_the_sample_and_shows_its_text_as_text(
    folder, browser, tmp_path, monkeypatch
):
    name = samples_module(tmp_path, monkeypatch, f"return {EVIL!r} + f' text {{index}}'")
    file = tmp_path / "report.html"
    assert run(folder, "--output", file, "--samples", name) == 0
    assert "<script>document.title" not in file.read_text(encoding="utf-8")
    with Page(browser, file) as opened:
        opened.page.locator("#data-map").scroll_into_view_if_needed()
        place = opened.page.evaluate(
            """() => {
            const page = Bokeh.documents[0]
            const source = page.get_model_by_name("data map")
            const shows = drawn => drawn.data_source === source
            const drawn = Bokeh.index.find_one(page.roots().find(r => r.renderers?.some(shows)))
            const canvas = drawn.canvas_view.el.getBoundingClientRect()
            const i = Array.from(source.data.y).findIndex(y => y > 0.4)
            const x = drawn.frame.x_scale.compute(source.data.x[i])
            const y = drawn.frame.y_scale.compute(source.data.y[i])
            return [canvas.x + x, canvas.y + y]
        }"""
        )
        opened.page.mouse.move(place[0] - 30, place[1] - 30)
        opened.page.mouse.move(place[0], place[1], steps=5)
        tooltip = opened.page.locator(".sample").first
        tooltip.wait_for(timeout=5000)
        shown = tooltip.inner_text()
        assert "label:" in shown and "predicted:" in shown and "<script>" in shown
        assert "text " in shown
        assert opened.page.title() == EVIL  # as text, and nothing of it has run
        assert opened.page.locator("#label-issues td script").count() == 0
        assert opened.errors == []


def test_suspicious_labels_stand_in_their_order(folder, written):
    recorded = folders.read(folder)
    expected = recorded.dynamics.label_issues().indices[:100].tolist()
    text = written.read_text(encoding="utf-8")
    table = text[text.index('id="label-issues"') :].partition("</tbody>")[0]
    rows = table.split("<tr>")[2:]
    shown = [int(row.split("<td>")[2].partition("<")[0]) for row in rows]
    assert shown == expected
    # The class without a name is shown as its number.
    words = {"two", "three", "3"}
    labels = [row.split('"word">')[1].partition("</td>")[0] for row in rows]
    assert set(labels) - words == {
        "&lt;script&gt;document.title=&#x27;hacked&#x27;&lt;/script&gt;&lt;img src=x "
        "onerror=&quot;document.title=&#x27;hacked&#x27;&quot;&gt;"
    }


def test_panels_without_data_say_what_to_record(tmp_path, browser):
    folder = record(tmp_path / "run", report=False, epochs=1, share=1.0)
    assert run(folder, "--output", tmp_path / "report.html") == 0
    with Page(browser, tmp_path / "report.html") as opened:
        assert opened.errors == []
        missing = opened.page.locator(".missing").all_inner_texts()
    assert len(missing) == 3
    assert sum("Pass report=report_epoch" in text for text in missing) == 2
    assert "Every epoch visited all samples, so there was no selection." in missing


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ("return np.eye(100)", (64, 64)),
        ("return np.zeros((3, 20, 30), np.uint8)", (30, 20)),
        ("return np.ones((9, 7, 3))", (7, 9)),
    ],
)
def test_pictures_become_small_pngs(folder, tmp_path, monkeypatch, body, size):
    import base64
    import io

    from PIL import Image

    name = samples_module(tmp_path, monkeypatch, body)
    assert run(folder, "--output", tmp_path / "report.html", "--samples", name) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    content = (
        text[text.index('id="label-issues"') :]
        .partition("data:image/png;base64,")[2]
        .partition('"')[0]
    )
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert picture.size == size


@pytest.mark.slow
def test_60_000_samples_and_50_epochs_are_small_and_fast(tmp_path, browser):
    count = 60_000
    recorder = RunRecorder(tmp_path / "run", TrainingDynamics(count))
    random = torch.Generator().manual_seed(0)
    target = torch.arange(count) % 10
    for epoch in range(1, 51):
        rows = torch.randperm(count, generator=random)[: count // 2]
        logits = torch.randn(len(rows), 10, generator=random)
        recorder.update(rows, logits + 0.1 * epoch * torch.eye(10)[target[rows]], target[rows])
        recorder.end_epoch(epoch)
    file = tmp_path / "report.html"
    begin = time.process_time()
    assert run(tmp_path / "run", "--output", file) == 0
    assert time.process_time() - begin < 10
    assert file.stat().st_size < 5e6
    with Page(browser, file):
        pass  # the first page of a browser also starts its processes
    with Page(browser, file) as opened:
        # 2 s on a machine of its own; tests share theirs.
        assert opened.seconds < 8 and opened.errors == []


def refusal(capfd, *arguments):
    assert run(*arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("marginops report: ") and error.count("\n") == 1
    return error


def test_wrong_folders(folder, tmp_path, capfd):
    output = ["--output", tmp_path / "report.html"]
    assert "which is not there" in refusal(capfd, tmp_path / "none", *output)
    assert "which has no run.json" in refusal(capfd, tmp_path, *output)
    for name, content, message in (
        ("run.json", json.dumps({"format": "marginops run", "version": 7}), "got version 7"),
        ("epochs.jsonl", '{"epoch": 1', "damaged epochs.jsonl"),
        ("epochs.jsonl", '{"epoch": 1}\n', "damaged epochs.jsonl"),
        ("dynamics.pt", "x", "damaged dynamics.pt"),
    ):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "run")
        (tmp_path / "run" / name).write_text(content)
        assert message in refusal(capfd, tmp_path / "run", *output)
    assert not (tmp_path / "report.html").exists()


def test_wrong_options(folder, tmp_path, monkeypatch, capfd):
    output = ["--output", tmp_path / "report.html"]
    missing = refusal(capfd, folder, "--output", tmp_path / "none" / "report.html")
    assert "--output: expected a file in an existing folder" in missing
    for name in ("nothing", "no.such.module:show", "math:nothing", "math:pi"):
        assert "--samples" in refusal(capfd, folder, *output, "--samples", name)
    for number, (body, message) in enumerate(
        [
            ("raise KeyError(index)", "raised KeyError"),
            ("return np.zeros((2, 3, 4, 5))", "of shape [2, 3, 4, 5]"),
            ("return None", "expected a str, or an array"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        name = samples_module(tmp_path / str(number), monkeypatch, body)
        assert message in refusal(capfd, folder, *output, "--samples", name)
    find_spec = util.find_spec
    monkeypatch.setattr(
        "marginops.commands.report.run.find_spec",
        lambda name: None if name == "bokeh" else find_spec(name),
    )
    assert 'pip install "marginops[report]"' in refusal(capfd, folder, *output)


def test_observe_writes_the_report(tmp_path, capfd):
    for package in ("sklearn", "scipy", "matplotlib", "tqdm", "torchmetrics"):
        pytest.importorskip(package)
    file = tmp_path / "report.html"
    figure = ["--output", str(tmp_path / "figure.png")]
    small = ["observe", "--epochs", "2", "--hidden", "8", "--quiet", *figure]
    assert cli.main([*small, "--report", str(file)]) == 0
    assert f"wrote {file}" in capfd.readouterr().out
    text = file.read_text(encoding="utf-8")
    assert "marginops observe: MLP 64-8-10" in text and "data:image/png" in text
    assert 'class="missing"' in text  # every epoch visited all samples
    assert cli.main([*small, "--report", str(tmp_path)]) == 2
    assert "--report: expected a file, got the folder" in capfd.readouterr().err
    assert not Path("report.html").exists()
