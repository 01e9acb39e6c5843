"""The shape of the package: small enough to read, no import cycle, no room that holds everything."""

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import latelier

SRC = Path(latelier.__file__).parent
FILES = {path.relative_to(SRC): path.read_text(encoding="utf-8") for path in sorted(SRC.rglob("*.py"))}
LINES = {path: len(text.splitlines()) for path, text in FILES.items()}


def module(path: Path) -> str:
    return ".".join(("latelier", *path.with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module(path) for path in FILES}


def imports(text: str) -> set[str]:
    """Our modules that a file imports anywhere, inside functions too, but not for type checkers only."""
    found = set()
    nodes = [ast.parse(text)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # a module of a package, or a name in a module
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
        nodes += ast.iter_child_nodes(node)
    return found & MODULES


def test_a_researcher_reads_it_in_an_afternoon():
    biggest = ", ".join(f"{path} ({n})" for path, n in Counter(LINES).most_common(5))
    assert len(LINES) <= 145, f"{len(LINES)} files"
    assert sum(LINES.values()) <= 27_300, f"{sum(LINES.values())} lines; the biggest files are {biggest}"
    assert max(LINES.values()) <= 450, f"the biggest files are {biggest}"


def test_no_folder_holds_everything():
    folders = Counter()
    for path, n in LINES.items():
        folders[path.parts[0] if len(path.parts) > 1 else "."] += n
    name, most = folders.most_common(1)[0]
    assert most <= 0.15 * sum(LINES.values()), f"{name}/ has {most} of {sum(LINES.values())} lines"


def test_no_import_cycle():
    graph = {module(path): imports(text) - {module(path)} for path, text in FILES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"import cycle: {' <- '.join(error.args[1])}") from None


def test_the_recipe_stays_at_the_door():
    """Sections are unpacked by builders, loops and commands; models, losses, samplers and metrics never see them."""
    knowing = [
        str(path)
        for path, text in FILES.items()
        if path.parts[0] != "recipe" and any(name.startswith("latelier.recipe") for name in imports(text))
    ]
    assert len(knowing) <= 25, f"{len(knowing)} files import latelier.recipe: {', '.join(knowing)}"
