"""The documentation: its Python runs, its reference is whole, Sphinx is content."""

import pathlib
import pkgutil
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
import snippets
from waiting import HANGING_SECONDS

import nlcg_optax
from nlcg_optax import training

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {path.stem: path for path in sorted(DOCS.glob("*.md"))}
# Of the others all Python is the README's, which has a test of its own.
WITH_SNIPPETS = [
    name for name, path in PAGES.items() if snippets.snippets(path.read_text())
]


@pytest.mark.standard_promotion  # Flax promotes
@pytest.mark.parametrize(
    "name",
    [
        # Much as plain JAX's, and as long.
        pytest.param(name, marks=pytest.mark.long) if name == "haiku" else name
        for name in WITH_SNIPPETS
    ],
)
def test_snippets_run_in_order(name):
    path = PAGES[name]
    blocks = snippets.snippets(snippets.expanded(path))
    snippets.run(blocks, path)


def test_pages_have_snippets():
    assert {"algorithm", "checkpoints", "meshes", "quickstart", "tuning"} <= set(
        WITH_SNIPPETS
    )


@pytest.mark.parametrize(
    "name", ["flax_nnx", "flax_linen", "equinox", "haiku", "plain_jax"]
)
def test_guides_of_frameworks_have_all_that_a_loop_has(name):
    """What the common page promises of each; that it runs is tested above."""
    page = PAGES[name].read_text()
    code = "".join(snippets.snippets(page))
    assert "your_loop.md" in page and f"({name}.md)" in PAGES["your_loop"].read_text()
    for needed in (
        "nlcg_optax.value_grad_and_curvature(",
        "nlcg_optax.nlcg_auto()",
        "has_aux=True, microbatches=2",
        "bfloat16",
        "jax.random.fold_in(",
        "restored = checkpointer.restore(",
    ):
        assert needed in code, needed
    for needed in ("dropout", "BatchNorm", "mixed precision"):
        assert needed in page, needed


def test_the_lines_that_change_are_those_of_the_first_example():
    table = PAGES["your_loop"].read_text().split("with `nlcg_auto` | lines |")[1]
    rows = [line.split(" | ") for line in table.split("\n\n")[0].splitlines()]
    written = [code for row in rows if len(row) > 3 for code in row[2].split("`")[1::2]]
    assert len(written) == 6
    (example,) = snippets.snippets((ROOT / "README.md").read_text())
    example = example.replace("**given", "value=loss, curvature=curvature")
    for code in written:
        assert code in example, code


def test_the_chain_called_equal_to_nlcg_is():
    page = (DOCS / "quickstart.md").read_text()
    (chain,) = re.findall(
        r"```python\ntx = (optax\.chain\(\n    nlcg_optax.*?\n\))\n```", page, re.DOTALL
    )
    written = eval(chain, {"nlcg_optax": nlcg_optax, "optax": optax})
    alias = nlcg_optax.nlcg(0.04)
    x = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[1.0, 2.0], [-0.5, 1.0]])}
    states = [written.init(x), alias.init(x)]
    for loss in (3.0, 2.0, 2.5, 1.0, 4.0, 3.0):
        grads = jax.tree.map(lambda leaf, loss=loss: loss * leaf**3, x)
        (u, s), (v, t) = (
            tx.update(grads, state, x, value=loss)
            for tx, state in zip((written, alias), states, strict=True)
        )
        assert all((u[name] == v[name]).all() for name in x)
        states, x = [s, t], optax.apply_updates(x, u)


def entries(page):
    """What a page of the reference takes from docstrings, or describes itself."""
    directive = r"^\.\. (?:auto\w+|py:data):: nlcg_optax\.(.*)"
    return sorted(re.findall(directive, page.read_text(), re.MULTILINE))


def test_every_public_name_is_in_the_reference_once():
    beta = [f"beta.{name}" for name in nlcg_optax.beta.__all__]
    kinds = [f"matrices.{name}" for name in nlcg_optax.matrices.__all__]
    names = [*nlcg_optax.__all__, *beta, *kinds]
    assert entries(DOCS / "api" / "index.md") == sorted(names)


def test_every_module_of_training_is_in_the_reference_once():
    modules = pkgutil.iter_modules(training.__path__)
    assert entries(DOCS / "api" / "training.md") == sorted(
        f"training.{module.name}" for module in modules
    )


def test_files_that_markdown_links_to_exist():
    made = (DOCS / "_build", DOCS / "notebooks", DOCS / "project")
    missing = []
    for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("b*/**/*.md")):
        if any(path.is_relative_to(folder) for folder in made):
            continue
        links = re.findall(r"\[[^\]]*\]\(([^)#\s]+)(?:#\S*)?\)", path.read_text())
        for link in links:
            target = path.parent / link
            # Sphinx checks the links to what it makes.
            if "://" not in link and target.parent not in made and not target.exists():
                missing.append(f"{path.relative_to(ROOT)}: {link}")
    assert not missing


def test_sphinx_builds_without_warnings(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-n", "-W", "--keep-going"]
        + ["-d", tmp_path / "doctrees", DOCS, tmp_path / "html"],
        capture_output=True,
        text=True,
        timeout=HANGING_SECONDS,
    )
    assert built.returncode == 0, built.stderr
    html = tmp_path / "html"
    text = (html / "algorithm.html").read_text()
    assert 'class="math' in text and "fletcher_reeves" in text
    # Formulas are there without a script, and none is left as TeX.
    assert "<math" in text and "<mfrac>" in text and "\\frac" not in text
    # They break at wide spaces, and have a font that the site brings.
    assert "</math><math" in text and "qquad" not in text
    font = (html / "_static" / "math.woff").read_bytes()
    assert font[:4] == b"wOFF" and len(font) < 250_000
    assert "math.woff" in (html / "_static" / "site.css").read_text()
    # Signatures have types.
    signature = (
        (html / "api" / "index.html").read_text().split('id="nlcg_optax.nlcg"')[1]
    )
    assert "ScalarOrSchedule" in signature.split("</dt>")[0]
    # The site works offline: no page fetches anything from elsewhere.
    fetched = r"<(?:script|img|iframe|source)[^>]* src=\"(?:https?:)?//[^\"]*\""
    fetched += (
        r"|<link[^>]* rel=\"(?:stylesheet|preload|icon)\"[^>]*=\"(?:https?:)?//[^>]*>"
    )
    pages = list(html.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        found = re.findall(fetched, page.read_text())
        assert not found, (page, found)
    assert (html / "_static" / "favicon.svg").exists()
    cards = (html / "notebooks" / "index.html").read_text()
    for path in (ROOT / "examples" / "notebooks").glob("*.ipynb"):
        assert f'href="{path.stem}.html"' in cards
        assert f"_images/{path.stem}.png" in cards
