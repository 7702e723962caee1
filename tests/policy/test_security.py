"""Nothing that is read can run code, and nothing is started through a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from sources import imported_modules, name_of, python_files, tree_of

FOLDERS = ("megatron_dlm", "tools", "examples", "slurm")
# Libraries whose files are programs.
UNSAFE_LIBRARIES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
# The restricted unpickler, and the report of our own forked child in an unnamed file.
PICKLE_USERS = {
    "megatron_dlm/checkpoint/safe_loading.py": {"Unpickler", "UnpicklingError", "dump"},
    "megatron_dlm/checkpoint/writer_report.py": {"dumps", "loads", "UnpicklingError"},
}
HARMLESS_OF_PICKLE = {"UnpicklingError"}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(file and line, dotted name of what is called, the call)"""
    for path in python_files(*FOLDERS):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                yield f"{name_of(path)}:{node.lineno}", ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> object:
    """The constant that an argument is; None where it is not given, its text where computed."""
    for argument in call.keywords:
        if argument.arg == name:
            value = argument.value
            return value.value if isinstance(value, ast.Constant) else ast.unparse(value)
    return None


def test_pickle_is_used_only_where_it_is_restricted() -> None:
    found = {}
    for path in python_files(*FOLDERS):
        names = {
            node.attr
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "pickle"
        }
        if names - HARMLESS_OF_PICKLE:
            found[name_of(path)] = names
        imported = {module for module in imported_modules(path) if module.startswith("pickle.")}
        assert not imported, f"{name_of(path)}: import pickle itself, so that its uses show"
    assert found == PICKLE_USERS


def test_no_library_whose_files_are_programs() -> None:
    users = [
        f"{name_of(path)} imports {module}"
        for path in python_files(*FOLDERS)
        for module in imported_modules(path)
        if module.partition(".")[0] in UNSAFE_LIBRARIES
    ]
    assert users == []


def is_unsafe(function: str, call: ast.Call) -> bool:
    last = function.rpartition(".")[2]
    if function in ("torch.load", "torch.jit.load") or last == "load_state_dict_from_url":
        return keyword(call, "weights_only") is not True
    if function in ("np.load", "numpy.load"):
        return keyword(call, "allow_pickle") not in (None, False)
    if function.startswith("yaml."):
        return last in ("unsafe_load", "full_load", "load_all") or (
            last == "load" and "SafeLoader" not in str(keyword(call, "Loader"))
        )
    if last == "from_pretrained":
        return keyword(call, "trust_remote_code") is True
    return function in ("eval", "exec", "os.system", "os.popen") or (
        function.startswith("subprocess.") and keyword(call, "shell") not in (None, False)
    )


# The safe one itself, and a subclass of yaml.SafeLoader that refuses duplicate keys.
ALLOWED = {
    "megatron_dlm/checkpoint/safe_loading.py": "torch.load",
    "megatron_dlm/config/strict_yaml.py": "yaml.load",
}


def test_every_load_is_safe() -> None:
    unsafe = [
        f"{place} {function}"
        for place, function, call in calls()
        if is_unsafe(function, call) and ALLOWED.get(place.partition(":")[0]) != function
    ]
    assert unsafe == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path, mmap_mode='r')", False),
        ("yaml.load(text, Loader=yaml.Loader)", True),
        ("yaml.load(text)", True),
        ("yaml.safe_load(text)", False),
        ("model.eval()", False),
        ("eval(text)", True),
        ("subprocess.run(command, shell=True)", True),
        ("subprocess.run(command)", False),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", True),
        ("AutoModel.from_pretrained(path)", False),
    ],
)
def test_the_rule_itself(text: str, expected: bool) -> None:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert is_unsafe(ast.unparse(call.func), call) is expected


def test_the_strict_yaml_loader_is_a_safe_one() -> None:
    import yaml

    from megatron_dlm.config.strict_yaml import _StrictLoader, parse_yaml

    assert issubclass(_StrictLoader, yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError):
        parse_yaml("!!python/object/apply:os.getcwd []")
