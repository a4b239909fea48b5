"""Stand-ins for packages that a peer imports in any case, and does not use for what is measured."""

from abc import ABCMeta
from collections.abc import Collection, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Kind(ABCMeta):
    """Type of stand-ins: each of their attributes is another one.

    Abstract classes' own type, for a peer's classes have a stand-in and one of those as bases.
    """

    def __getattr__(cls, name: str) -> Any:
        return _stand_in(name)


class _Anything:
    """Serves as a base class, as an annotation, as a function and as a decorator."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        decorated = len(args) == 1 and not kwargs and callable(args[0])
        return args[0] if decorated else super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def _stand_in(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Kind(name, (_Anything,), {})


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _stand_in(name)


class AbsentPackages(MetaPathFinder, Loader):
    """Finds some packages where nothing else does; goes at the end of `sys.meta_path`.

    Args:
        names: of the packages.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """A package without content, if it is one of the names or in one."""
        del path, target
        if fullname.partition(".")[0] not in self._names:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The package."""
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """It has no code."""
