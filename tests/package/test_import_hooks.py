"""Calls that wait for an import."""

import importlib
import importlib.util
import sys

import pytest

from alds_fast.import_hooks import _finder, when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "waited_for.py").write_text("import inspect\nvalue = 1\n\n\ndef f():\n    return 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "waited_for"
    sys.modules.pop("waited_for", None)
    _finder.waiting.pop("waited_for", None)


def test_calls_come_in_order_after_the_module_has_run(module):
    seen = []
    when_imported(module, lambda: seen.append(sys.modules[module].value))
    when_imported(module, lambda: seen.append("second"))
    assert seen == []
    loaded = importlib.import_module(module)
    assert seen == [1, "second"]
    when_imported(module, lambda: seen.append("at once"))
    assert seen[-1] == "at once"
    assert loaded.inspect.getsource(loaded.f).startswith("def f") and type(loaded.__loader__).__module__ != __name__
    assert type(loaded.__spec__.loader).__name__ == "SourceFileLoader"


def test_what_a_call_raises_goes_through_and_the_next_import_tries_without_it(module):
    when_imported(module, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(module)
    assert importlib.import_module(module).value == 1


def test_a_module_that_is_not_there_goes_on_being_waited_for(tmp_path, monkeypatch):
    seen = []
    when_imported("waited_for_long", lambda: seen.append(1))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("waited_for_long")
    (tmp_path / "waited_for_long.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("waited_for_long")
    assert seen == [1]
    del sys.modules["waited_for_long"]


def test_who_only_looks_for_a_module_takes_no_call_away(module):
    """Packages ask ``find_spec`` whether another one is installed, and import it much later."""
    seen = []
    when_imported(module, lambda: seen.append(1))
    assert importlib.util.find_spec(module) is not None and seen == []
    importlib.import_module(module)
    assert seen == [1] and module not in _finder.waiting


def test_modules_inside_of_packages_are_waited_for(tmp_path, monkeypatch):
    (tmp_path / "lazy_package").mkdir()
    (tmp_path / "lazy_package" / "__init__.py").write_text("def __getattr__(name):\n    import lazy_package.inner\n")
    (tmp_path / "lazy_package" / "inner.py").write_text("value = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    when_imported("lazy_package.inner", lambda: seen.append(sys.modules["lazy_package.inner"].value))
    package = importlib.import_module("lazy_package")
    assert seen == []
    assert package.anything is None
    assert seen == [2]
    for name in ("lazy_package", "lazy_package.inner"):
        del sys.modules[name]


def test_a_module_that_fails_goes_on_being_waited_for(tmp_path, monkeypatch):
    seen = []
    (tmp_path / "fails_once.py").write_text("import os\nos.environ['NO_SUCH_NAME_HERE']")
    monkeypatch.syspath_prepend(tmp_path)
    when_imported("fails_once", lambda: seen.append(1))
    with pytest.raises(KeyError):
        importlib.import_module("fails_once")
    monkeypatch.setenv("NO_SUCH_NAME_HERE", "1")
    importlib.import_module("fails_once")
    assert seen == [1]
    del sys.modules["fails_once"]
