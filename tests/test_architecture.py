"""Who imports whom, and rules for every file. docs/development.md, "Packages", as a table."""

import ast
import functools
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGES = ("configs", "datasets", "flow", "models", "scripts", "tests")
FILES = sorted([*REPOSITORY.glob("*.py"), *(f for p in PACKAGES for f in (REPOSITORY / p).rglob("*.py"))])
ENTRY_SCRIPTS = ("train", "sample", "evaluate")

METHOD = {
    "flow.path", "flow.couplings", "flow.time_samplers", "flow.losses", "flow.guidance", "flow.model", "flow.noise",
    "flow.likelihood", "flow.power_ema", "flow.restoration", "flow.solvers", "flow.source", "flow.registry",
}  # fmt: skip
LOW = METHOD | {"configs", "models", "datasets", "flow.runtime"}

# Folder or files -> the packages of this project that it may import: arrows point down only.
MAY_IMPORT = {
    # level 0: independent of each other; flow.registry, which needs the standard library alone, checks arguments by a signature
    "configs": {"configs"},
    "models": {"models", "flow.registry"},
    "datasets": {"datasets", "flow.registry"},
    "flow/*.py": METHOD,
    "flow/couplings": METHOD,
    "flow/losses": METHOD,
    "flow/solvers": METHOD,
    # level 1
    "flow/runtime": METHOD | {"configs", "flow.runtime"},
    # level 2
    "flow/sampling": LOW | {"flow.sampling"},
    "flow/training": LOW | {"flow.sampling", "flow.evaluation", "flow.training"},
    "flow/evaluation": LOW | {"flow.sampling", "flow.evaluation"},
}

# Folder or files -> other packages it may import; the second set only inside a function, as not everybody needs it.
OUTSIDE = {
    "models": ({"torch"}, {"diffusers"}),
    "datasets": ({"torch", "torchvision", "numpy", "PIL", "safetensors"}, {"sklearn", "pyarrow", "huggingface_hub"}),
    "configs": ({"omegaconf", "yaml"}, set()),
    "flow/*.py": ({"torch", "numpy"}, set()),
    "flow/couplings": ({"torch"}, {"scipy"}),
    "flow/losses": ({"torch"}, set()),
    "flow/solvers": ({"torch", "numpy"}, {"torchdiffeq", "scipy"}),
}
PROJECT = ("configs", "datasets", "flow", "models", "scripts", "tests", *ENTRY_SCRIPTS)


def files_of(place: str) -> list[Path]:
    found = sorted(REPOSITORY.glob(place) if "*" in place else (REPOSITORY / place).rglob("*.py"))
    assert found, f"{place}: no file there, the table above is out of date"
    return found


@functools.cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(tree: ast.AST, lazy: bool = False) -> list[tuple[str, bool]]:
    """(dotted name, whether inside a function) of each import; `from a import b` gives a.b, as b may be a module."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [(f"{node.module}.{alias.name}", lazy) for alias in node.names]
        else:
            found += imports(node, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return found


def name_of(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


def test_imports_are_found():
    source = "import a.b, c\nfrom d.e import f as g\ndef h():\n    if x:\n        from k import l\nclass M:\n    import n"
    assert imports(ast.parse(source)) == [("a.b", False), ("c", False), ("d.e.f", False), ("k.l", True), ("n", False)]


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_point_down(place):
    """No module imports a package of a higher level."""
    strangers = [
        f"{name_of(file)} imports {name}"
        for file in files_of(place)
        for name, _ in imports(parse(file))
        if name.split(".")[0] in PROJECT and not any(f"{name}.".startswith(f"{package}.") for package in MAY_IMPORT[place])
    ]
    assert strangers == []


@pytest.mark.parametrize("place", OUTSIDE)
def test_packages_from_outside(place):
    """The method needs torch and numpy alone."""
    always, lazily = OUTSIDE[place]
    allowed = always | set(sys.stdlib_module_names) | set(PROJECT)
    strangers = [
        f"{name_of(file)} imports {name}"
        for file in files_of(place)
        for name, lazy in imports(parse(file))
        if name.split(".")[0] not in (allowed | lazily if lazy else allowed)
    ]
    assert strangers == []


def test_nothing_imports_tests_or_entry_scripts():
    """torch-fidelity installs a package called `tests`, too; entry scripts are imported by scripts and tests alone."""
    strangers = []
    for file in FILES:
        top = {"tests"} if file.relative_to(REPOSITORY).parts[0] in ("tests", "scripts") else {"tests", *ENTRY_SCRIPTS}
        strangers += [f"{name_of(file)} imports {name}" for name, _ in imports(parse(file)) if name.split(".")[0] in top]
    assert strangers == []


def test_the_marker_classes_that_accelerate_looks_for():
    """With Hugging Face `datasets` installed, accelerate imports these names from whatever is called `datasets`."""
    tree = parse(REPOSITORY / "datasets" / "__init__.py")
    assert {"Dataset", "IterableDataset"} <= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_every_file_has_a_docstring():
    assert [name_of(file) for file in FILES if not ast.get_docstring(parse(file))] == []


def test_docstrings_name_their_subject():
    """\"Of a row.\" leaves it to the name of the function."""
    own = [f for f in FILES if "tests" not in f.relative_to(REPOSITORY).parts]
    nodes = [(f, node) for f in own for node in ast.walk(parse(f)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    texts = [(name_of(f), node.name, ast.get_docstring(node) or "") for f, node in nodes]
    assert [text for text in texts if text[2].startswith(("Of ", "That of ", "Those "))] == []


def test_pickles_are_loaded_as_weights_only():
    """torch.load without weights_only=True runs whatever code a file of weights holds."""
    unsafe = []
    for file in FILES:
        loads = (call for call in calls(parse(file)) if getattr(call.func, "attr", "") in ("load", "loads"))
        for node in loads:
            if ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                unsafe += [] if safe else [f"{name_of(file)}:{node.lineno}"]
        unsafe += [f"{name_of(file)}: {name}" for name, _ in imports(parse(file)) if name in ("torch.load", "pickle.load")]
    assert unsafe == []


HOOKS = ("sys.argv", "threading.excepthook")  # names of the standard library that are there to be replaced
TRAINING_LOOPS = {  # where a method `step` is called, of an optimizer under whatever name
    "flow/training/optimizer.py": "for the Trainer",
    "flow/training/muon.py": "an optimizer made of two steps both",
    "scripts/benchmark/baseline.py": "the plain loop that the Trainer is compared with",
    "scripts/dev/train_classifier.py": "classifiers are no flows",
}


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def patches(tree: ast.Module) -> list[int]:
    """Lines that replace a name of an imported module: by assignment, setattr or mock.patch; os.environ may be changed."""
    imported = {alias.asname or alias.name.partition(".")[0] for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}  # fmt: skip
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            attributes = [t for t in targets if isinstance(t, ast.Attribute) and ast.unparse(t) not in HOOKS]
            if any(ast.unparse(attribute.value).partition(".")[0] in imported for attribute in attributes):
                lines.append(node.lineno)
        elif isinstance(node, ast.Call):
            function, first = ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""
            if function in ("setattr", "delattr") and first.partition(".")[0] in imported:
                lines.append(node.lineno)
            if "patch" in function.split(".") and not (function.endswith("patch.dict") and first == "os.environ"):
                lines.append(node.lineno)
    return sorted(lines)


def private_patches(tree: ast.Module) -> list[int]:
    """Lines that patch a name with a leading underscore."""
    lines = []
    for call in calls(tree):
        if ast.unparse(call.func).rpartition(".")[2] in ("setattr", "delattr", "setitem", "patch", "object"):
            words = [arg.value for arg in call.args[:2] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            names = [word.rpartition(".")[2] for word in words]
            lines += [call.lineno] if any(n.startswith("_") and not n.startswith("__") for n in names) else []
    targets = [node.targets[0] for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    private = [t for t in targets if isinstance(t, ast.Attribute) and t.attr.startswith("_") and not t.attr.startswith("__")]
    return lines + [target.lineno for target in private if ast.unparse(target.value) != "self"]


def test_patches_are_found():
    source = "import a\nfrom b import c as d\na.x = 1\nd.e.x += 1\nsetattr(d, 'x', 1)\nmock.patch('a.x')\nself.x = 1\nx = a.y"
    assert patches(ast.parse(source)) == [3, 4, 5, 6]
    assert patches(ast.parse("import os\nmock.patch.dict(os.environ, X='1')\nsetattr(self, 'x', 1)")) == []
    source = (
        "m.setattr(a, '_b', 1)\nm.setattr('a._b', 1)\nmock.patch('a._b')\nm.setattr(a, 'b', '_c')\n"
        "m.setattr(a, '__b__', 1)\na._b = 1\nself._b = 1"
    )
    assert private_patches(ast.parse(source)) == [1, 2, 3, 6]


def test_no_module_is_patched():
    """Outside the tests nobody replaces a name of another module."""
    files = [file for file in FILES if file.relative_to(REPOSITORY).parts[0] != "tests"]
    assert [f"{name_of(file)}:{line}" for file in files for line in patches(parse(file))] == []


def test_tests_patch_no_private_name():
    files = [file for file in FILES if file.relative_to(REPOSITORY).parts[0] == "tests"]
    assert [f"{name_of(file)}:{line}" for file in files for line in private_patches(parse(file))] == []


def test_names_of_tests_are_short():
    names = {node.name for file in FILES if "tests" in file.relative_to(REPOSITORY).parts for node in parse(file).body
             if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}  # fmt: skip
    assert names and [name for name in names if len(name) > 50] == []


def takes_step(tree: ast.AST) -> bool:
    """Whether a method `step` is called, as optimizers have one."""
    return any(isinstance(call.func, ast.Attribute) and call.func.attr == "step" for call in calls(tree))


def test_one_training_loop():
    """The Trainer's is the only loop over training steps; exceptions are named."""
    assert [takes_step(ast.parse(text)) for text in ("opt.step()", "a.b[0].step(x)", "step()", "trainer.step")] == [1, 1, 0, 0]
    sources = [file for file in FILES if not name_of(file).startswith("tests")]
    assert {name_of(file) for file in sources if takes_step(parse(file))} == set(TRAINING_LOOPS)
