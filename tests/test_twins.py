"""A piece that two scripts copy on purpose must stay one piece: its comment says `# twin of FILE:NAME`."""

import ast
import re

from conftest import ROOT


def code_of(path, name):
    """The syntax tree of a top-level function, class or table, docstrings and comments aside."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.dump(node)
        if getattr(node, "name", None) == name:
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
                    part.body = part.body[1:]
            return ast.dump(node)
    raise AssertionError(f"{path.name} has no {name}")


def test_twins_are_equal():
    pairs = [
        (path, *m.groups())
        for path in ROOT.glob("*.py")
        for m in re.finditer(r"# twin of (\w+\.py):(\w+)", path.read_text())
    ]
    assert len(pairs) >= 2
    for path, other, name in pairs:
        assert path.name != other and code_of(path, name) == code_of(ROOT / other, name), (path.name, name)


def test_scripts_do_not_import_each_other():
    scripts = {p.stem for p in ROOT.glob("*.py")} - {"core", "bench", "claims"}
    assert len(scripts) >= 3
    for name in scripts:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        imports = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
        imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imports & (scripts | {"bench", "claims"}), name
