"""What is installed where a plan will run, as far as it is known."""

from __future__ import annotations

from msgspec import Struct, field


class Software(Struct, frozen=True, kw_only=True):
    """Libraries and tools. What nobody looked for is taken to be there, in a current release."""

    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries that were found, by the names of their distributions."""
    is_complete: bool = False
    """Whether this is the machine that will train: what was not found is not there."""
    builds_extensions: bool | None = None
    """Whether torch can compile C++ extensions; None: not known."""

    def __hash__(self) -> int:
        """Return a hash: a dictionary has none."""
        return hash((tuple(self.versions), self.is_complete, self.builds_extensions))

    def lacks(self, library: str) -> bool:
        """Tell whether a library is known not to be installed."""
        return self.is_complete and library not in self.versions
