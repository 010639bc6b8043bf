"""Tables of what a seam knows by name: architectures, patterns, mask algorithms, optimizers, ...

A tenant is one file that registers itself when it is imported. Those of the package lie in the
seam's room and are found there at the first look-up; those of others are modules on Python's path
that the environment names: SPDF_PLUGINS=my_module,other_module.
"""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
from functools import cache
from typing import Generic, TypeVar

T = TypeVar("T")
PLUGINS = "SPDF_PLUGINS"


class Registry(Generic[T]):
    """Tenants of a seam by name.

    Args:
        kind: what a tenant is, for messages: "mask algorithm".
        room: dotted name of the package whose modules register tenants as they are imported.
    """

    def __init__(self, kind: str, room: str):
        self.kind, self.room = kind, room
        self._tenants: dict[str, T] = {}
        self._searched = False

    def register(self, name: str, tenant: T) -> T:
        """Adds a tenant and returns it.

        Raises:
            ValueError: the name is taken by another.
        """
        if self._tenants.get(name, tenant) is not tenant:
            raise ValueError(f"there are two of {self.kind} {name!r}; give one another name")
        self._tenants[name] = tenant
        return tenant

    def get(self, name: str) -> T:
        """Returns the tenant of a name.

        Raises:
            ValueError: there is none; with the known names, nearest first.
        """
        known = self.names()
        if name not in self._tenants:
            near = difflib.get_close_matches(str(name), known, n=len(known), cutoff=0.0)
            raise ValueError(f"there is no {self.kind} {name!r}; known: {', '.join(near)}; "
                             f"{PLUGINS} names the modules of others")
        return self._tenants[name]

    def names(self) -> list[str]:
        """Names of all tenants, in alphabetical order."""
        self._search()
        return sorted(self._tenants)

    def _search(self) -> None:
        """Imports the modules of the room and the plugins, once."""
        if self._searched:
            return
        self._searched = True
        room = importlib.import_module(self.room)
        for module in pkgutil.iter_modules(room.__path__, f"{self.room}."):
            importlib.import_module(module.name)
        load_plugins()


@cache
def load_plugins() -> None:
    """Imports the modules that the environment names.

    Raises:
        FileNotFoundError: one is not on Python's path. The recipe that asks for it is not wrong, as
            a ValueError in its validation would say.
    """
    for name in filter(None, os.environ.get(PLUGINS, "").split(",")):
        try:
            importlib.import_module(name.strip())
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                f"{PLUGINS} names {name.strip()!r}, which cannot be imported ({error}); "
                "put its directory on PYTHONPATH or leave it out"
            ) from None
