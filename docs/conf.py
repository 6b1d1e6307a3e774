# SPDX-License-Identifier: Apache-2.0
"""How Sphinx makes the site out of these pages: `make docs`."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import lightning_sgdclean

OTHERS = ("collections", "numpy", "os", "pathlib", "pd", "torch", "Figure", r"lightning_sgdclean\.[\w.]+\.T_co")

project = "lightning-sgdclean"
author = "the lightning-sgdclean contributors"
release = version = lightning_sgdclean.__version__
html_title = f"{project} {release}"
html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["math.css"]
html_show_copyright = html_show_sphinx = html_copy_source = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # ```math is what code hosts know as well
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_use_ivar = True

nitpicky = True  # a name in a docstring that leads nowhere is a mistake; other projects' names are not looked up
nitpick_ignore_regex = [("py:class", rf"({'|'.join(OTHERS)})(\..*)?")]

html_math_renderer = "mathml"  # part of HTML; MathJax would be fetched from elsewhere


def _inline_math(translator, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _math_block(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (_inline_math, None), (_math_block, None))
