"""The rules of docs/structure.md that a machine can check: who imports what, and how long things get."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path.relative_to(ROOT) for top in ("decoding", "server") for path in (ROOT / top).rglob("*.py")
)
DECODING_MAY_IMPORT = {"decoding", "torch", "transformers", "filelock", *sys.stdlib_module_names}
HOST_COPIES = {"item", "tolist", "cpu", "numpy"}
ONLY_IN = {
    "prometheus_client": {"server/metrics.py", "server/metrics_compat.py"},
    "zeus": {"server/energy_source.py"},
    "safetensors": {"decoding/embedded.py", "decoding/checkpoint.py"},
    "filelock": {"decoding/cost_measurement.py"},
    "pickle": set(),
}
READS_ENVIRONMENT = {("os", "environ"), ("os", "getenv"), ("sys", "argv")}
MODEL_CLASS_OWNERS = {"decoding/module.py", "decoding/embedded.py"}


def imports(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each imported module with the names taken from it, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), tuple(alias.name for alias in node.names)


def broken_imports(path: Path, tree: ast.AST, public: set[str]) -> Iterator[str]:
    package, file = path.parts[0], path.as_posix()
    for module, names in imports(tree):
        top = module.partition(".")[0]
        if package == "decoding" and top not in DECODING_MAY_IMPORT | {"safetensors"}:
            yield f"decoding imports {module}"
        if (
            package == "server"
            and top == "decoding"
            and not (module == "decoding" and public.issuperset(names))
        ):
            yield f"{module} {names}: not exported by decoding"
        if file not in ONLY_IN.get(top, {file}):
            yield f"{module} belongs to {ONLY_IN[top]}"
        if file != "server/config.py" and any((module, name) in READS_ENVIRONMENT for name in names):
            yield f"{module} {names}: only server/config.py reads the environment"
        model_class = any(name.startswith("AutoModel") or name.endswith("ForCausalLM") for name in names)
        if top == "transformers" and model_class and file not in MODEL_CLASS_OWNERS:
            yield f"{module} {names}: model classes belong to {MODEL_CLASS_OWNERS}"


def broken_lines(path: Path, tree: ast.AST) -> Iterator[str]:
    file = path.as_posix()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in READS_ENVIRONMENT:
                if file != "server/config.py":
                    yield f"line {node.lineno}: only server/config.py reads {owner}.{name}"
            case ast.Call(func=ast.Name(id="print")):
                yield f"line {node.lineno}: print"
            case ast.Call(func=ast.Attribute(attr=name)) if name in HOST_COPIES:
                if path.parts[0] == "decoding" and file != "decoding/host.py":
                    yield f"line {node.lineno}: .{name}() outside host.py"
            case ast.keyword(arg="trust_remote_code", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield f"line {node.lineno}: trust_remote_code"
            case ast.Global():
                yield f"line {node.lineno}: module state"
            case ast.FunctionDef() | ast.AsyncFunctionDef() if (node.end_lineno or 0) - node.lineno >= 60:
                yield f"line {node.lineno}: {node.name} is longer than 60 lines"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_rules(path: Path) -> None:
    import decoding

    text = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert [*broken_imports(path, tree, set(decoding.__all__)), *broken_lines(path, tree)] == []
    assert len(text.splitlines()) <= 300


def test_every_module_has_its_line_in_the_documents() -> None:
    modules = [path for path in FILES if path.name != "__init__.py"]
    structure = (ROOT / "docs/structure.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = ["/".join(path.parts[1:]) for path in modules]
    assert [name for name in names if f"| `{name}` |" not in structure] == []
    assert [name for name in names if f"\n  {name} " not in readme] == []


def test_api_process_never_imports_torch() -> None:
    code = (
        "import decoding, server.app, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
