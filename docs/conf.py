"""Sphinx's configuration: `sphinx-build -W -b html docs docs/_build`. Needs no network; links to other sites are not checked."""

import re


project = "vreflection"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_show_copyright = False
exclude_patterns = ["_build", "jupyter_execute"]
templates_path: list[str] = []

# Headings as link targets, as on GitHub.
myst_heading_anchors = 3
# The notebook has no stored outputs: it is run with every build, and an error in it ends the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_param = False
napoleon_use_rtype = False


def markdown_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Rewrites the Markdown in our docstrings, which follow transformers' form, as the reStructuredText that Sphinx reads."""
    rewritten, margin, in_list = [], None, False
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        if fence := re.fullmatch(r"\s*```(\w*)", line):
            if margin is None:
                margin = indent
                rewritten += ["", f"{indent}.. code-block:: {fence[1] or 'text'}", ""]
            else:
                margin = None
                rewritten.append("")
            continue
        if margin is not None:
            rewritten.append("    " + line)
            continue
        if note := re.fullmatch(r"\s*> \[!(NOTE|WARNING)\]", line):
            line = f"{indent}.. {note[1].lower()}::\n"
        elif line.lstrip().startswith("> "):
            line = f"{indent}   {line.lstrip()[2:]}"
        is_item = line.lstrip().startswith("- ")
        if is_item and not in_list:
            rewritten.append("")  # a list begins after a blank line
        in_list = is_item or (in_list and line.startswith(" ") and bool(line.strip()))
        rewritten.append(inline_to_rst(line))
    lines[:] = "\n".join(rewritten).splitlines()


def inline_to_rst(line: str) -> str:
    """Rewrites links and code of one line."""
    line = re.sub(r"(: [A-Z])\.$", r"\1\.", line)  # "H." alone would begin a list
    line = re.sub(r"\[`~?([^`\]]+)`\](?:\([^)]*\))?", r"`\1`", line)
    line = re.sub(r"\[([^\]`]+)\]\((https?:[^)]+)\)", r"`\1 <\2>`__", line)
    parts = re.split(r"(`[^`]+ <https?:[^`]+>`__|`[^`]+`)", line)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            parts[number] = part.replace("|", r"\|")
        elif not part.endswith("__"):
            parts[number] = f"`{part}`"
    return "".join(parts)


def without_constructor(app, what, name, obj, options, signature, return_annotation):
    """Leaves a class's signature out: of trl's config it has 180 arguments, and the docstring describes ours."""
    return ("", None) if what == "class" else None


def setup(app) -> None:
    """Rewrites docstrings before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)
    app.connect("autodoc-process-signature", without_constructor)
