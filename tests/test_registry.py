"""Seams know their tenants by name: those of a room, those of the environment, and no others."""

from __future__ import annotations

import pytest

from megatron_spdf.registry import Registry, load_plugins


@pytest.fixture
def registry() -> Registry[str]:
    """A registry of a room without tenants of its own."""
    found = Registry("fruit", "megatron_spdf.runs")
    found._searched = True
    return found


def test_an_unknown_name_gets_the_nearest_first(registry):
    for name in ("apple", "pear", "plum"):
        registry.register(name, name)
    with pytest.raises(ValueError, match="there is no fruit 'plun'; known: plum, .*SPDF_PLUGINS"):
        registry.get("plun")


def test_two_tenants_of_one_name_are_refused(registry):
    registry.register("apple", "red")
    registry.register("apple", "red")  # the same one may come twice
    with pytest.raises(ValueError, match="two of fruit 'apple'"):
        registry.register("apple", "green")


def test_modules_of_the_room_register_themselves(tmp_path, monkeypatch):
    room = tmp_path / "a_room"
    room.mkdir()
    (room / "__init__.py").write_text("TABLE = None\n")
    (room / "one.py").write_text("import a_room\na_room.TABLE.register('one', 1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import a_room

    a_room.TABLE = Registry("number", "a_room")
    assert a_room.TABLE.get("one") == 1


def test_plugins_of_the_environment_are_imported(tmp_path, monkeypatch):
    (tmp_path / "a_plugin.py").write_text("import sys\nsys.a_plugin_was_here = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "another_plugin.py").write_text("import sys\nsys.another_was_here = True\n")
    monkeypatch.setenv("SPDF_PLUGINS", "a_plugin, another_plugin,")
    load_plugins.cache_clear()
    load_plugins()
    import sys

    assert sys.a_plugin_was_here and sys.another_was_here
    monkeypatch.setenv("SPDF_PLUGINS", "no_such_plugin")
    load_plugins.cache_clear()
    with pytest.raises(FileNotFoundError, match="SPDF_PLUGINS names 'no_such_plugin'.*PYTHONPATH"):
        load_plugins()
    load_plugins.cache_clear()
