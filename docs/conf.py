"""Configuration of Sphinx: `make docs`."""

import base64
import importlib.resources
import inspect
import json
import logging
import math
import os
import pathlib
import re
import shutil
import struct

import jax
import latex2mathml.converter
import optax
from docutils import nodes
from fontTools import subset
from sphinx.util.typing import stringify_annotation

import nlcg_optax

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent

project = "nlcg-optax"
author = "the nlcg-optax authors"
copyright = author
version = release = nlcg_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

html_theme = "furo"
pygments_dark_style = "github-dark"  # furo's own underlines modules, like links
html_title = f"nlcg-optax {version}"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# No page needs anything from elsewhere: formulas are MathML, made below.
html_math_renderer = "mathml"
myst_update_mathjax = False
nb_ipywidgets_js = {}

# Names in single backquotes, in docstrings.
default_role = "code"

autodoc_member_order = "bysource"
# Signatures have the types, each argument on a line of its own where there are many.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 70
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True

# References that cannot be resolved are warnings, but for other projects' names.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(jax|optax|flax|numpy|ml_collections|signal|collections|pathlib)\..*")
]

myst_enable_extensions = ["amsmath", "dollarmath", "substitution"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks hold their outputs
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"

linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]  # made by JavaScript

UNIONS = {
    name: stringify_annotation(union, "smart")
    for name, union in {
        "jax.typing.ArrayLike": jax.typing.ArrayLike,
        "optax.Params": optax.Params,
        "optax.ScalarOrSchedule": optax.ScalarOrSchedule,
    }.items()
}

# Pages that show a file from elsewhere in the repository. Links to the file lead there.
SHOWN = {
    "README.md": "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "examples/notebooks/README.md": "notebooks/index.md",
}
# A page for each benchmark, with its README and all that it measured.
for path in ROOT.glob("benchmarks/*/**/*.md"):
    benchmark = path.relative_to(ROOT / "benchmarks").parts[0]
    SHOWN[path.relative_to(ROOT).as_posix()] = f"results/{benchmark}.md"
# Sections of the README are parts of several pages.
README_SECTIONS = {
    "install": "quickstart.md",
    "what-was-measured": "results/index.md",
}
NOTEBOOKS = ROOT / "examples" / "notebooks"


def defaults_table() -> str:
    """The defaults of the two ready optimizers, as they are."""
    ours, paper = (
        inspect.signature(optimizer).parameters
        for optimizer in (nlcg_optax.nlcg, nlcg_optax.nlcg_paper)
    )
    rows = ["| argument | `nlcg` | `nlcg_paper` |", "| --- | --- | --- |"]
    for name, parameter in (ours | paper).items():
        if parameter.default is not inspect.Parameter.empty:
            defaults = tuple(
                f"`{one[name].default!r}`" if name in one else "–"
                for one in (ours, paper)
            )
            if defaults[0] != defaults[1]:
                defaults = tuple(f"**{default}**" for default in defaults)
            rows.append(f"| `{name}` | {' | '.join(defaults)} |")
    return "\n".join(rows)


myst_substitutions = {"defaults": defaults_table()}


def bring_in() -> None:
    """Puts what Sphinx needs below this folder: notebooks, and pages of files there.

    The two folders are made anew each time, and not under version control.
    """
    notebooks = sorted(
        NOTEBOOKS.glob("*.ipynb"),
        key=lambda path: (not path.name.startswith("nlcg"), path.name),  # first steps
    )
    pages = {f"notebooks/{p.name}": p.read_text(encoding="utf-8") for p in notebooks}
    cards = "\n".join(_card(path) for path in notebooks)
    pages["notebooks/index.md"] = _contents(
        "Notebooks",
        "They are in `examples/notebooks`, and shown here as they ran.\n\n"
        f"```{{container}} cards\n{cards}\n```",
        [path.stem for path in notebooks],
        hidden=True,
    )

    names = ("CHANGELOG.md", "CONTRIBUTING.md")
    pages |= {SHOWN[name]: f"```{{include}} ../../{name}\n```\n" for name in names}
    citation = '```{include} ../../README.md\n:start-after: "## Citation"\n```'
    pages["project/index.md"] = _contents(
        "Project",
        f"## Citation\n\n{citation}",
        [pathlib.Path(SHOWN[name]).stem for name in names],
    )

    for folder in ("notebooks", "project"):
        shutil.rmtree(DOCS / folder, ignore_errors=True)
        (DOCS / folder).mkdir()
    for name, text in pages.items():
        (DOCS / name).write_text(text, encoding="utf-8")
    for path in notebooks:
        (DOCS / "notebooks" / f"{path.stem}.png").write_bytes(_picture(path))


def _card(notebook: pathlib.Path) -> str:
    """An entry of a list: a notebook's picture, its title, and what it shows."""
    first = json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"]
    title = first[0].removeprefix("# ").strip()
    listed = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    # The sentence that the folder's own list has.
    (sentence,) = re.findall(rf"^- `{notebook.name}`: ((?:.|\n  )*)$", listed, re.M)
    sentence = " ".join(sentence.split())
    return (
        f"- [![]({notebook.stem}.png)]({notebook.name})\n\n"
        f"  **[{title}]({notebook.name})**\n\n  {sentence[0].upper()}{sentence[1:]}\n"
    )


def _picture(notebook: pathlib.Path) -> bytes:
    """Of the pictures that a notebook drew, the one most like a card: twice as wide."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    encoded = [output.get("data", {}).get("image/png") for output in outputs]
    pictures = [base64.b64decode("".join(picture)) for picture in encoded if picture]

    def distance(png: bytes) -> float:
        width, height = struct.unpack(">II", png[16:24])  # of its header
        return abs(math.log(width / height / 2))

    return min(pictures, key=distance)


def _contents(title: str, text: str, entries: list[str], hidden: bool = False) -> str:
    """A page that leads to others."""
    option = [":hidden:", ""] if hidden else []
    tree = "\n".join(["```{toctree}", *option, *entries, "```", ""])
    return f"# {title}\n\n{text}\n\n{tree}"


def relink(text: str, source: pathlib.Path, page: pathlib.Path) -> str:
    """Makes the relative links of a Markdown file (or notebook) those of a page.

    Args:
      text: of the file, or of a part of it.
      source: the file, whose place its links are relative to.
      page: the page that shows it.
    """

    def relative(path: pathlib.Path) -> str:
        return pathlib.Path(os.path.relpath(path, page.parent)).as_posix()

    def new_link(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups(default="")
        section = anchor.removeprefix("#")
        path = (source.parent / target).resolve() if target else source
        if path == ROOT / "README.md" and section in README_SECTIONS:
            return before + relative(DOCS / README_SECTIONS[section]) + after
        if not target or not path.is_file():
            return match[0]  # Sphinx will say so
        if path.is_relative_to(NOTEBOOKS) and path.suffix == ".ipynb":
            path = DOCS / "notebooks" / path.name
        elif path.is_relative_to(ROOT) and not path.is_relative_to(DOCS):
            shown = SHOWN.get(path.relative_to(ROOT).as_posix())
            if shown is not None:
                path, anchor = DOCS / shown, ""
        return before + relative(path) + anchor + after

    return re.sub(r"(\[[^\]]*\]\()([^)\s:#]*)(#[^)\s]*)?(\))", new_link, text)


def mathml(formula: str, display: str = "inline") -> str:
    """A formula as MathML, which browsers show by themselves."""
    text = latex2mathml.converter.convert(formula, display=display)
    # Bars stay of one height, with an index or without, and beside what is in them.
    bar = r"<mo>(&#x02016;|&#x0007C;|\|)</mo>"
    text = re.sub(bar, r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', text)
    around = r'(<mo stretchy="true" fence="true" form="\w+")(>&#x0007C;)'
    text = re.sub(around, r'\1 lspace="0.1em" rspace="0.1em"\2', text)
    # A sign after "=", and no space before "(".
    equal = r"(<mo>(?:&#x0003D;|&#x02190;)</mo>)<mo>(&#x02212;</mo>)"
    text = re.sub(equal, r'\1<mo form="prefix">\2', text)
    return re.sub(r"<mo>(max|min)</mo>", r"<mi>\1</mi>", text)


def without_types(function) -> str:
    """The signature of a function, method or class: names and defaults."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    return str(inspect.Signature(parameters))


def inline_formula(self, node) -> None:
    """Writes a formula into a line."""
    self.body.append(f'<span class="math">{mathml(node.astext())}</span>')
    raise nodes.SkipNode


def parts(formula: str) -> list[str]:
    """A formula cut at its wide spaces, where a line may break."""
    depth, cut = 0, [""]
    for token in re.split(
        r"(\\q?quad\b|\\left\b|\\right\b|\\begin\b|\\end\b|[{}])", formula
    ):
        depth += token in ("{", r"\left", r"\begin")
        depth -= token in ("}", r"\right", r"\end")
        if token in (r"\quad", r"\qquad") and depth == 0:
            cut.append("")
        else:
            cut[-1] += token
    return [part for part in cut if part.strip()]


def formula_of_its_own(self, node) -> None:
    """Writes a formula on a line of its own, or on several where it is too long."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    for part in parts(node.astext()):
        self.body.append(mathml(part, display="block"))
    self.body.append("</div>\n")
    raise nodes.SkipNode


# What a formula may have: letters, Greek and mathematical ones, signs, brackets.
MATH_CHARACTERS = (
    (0x20, 0x7E),
    (0xA0, 0xFF),
    (0x370, 0x3FF),
    (0x2010, 0x204F),
    (0x2100, 0x22FF),
    (0x2308, 0x230B),
    (0x27E8, 0x27E9),
    (0x1D434, 0x1D467),
    (0x1D6E2, 0x1D71B),
)


def write_math_font(app, exception) -> None:
    """Puts a font beside the pages: without one many systems cannot set formulas.

    It is STIX Two Math, under the SIL Open Font License, as ziamath brings it.
    """
    if exception is not None or app.builder.format != "html":
        return
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    source = importlib.resources.files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
    options = subset.Options(flavor="woff", layout_features=["ssty", "dtls", "flac"])
    with importlib.resources.as_file(source) as path:
        font = subset.load_font(path, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(
        unicodes=[c for a, b in MATH_CHARACTERS for c in range(a, b + 1)]
    )
    subsetter.subset(font)
    subset.save_font(font, app.outdir / "_static" / "math.woff", options)


def setup(app) -> None:
    """Registers what this configuration adds to Sphinx."""
    app.add_html_math_renderer(
        "mathml", (inline_formula, None), (formula_of_its_own, None)
    )

    def read(app, docname, content):
        page = source = DOCS / app.env.doc2path(docname, base=False)
        if docname.startswith("notebooks/"):
            source = NOTEBOOKS / page.name
        content[0] = relink(content[0], source, page)

    def include(app, path, parent, content):
        source = (DOCS / path).resolve()
        page = DOCS / app.env.doc2path(app.env.docname, base=False)
        content[0] = relink(content[0], source, page)

    def find(app, env, node, contnode):
        # Types in signatures have the name of the module where they are defined.
        name = node.get("reftarget", "").split(".")[-1]
        if node.get("refdomain") != "py" or name not in nlcg_optax.__all__:
            return None
        target = f"nlcg_optax.{name}"
        arguments = app.builder, node["reftype"], target, node, contnode
        return env.domains["py"].resolve_xref(env, node["refdoc"], *arguments)

    def name_types(app, what, name, obj, options, signature, returns):
        # Fields of states, and the trainer, say in words what they are.
        if what == "class" or name.startswith("nlcg_optax.training."):
            return signature and without_types(obj), None
        # Unions that JAX and Optax have names for are written by these.
        for alias, union in sorted(UNIONS.items(), key=lambda item: -len(item[1])):
            signature = signature and signature.replace(union, f"~{alias}")
            returns = returns and returns.replace(union, f"~{alias}")
        return signature, returns

    def skip(app, what, name, obj, skip, options):
        # The fields of a NamedTuple, which its docstring describes.
        return True if type(obj).__name__ == "_tuplegetter" else None

    app.connect("build-finished", write_math_font)
    app.connect("missing-reference", find)
    app.connect("source-read", read)
    app.connect("include-read", include)
    app.connect("autodoc-process-signature", name_types)
    app.connect("autodoc-skip-member", skip)


bring_in()
