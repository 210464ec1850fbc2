"""Imports run one way, and only communication talks to other processes."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from torch.utils._device import _device_constructors

import lightning_easgd

ROOT = Path(lightning_easgd.__file__).parent

LAYERS = [
    {"telemetry", "schedules"},
    {"algorithms"},
    {"center"},
    {"communication"},
    {"server"},
    {"exchange"},
    {"checkpoint"},
    {"strategy"},
]
"""From low to high; a module imports only from lower layers, or from its own folder."""

LIGHTNING = {"strategy", "workloads", "__init__"}
DISTRIBUTED = {"communication"}
SCRIPTS_ONLY = {"hydra", "matplotlib", "numpy", "omegaconf", "sklearn", "torchmetrics"}


TESTS = Path(__file__).parent


def layer_of(name: str) -> int:
    (layer,) = [i for i, names in enumerate(LAYERS) if name in names]
    return layer


@cache
def nodes(path: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(path.read_text()))]


@cache
def imports(path: Path) -> frozenset[str]:
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def modules() -> list[tuple[str, Path]]:
    return [(p.relative_to(ROOT).parts[0].removesuffix(".py"), p) for p in ROOT.rglob("*.py")]


def test_every_module_has_a_layer() -> None:
    known = set().union(*LAYERS) | {"workloads", "__init__"}
    assert {name for name, _ in modules()} == known


def test_the_listing_is_short() -> None:
    assert len([path for path in ROOT.iterdir() if path.name != "__pycache__"]) <= 12


def test_every_module_is_short() -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for _, path in modules()}
    assert {path: lines for path, lines in lengths.items() if lines > 350} == {}


def test_imports_run_one_way() -> None:
    for name, path in modules():
        own = {i.split(".")[1] for i in imports(path) if i.startswith("lightning_easgd.")}
        if name == "__init__":
            continue
        if name == "workloads":  # like any user, it knows the public names
            assert own <= {"workloads", *lightning_easgd.__all__}, path
            continue
        for other in own - {name}:
            assert layer_of(other) < layer_of(name), f"{path} imports {other}"


def test_the_server_takes_pure_parts_only() -> None:
    """It knows no collectives, and of what workers do the rules, codecs and flat vectors only."""
    pure = (
        "algorithms",
        "schedules",
        "server",
        "center.flat",
        "center.names",
        "communication.codecs",
    )
    for name, path in modules():
        for found in imports(path) if name == "server" else ():
            within = found.removeprefix("lightning_easgd.")
            assert found == within or within.startswith(pure), f"{path} imports {found}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {
        ".".join(("lightning_easgd", *path.relative_to(ROOT).with_suffix("").parts)): path
        for _, path in modules()
    }
    graph = {name: (imports(path) & set(names)) - {name} for name, path in names.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, with the names


def test_only_the_top_knows_lightning_and_only_communication_the_network() -> None:
    for name, path in modules():
        found = imports(path)
        if name not in LIGHTNING:
            assert not any(i.split(".")[0] == "lightning" for i in found), path
        if name not in DISTRIBUTED:
            assert not any(i.startswith(("torch.distributed", "socket")) for i in found), path


def test_the_library_needs_torch_and_lightning_only() -> None:
    for name, path in modules():
        if name != "workloads":
            third_party = {i.split(".")[0] for i in imports(path)} & SCRIPTS_ONLY
            assert not third_party, path


def test_only_the_server_needs_what_the_extra_async_brings() -> None:
    for name, path in modules():
        found = {i.split(".")[0] for i in imports(path)} & {"grpc", "safetensors", "cryptography"}
        assert name == "server" or not found, path


def test_nothing_unpickles_what_came_from_elsewhere() -> None:
    """But Lightning's own broadcast of objects, which is that of DDP."""
    for _, path in modules():
        assert not imports(path) & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
        for node in nodes(path):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = [k.value for k in node.keywords if k.arg == "weights_only"]
                # A checkpoint is read as its user asked for.
                asked = {"strictly"} if path.name == "checkpoint_io.py" else set()
                assert {ast.unparse(value) for value in safe} <= {"True", *asked}, path
                assert safe, path
            name = getattr(node, "attr", getattr(node, "id", ""))
            if isinstance(name, str) and name.endswith(("gather_object", "_object_list")):
                assert (path.name, name) == ("monitored.py", "broadcast_object_list"), path


def test_every_new_tensor_says_where_it_lies() -> None:
    """Else ``torch.set_default_device`` of the user's decides, also for what crosses gloo."""
    constructors = {of.__name__ for of in _device_constructors()} - {"asarray", "as_tensor"}
    for name, path in modules():
        for node in nodes(path) if name != "workloads" else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch."):
                made = ast.unparse(node.func).removeprefix("torch.")
                given = {keyword.arg for keyword in node.keywords}
                assert made not in constructors or "device" in given, f"{path}:{node.lineno}"
                assert made != "Generator" or node.args or given, f"{path}:{node.lineno}"


def test_no_test_file_imports_another() -> None:
    files = {path: path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py")}
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    for path, name in files.items():
        shared = name.startswith("helpers/") or name == "golden/write.py"
        assert shared or path.stem in tests | {"conftest"}, f"{name} belongs in tests/helpers"
        # By its lines: to parse all tests takes seconds.
        lines = re.findall(r"^ *(?:from|import) (.+)", path.read_text(), re.M)
        found = {word for line in lines for word in re.findall(r"\w+", line)} & tests
        found -= {path.stem}  # what a process that it starts runs
        assert not found, f"{name} imports {found}: what tests share belongs in tests/helpers"
