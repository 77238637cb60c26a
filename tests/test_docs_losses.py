"""The pages of the losses: every name has one, with its equation, its paper and a config that works."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

from prefopt import CPOConfig, DPOConfig, TPOConfig, losses
from prefopt.objective import DIVERGENCES, LOSSES, objective_mistakes
from prefopt.objective.tables import TOKEN_LOSSES

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(page.stem for page in (DOCS / "losses").glob("*.md") if page.stem != "index")
NAMES = [(method, name) for method in LOSSES for name in (*LOSSES[method], *TOKEN_LOSSES[method])]
OPTION_PAGES = {"f-divergences", "ld-dpo", "wpo", "mpo", "tr-dpo", "cpo-simpo"}


def page(name: str) -> str:
    return (DOCS / "losses" / f"{name}.md").read_text()


def index_rows() -> dict[tuple[str, str], str]:
    """(method, name) -> the page that the index links."""
    names = page("index").split("| option |")[0]
    found = re.findall(r"^\| \[([\w-]+)\]\(([\w-]+)\.md\) \| (DPO|CPO|TPO) \|", names, flags=re.MULTILINE)
    return {(method.lower(), name): target for name, target, method in found}


def test_the_index_has_every_name_and_no_other():
    assert sorted(index_rows()) == sorted(NAMES)


@pytest.mark.parametrize(("method", "name"), NAMES)
def test_every_name_has_a_page_that_shows_it(method, name):
    target = index_rows()[method, name]
    assert target in PAGES
    assert name in page(target)
    if method == "dpo":
        assert target == name


def test_every_page_is_linked_from_the_index():
    linked = set(re.findall(r"\(([\w-]+)\.md\)", page("index")))
    assert linked == set(PAGES)


@pytest.mark.parametrize("name", [*PAGES, "index"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page(name)):
        assert (DOCS / "losses" / target).resolve().exists(), target


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_an_equation_a_paper_and_a_comparison(name):
    text = page(name)
    (equation,) = re.findall(r"```math\n(.+?)\n```", text, flags=re.DOTALL)
    assert equation.count("{") == equation.count("}")
    assert len(re.findall(r"\\left[^a-z]", equation)) == len(re.findall(r"\\right[^a-z]", equation))
    assert re.search(r"arxiv\.org/abs/\d{4}\.\d{5}", text)
    assert "**When to use it.**" in text
    (table,) = re.findall(
        r"^\| \| (?:paper|source) \| prefopt \| TRL 1\.16 \|\n\|---\|---\|---\|---\|\n(.+?)\n\n", text, re.M | re.S
    )
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in table.splitlines()]
    assert all(len(row) == 4 for row in cells)


@pytest.mark.parametrize("name", PAGES)
def test_the_config_of_a_page_works_and_means_the_page(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"```python\n((?:DPO|CPO|TPO)Config\(.+?\))\n```", page(name), flags=re.DOTALL)
    config = eval(line.replace('("out", ', '("out", report_to="none", use_cpu=True, '), vars_of_configs())
    names = config.objective().names
    assert name in names or name in OPTION_PAGES | {"cpo", "tpo"}


def vars_of_configs() -> dict:
    return {"DPOConfig": DPOConfig, "CPOConfig": CPOConfig, "TPOConfig": TPOConfig}


def test_the_page_of_divergences_says_where_they_go():
    text = page("f-divergences")
    assert all(name.replace("_", r"\_") in text for name in DIVERGENCES)
    allowed, refused = text.split("A divergence goes with")[1].split("In the others")
    for name in LOSSES["dpo"]:
        smoothing = {"label_smoothing": 0.1}
        mistakes = objective_mistakes("dpo", loss_type=name, beta=0.1, f_divergence_type="js_divergence", **smoothing)
        assert f"`{name}`" in (refused if mistakes else allowed)


FUNCTIONS = [name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_says_its_equation_shapes_example_and_paper(name):
    doc = inspect.getdoc(getattr(losses, name)) or ""
    if name == "ascending":  # a helper of the sorted losses, no published function
        assert ">>>" in doc
        return
    first, equation = doc.split("\n\n")[:2]
    assert "\n" not in first
    assert equation.startswith("``")
    places = [doc.index(section) for section in ("Args:", "Returns:", "Example:", "References:")]
    assert places == sorted(places)
    assert re.search(r"arXiv:\d{4}\.\d{5}|\(2023\)", doc.split("References:")[1])
    assert re.search(r"\[(P|N|n|\.\.\.)\]", doc.split("Returns:")[1])


MODULES = [
    *(f"prefopt.losses.{path.stem}" for path in Path(losses.__file__).parent.glob("[a-z]*.py")),
    "prefopt.objective.core",
]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_examples_of_the_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_page_of_normalisation_runs():
    result = doctest.testfile(str(DOCS / "normalisation.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 20
    assert result.failed == 0
