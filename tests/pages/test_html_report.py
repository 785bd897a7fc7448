"""The page of an analysis: the right numbers, nothing from elsewhere, nothing half written, readable everywhere."""

from __future__ import annotations

import base64
import copy
import io
import os
import random
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
import torch
from problems import loader, module, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torch_influence import BaseInfluenceModule, CGInfluenceModule, ConvergenceWarning
from torch_influence.pages._page import png

pytestmark = pytest.mark.filterwarnings("error")
VOID = {"meta", "img", "br"}
NASTY = "<script>alert('1')</script> & \"both\" <b>"


class Page(HTMLParser):
    """A page taken apart: sections by id or heading, and all attributes; tags must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.figures: list[dict[str, Any]] = []
        self.section = self.heading = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in given.items()]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section, self.heading = given.get("id", ""), ""
        if tag == "h3":
            self.heading = ""
        if tag == "figure":
            self.figures.append({"section": self.section, "under": self.heading, "text": "", "bars": []})
        if tag == "img":
            self.figures[-1]["image"] = given["src"]
        if tag == "data":
            self.figures[-1] |= {"score": float(given["value"]), "class": given["class"]}
        if tag == "rect":
            self.figures[-1]["bars"].append((given["class"], int(given["data-count"])))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))
        if self.open and self.open[-1] in ("h2", "h3"):
            self.heading += data
        if "figure" in self.open:
            self.figures[-1]["text"] += data

    def text(self) -> str:
        return "".join(data for tags, data in self.texts if "style" not in tags)

    def side(self, section: str, heading: str) -> list[tuple[int, float]]:
        """Indices and scores under a heading."""
        cards = [card for card in self.figures if card["section"] == section and card["under"].startswith(heading)]
        return [(int(card["text"].split("#")[1].split(" ")[0]), card["score"]) for card in cards if "score" in card]


def pairs(ranking: Any, row: int) -> list[tuple[int, float]]:
    # From another solve, to 1e-12 of its right-hand side, of a system of condition below 1e3.
    scores = (pytest.approx(score, rel=1e-9) for score in ranking.values[row].tolist())
    return list(zip(ranking.indices[row].tolist(), scores, strict=True))


# -- the numbers ------------------------------------------------------------------------------------------------------


def test_every_index_and_score_is_that_of_helpful_and_harmful(tmp_path: Path) -> None:
    it = module()
    page = Page(it.report(tmp_path / "page.html", [4, 0, 6], k=3))
    helpful, harmful = it.helpful([4, 0, 6], k=3), it.harmful([4, 0, 6], k=3)
    matrix = it.influence_matrix(test_idxs=[4, 0, 6])
    for row, q in enumerate([4, 0, 6]):
        assert page.side(f"q{q}", "Most helpful") == pairs(helpful, row)
        assert page.side(f"q{q}", "Most harmful") == pairs(harmful, row)
        query, histogram, *cards = (card for card in page.figures if card["section"] == f"q{q}")
        x, y = it.test_loader.dataset[q]
        loss = nn.functional.cross_entropy(it.model(x[None]), y[None])
        assert f"test loss {float(loss.detach()):.4g}" in query["text"]
        assert f"Query {q}, label {int(y)}" in page.text()
        for kind, count in (("helpful", (matrix[:, row] > 0).sum()), ("harmful", (matrix[:, row] < 0).sum())):
            assert sum(height for of, height in histogram["bars"] if of == kind) == count
            assert f"{int(count)} {kind}" in histogram["text"]
        for card in cards:
            assert f"{card['score']:+.4g}" in card["text"]
            assert card["class"] == ("helpful" if card["score"] > 0 else "harmful")
            x, y = it.train_loader.dataset[int(card["text"].split("#")[1].split(" ")[0])]
            assert f"label {int(y)}" in card["text"]
            assert all(f"{value:.4g}" in card["text"] for value in x.tolist())


def test_chosen_training_examples_and_self_influence(tmp_path: Path) -> None:
    it, some = module(), [20, 3, 11, 8, 5]
    page = Page(it.report(tmp_path / "page.html", [1], k=2, train_idxs=some, self_influences=3))
    assert page.side("q1", "Most helpful") == pairs(it.helpful([1], 2, some), 0)
    own = it.self_influences(some)[None].topk(3)
    expected = [(some[position], score) for position, score in pairs(own, 0)]
    assert page.side("", "Largest self-influence") == expected
    assert "5 of them to choose from" in page.text()
    assert "Solves for self-influence" in page.text()
    assert "self-influence" not in Page(it.report(tmp_path / "page.html", [1])).text()


def test_settings_plan_and_reports_are_there(tmp_path: Path) -> None:
    it = module(damp=1.25)
    text = Page(it.report(tmp_path / "page.html", [0, 1], title="A title")).text()
    assert str(it.last_report) in text
    for step in it.explain(2).steps:
        assert step.part in text
        assert step.path in text
        assert all(reason in text for _, reason in step.why_not)
    for told in ("A title", "CGInfluenceModule", "Hessian", "1.25", "23 training examples", "7 test examples"):
        assert told in text
    for told in ("No warning was given", "float64 on cpu", f"torch {torch.__version__}", "changes when that one"):
        assert told in text
    assert "Gauss-Newton of" in Page(module(gnh=True).report(tmp_path / "page.html", [0])).text()


def test_warnings_are_on_the_page_and_given_all_the_same(tmp_path: Path) -> None:
    it = module(rtol=1e-12, maxiter=1)
    with pytest.warns(ConvergenceWarning) as given:
        page = Page(it.report(tmp_path / "page.html", [0], self_influences=1))
    assert len({str(warning.message) for warning in given}) == len(given)
    assert {warning.filename for warning in given} == {__file__}
    for warning in given:
        assert f"ConvergenceWarning: {warning.message}" in page.text()
    assert "NOT CONVERGED" in page.text()


def test_warnings_are_given_when_it_fails_too(tmp_path: Path) -> None:
    it = module(rtol=1e-12, maxiter=1)
    it._problem.mean_test_loss = lambda *_: 1 / 0
    with pytest.warns(ConvergenceWarning), pytest.raises(ZeroDivisionError):
        it.report(tmp_path / "page.html", [0])
    assert os.listdir(tmp_path) == []


def test_a_module_that_reports_no_solve(tmp_path: Path) -> None:
    class Identity(BaseInfluenceModule):
        batched = True

        def inverse_hvp(self, vec: Tensor) -> Tensor:
            return vec

    it = module(Identity)
    page = Page(it.report(tmp_path / "page.html", [2]))
    assert page.side("q2", "Most helpful")[0] == pairs(it.helpful([2], k=1), 0)[0]
    assert "no report: this module's inverse_hvp makes none" in page.text()


# -- what is shown ----------------------------------------------------------------------------------------------------


class Listed(Dataset):
    """Examples as they are."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Any:
        return self.examples[i]


def listed(n: int, seed: int, of: Any) -> DataLoader:
    """The numbers of ``loader``, in the data set as ``of(i, x, y)``."""
    x, y = loader(n, seed=seed).dataset.tensors
    examples = [of(i, x[i], y[i]) for i in range(n)]
    places = {id(example): i for i, example in enumerate(examples)}

    def collate(batch: list[Any]) -> Any:
        where = [places[id(example)] for example in batch]
        return x[where], y[where]

    return DataLoader(Listed(examples), batch_size=5, collate_fn=collate)


def of(example: Any) -> Any:
    return module(train_loader=listed(23, 2, example), test_loader=listed(7, 3, example))


def test_texts_and_labels_are_escaped(tmp_path: Path) -> None:
    class_name = type(NASTY, (type(network()),), {})
    it = of(lambda i, x, y: {"text": f"{i} {NASTY}", "label": NASTY})
    it.model.__class__ = class_name
    page = Page(it.report(tmp_path / "page.html", [0], title=NASTY))
    tags = {tag for tag, _, _ in page.attributes} | {tag for tags, _ in page.texts for tag in tags}
    assert not tags & {"script", "b"}
    cards = [card for card in page.figures if "score" in card]
    assert len(cards) == 12
    assert all(f"{card['text'].split('#')[1].split(' ')[0]} {NASTY}" in card["text"] for card in cards)
    assert page.text().count(f"label {NASTY}") == 12 + 1  # and the query's heading
    assert page.texts[[tags[-1:] for tags, _ in page.texts].index(("title",))][1] == NASTY


def test_names_of_features_are_those_given(tmp_path: Path) -> None:
    page = Page(module().report(tmp_path / "page.html", [0], k=1, feature_names=["a<b", "c", "d", "e"]))
    assert [data for tags, data in page.texts if tags[-1:] == ("th",)].count("a<b") == 3
    assert "<b" not in page.source.replace("<br>", "").replace("<body>", "")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_the_pixels_that_show_returns(tmp_path: Path, channels: int) -> None:
    image = pytest.importorskip("PIL.Image")
    it = module()

    def pixels(x: Tensor) -> Tensor:
        return x.reshape(1, 2, 2).expand(channels, 2, 2).sigmoid()

    page = Page(it.report(tmp_path / "page.html", [3], k=2, show=lambda example: (pixels(example[0]), "a thing")))
    cards = [card for card in page.figures if "image" in card]
    assert len(cards) == 1 + 4
    for card in cards:
        kind, _, content = card["image"].partition(",")
        assert kind == "data:image/png;base64"
        read = np.asarray(image.open(io.BytesIO(base64.b64decode(content))))
        index, which = (3, it.test_loader) if "score" not in card else (int(card["text"].split("#")[1][:2]), None)
        x = (which or it.train_loader).dataset[index][0]
        shown = (255 * pixels(x)).round().to(torch.uint8)
        np.testing.assert_array_equal(read, shown[0] if channels == 1 else shown.permute(1, 2, 0))
    assert page.text().count("label a thing") == 5


@pytest.mark.parametrize("shape", [(1, 1), (3, 300), (4, 5, 3), (4, 5, 4)])
def test_png_files_are_read_by_others(shape: tuple[int, ...]) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(image.open(io.BytesIO(png(pixels)))), pixels)


# -- what it does not do ----------------------------------------------------------------------------------------------


def varied(tmp_path: Path) -> dict[str, Path]:
    """Pages with images, texts and rows."""
    long = "a long text that goes on " * 60 + "x" * 500
    pages = {
        "rows": module().report(tmp_path / "rows.html", [0, 1], self_influences=4),
        "texts": of(lambda i, x, y: (f"{long} {NASTY}" if i % 2 else "short", f"label{'y' * 90}")).report(
            tmp_path / "texts.html", [0]
        ),
        "images": module().report(
            tmp_path / "images.html", range(7), show=lambda example: (example[0].reshape(2, 2), example[1])
        ),
        "wide": module().report(tmp_path / "wide.html", [0], show=lambda example: torch.rand(3, 300, 900)),
    }
    return pages


def test_a_page_asks_for_nothing(tmp_path: Path) -> None:
    for path in varied(tmp_path).values():
        page = Page(path)
        assert "://" not in page.source
        assert "url(" not in page.source
        assert "@import" not in page.source
        assert not {tag for tag, _, _ in page.attributes} & {"script", "link", "iframe", "object", "embed", "form"}
        for tag, name, value in page.attributes:
            assert not name.startswith("on")
            if name in ("src", "srcset", "href", "poster", "action", "data"):
                assert (tag, value[: len("data:image/png;base64,")]) == ("img", "data:image/png;base64,") or (
                    tag == "a" and value[0] == "#" and ("section", "id", value[1:]) in page.attributes
                )
        assert ("meta", "name", "viewport") in page.attributes
        policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
        assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_model_is_left_alone(tmp_path: Path) -> None:
    it = module()
    it.model.train()
    it.model[0].weight.grad = torch.ones_like(it.model[0].weight)
    before = copy.deepcopy(it.model.state_dict())
    it.report(tmp_path / "page.html", [0, 1])
    assert all(torch.equal(value, before[name]) for name, value in it.model.state_dict().items())
    assert it.model.training
    assert torch.equal(it.model[0].weight.grad, torch.ones(5, 4, dtype=torch.float64))


def test_what_show_draws_at_random_leaves_no_trace(tmp_path: Path) -> None:
    def noisy(example: Any) -> Tensor:
        return example[0] + torch.randn(4) + random.random() + np.random.rand()  # noqa: NPY002

    states = []
    for show in (noisy, None):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(5)
        module().report(tmp_path / "page.html", [0, 1], show=show)
        states.append((torch.rand(3).tolist(), random.random(), np.random.rand()))  # noqa: NPY002
    assert states[0] == states[1]


def test_without_matplotlib_it_is_the_same_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("matplotlib", "PIL")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("matplotlib", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    page = Page(module().report(tmp_path / "page.html", [0], show=lambda example: example[0].reshape(2, 2)))
    assert sum("image" in card for card in page.figures) == 13
    assert sum(bool(card["bars"]) for card in page.figures) == 1


# -- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, it = tmp_path / "page.html", module()
    path.write_text("what was there")
    half = Path.write_text

    def full(self: Path, text: str, **options: Any) -> None:
        half(self, text[:1000], **options)
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            it.report(path, [0])
    assert path.read_text() == "what was there"
    assert os.listdir(tmp_path) == ["page.html"]
    assert it.report(str(path), [0]) == path
    assert path.read_text().endswith("</html>\n")
    assert os.listdir(tmp_path) == ["page.html"]
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # not that of a private temporary file


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"test_idxs": []}, ValueError, "expected at least one index, got none"),
        ({"train_idxs": []}, ValueError, "expected at least one index, got none"),
        ({"test_idxs": [0, 0]}, ValueError, "test_idxs"),
        ({"test_idxs": [7]}, IndexError, "test_idxs"),
        ({"k": 0}, ValueError, "top_k: expected at least 1, got 0"),
        ({"k": 1.5}, TypeError, "top_k: expected an integer, got 1.5"),
        ({"self_influences": -1}, ValueError, "self_influences: expected a number of examples, at least 0, got -1"),
        ({"path": "nowhere/page.html"}, FileNotFoundError, "path: expected a file in a folder that exists"),
        ({"feature_names": ["a"]}, ValueError, "feature_names: expected 4"),
        ({"show": lambda example: 1 / 0}, ZeroDivisionError, "division by zero"),
    ],
)
def test_wrong_arguments_are_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    it = module(CGInfluenceModule)
    monkeypatch.setattr(it, "explain", lambda queries: pytest.fail("began to work"))
    with pytest.raises(error, match=message):
        it.report(**({"path": "page.html", "test_idxs": [0]} | arguments))
    assert os.listdir(tmp_path) == []


# -- in a browser -----------------------------------------------------------------------------------------------------


def test_it_reads_well_on_a_phone_and_on_a_desk(tmp_path: Path) -> None:
    """No message, no request, nothing wider than the window, no tiny letters; light and dark."""
    program = chromium.find()
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    pages = varied(tmp_path)
    with chromium.Chromium(program, tmp_path) as browser:
        for name, path in pages.items():
            papers = set()
            for width, height, dark in ((360, 740, False), (1280, 900, True)):
                browser.open(path, width, height, dark=dark)
                assert browser.value("innerWidth") == width
                assert browser.value("document.documentElement.scrollWidth") <= width, (name, width)
                inside = "[...document.body.querySelectorAll('*')]"
                over = browser.value(
                    f"{inside}.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
                )
                assert over == [], (name, width)
                assert browser.value(f"Math.min(...{inside}.map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 12
                assert browser.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
                papers.add(browser.value("getComputedStyle(document.body).backgroundColor"))
                if folder := os.environ.get("PICTURES"):  # to look at
                    browser.picture(Path(folder) / f"{name}-{width}.png")
            assert len(papers) == 2
    assert browser.requests == []
    assert browser.complaints == []
