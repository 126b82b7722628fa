"""A folder is a registry: its file names are the keys, one module is imported per lookup."""

import ast
import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from llmtuner.extras.errors import ConfigError, nearest


@dataclass(frozen=True)
class Registry:
    """Named entries that live one per file in a package, and optionally in a user's folder.

    Attributes:
        kind: what an entry is, for messages ("dataset format").
        package: dotted name of the package whose modules are the entries.
        exports: the name that every entry module defines.
        folder: a user's own folder with entries like the built-in ones; its names win.
    """

    kind: str
    package: str
    exports: str
    folder: Path | None = None

    def names(self) -> list[str]:
        """Return the entry names, sorted, without importing any entry."""
        found = {info.name for info in pkgutil.iter_modules(self._package_paths())}
        if self.folder is not None:
            found |= {path.stem for path in self.folder.glob("*.py")}
        return sorted(name for name in found if not name.startswith("_"))

    def summaries(self) -> dict[str, str]:
        """Return the first line of every entry's docstring, without importing any entry."""
        return {name: _summary(self._file_of(name)) for name in self.names()}

    def get(self, name: str) -> Any:
        """Import the entry and return what it exports.

        Raises:
            ConfigError: there is no such entry, or the module does not define the export.
        """
        entry = vars(self.module(name))
        if self.exports not in entry:
            problem = f"The {self.kind} {name!r} does not define {self.exports!r}."
            raise ConfigError(problem, got=sorted(n for n in entry if not n.startswith("_")))
        return entry[self.exports]

    def module(self, name: str) -> ModuleType:
        """Import the module of one entry."""
        if name not in self.names():
            guess = nearest(name, self.names())
            raise ConfigError(
                f"Unknown {self.kind}.",
                got=name,
                allowed=self.names(),
                fix=f"did you mean {guess}?" if guess else None,
            )
        own_file = self.folder / f"{name}.py" if self.folder else None
        if own_file is None or not own_file.is_file():
            return importlib.import_module(f"{self.package}.{name}")
        spec = importlib.util.spec_from_file_location(f"llmtuner_custom_{name}", own_file)
        if spec is None or spec.loader is None:
            raise ConfigError(f"The {self.kind} file cannot be imported.", got=str(own_file))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _file_of(self, name: str) -> Path:
        """Return the source of an entry: a file, or a package of that name."""
        folders = [Path(folder) for folder in self._package_paths()]
        if self.folder is not None:
            folders.insert(0, self.folder)
        files = [
            folder / end for folder in folders for end in (f"{name}.py", f"{name}/__init__.py")
        ]
        return next(file for file in files if file.is_file())

    def _package_paths(self) -> list[str]:
        spec = importlib.util.find_spec(self.package)
        assert spec is not None, self.package
        assert spec.submodule_search_locations is not None, self.package
        return list(spec.submodule_search_locations)


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0]
