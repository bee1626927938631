"""The type stubs say what the module has."""

import ast
import inspect
from pathlib import Path

import kvtier

# Python gives these to every class, or the stubs cannot show them.
UNSEEN = {"__init__", "__new__", "__buffer__", "__release_buffer__", "__doc__", "__module__", "__repr__", "__hash__"}
COMPARED = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}


def stubs():
    text = (Path(kvtier.__file__).parent / "__init__.pyi").read_text()
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}


def shape(arguments: ast.arguments):
    positional = arguments.posonlyargs + arguments.args
    first_default = len(positional) - len(arguments.defaults)
    shaped = [(one.arg, "positional", at >= first_default) for at, one in enumerate(positional)]
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults)
    shaped += [(one.arg, "keyword", default is not None) for one, default in keywords]
    return [one for one in shaped if one[0] != "self"]


def runtime_shape(function):
    kinds = {
        inspect.Parameter.POSITIONAL_ONLY: "positional",
        inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
        inspect.Parameter.KEYWORD_ONLY: "keyword",
    }
    return [
        (name, kinds[one.kind], one.default is not inspect.Parameter.empty)
        for name, one in inspect.signature(function).parameters.items()
        if name != "self" and one.kind in kinds
    ]


def test_the_stubs_name_what_the_package_exports():
    assert sorted(stubs()) == sorted(kvtier.__all__)
    assert (Path(kvtier.__file__).parent / "py.typed").exists()


def test_the_stubs_name_every_method_with_its_parameters():
    for name, node in stubs().items():
        runtime = getattr(kvtier, name)
        if issubclass(runtime, Exception):
            continue
        methods = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
        assert set(methods) - UNSEEN == set(vars(runtime)) - UNSEEN - COMPARED, name
        for method, stub in methods.items():
            is_property = any(isinstance(one, ast.Name) and one.id == "property" for one in stub.decorator_list)
            if is_property or method.startswith("__"):
                continue
            assert shape(stub.args) == runtime_shape(getattr(runtime, method)), f"{name}.{method}"
    assert shape(next(one for one in stubs()["Client"].body if one.name == "__init__").args) == runtime_shape(
        kvtier.Client
    )


def test_every_public_method_has_a_docstring():
    for name in kvtier.__all__:
        runtime = getattr(kvtier, name)
        assert runtime.__doc__, name
        if not issubclass(runtime, Exception):
            for method, value in vars(runtime).items():
                assert method.startswith("_") or value.__doc__, f"{name}.{method}"
