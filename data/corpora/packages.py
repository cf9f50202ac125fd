"""Python sources of installed packages: text that every machine has some of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from data.cutting import Cut, Entry
from kernels.errors import UserError, require


class PackageSources:
    """The .py files that an installed package brought, in the order of their names.

    wanted: its name, or name==version to insist on one. Raises ``UserError`` if the package isn't
    installed, has another version, or doesn't say what it brought.
    """

    def __init__(self, wanted: str):
        name, _, version = wanted.partition("==")
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise UserError(f"corpus.packages must be installed, got {name!r}") from None
        require(
            version in ("", package.version),
            "corpus.packages",
            f"must be installed versions ({name}=={package.version})",
            wanted,
        )
        files = sorted(str(file) for file in package.files or () if file.suffix == ".py")
        require(len(files) > 0, "corpus.packages", "must have brought Python sources", name)
        self.name = name
        self.version = package.version
        self._paths = [Path(package.locate_file(file)) for file in files]

    @property
    def source(self) -> list[str]:
        """Name, version and SHA-256 of all sources: what the entries depend on."""
        digest = hashlib.sha256()
        for path in self._paths:
            content = self._read(path)
            digest.update(f"{len(content)} ".encode())
            digest.update(content)
        return [self.name, self.version, digest.hexdigest()]

    @property
    def num_bytes(self) -> int:
        """Size of all sources."""
        return sum(path.stat().st_size for path in self._paths if path.is_file())

    def entries(self) -> Iterator[Entry]:
        """One entry a file, cut at two blank lines; what isn't UTF-8 is left out."""
        for path in self._paths:
            try:
                yield Entry(self._read(path).decode(), Cut.two_blank_lines)
            except UnicodeDecodeError:
                continue

    def _read(self, path: Path) -> bytes:
        # A file that was removed after the installation is no source any more.
        return path.read_bytes() if path.is_file() else b""
