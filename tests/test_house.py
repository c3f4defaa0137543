"""The house of parts/README.md: which wing may import which, how many files there are, and how long they are."""

import ast
import re

from helpers import ROOT, SCRIPTS

FLOORS = ("machine", "training", "model", "run")  # an arrow may skip one and never runs back
ALLOWED = {floor: {*FLOORS[place:], "ground"} for place, floor in enumerate(FLOORS)}
ALLOWED |= {"replies": {"replies", "model", "run", "rows", "ground"}, "rows": {"rows", "ground"}, "ground": {"ground"}}
PARTS = sorted(ROOT.glob("parts/**/*.py"))


def wing_of(module: str) -> str:
    """The wing of a module such as parts.run.folder; "ground" for a part in none, "scripts" for what is no part."""
    top, _, rest = module.partition(".")
    wing = rest.partition(".")[0]
    return "scripts" if top != "parts" else wing if wing in ALLOWED else "ground"


def imported(path) -> set[str]:
    """The modules of the project that a file imports, at its top or inside its functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):  # `from parts.run import folder` imports parts.run.folder
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {"parts", *(script.removesuffix(".py") for script in SCRIPTS)}
    return {module for module in modules if module.partition(".")[0] in ours}


def test_imports_run_one_way():
    wrong = []
    for path in PARTS:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        others = [other for other in imported(path) if wing_of(other) not in ALLOWED[wing_of(module)]]
        wrong += [f"{module} imports {other}" for other in sorted(others)]
    assert not wrong, "\n".join(wrong)


def test_files_are_few_none_is_long_and_each_has_a_line_on_the_map():
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in [*PARTS, *map(ROOT.joinpath, SCRIPTS)]}
    text = (ROOT / "parts" / "README.md").read_text(encoding="utf-8")
    named = {ROOT / "parts" / name for name in re.findall(r"^\| ([\w/]+\.py) \|", text, re.MULTILINE)}
    assert len(lines) <= 48
    assert not [path for path, length in lines.items() if length > 350]
    assert named == {*PARTS} - {ROOT / "parts" / "__init__.py"}
