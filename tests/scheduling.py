"""What `pytest -n` keeps together in one process, and in which order."""

from __future__ import annotations

import re

import pytest
from xdist.scheduler import LoadScopeScheduling

_OF_A_TYPE = re.compile(
    r"(?P<file>.*/test_(?:architectures|options|other_configs|wrappers)\.py)::\w+\[(?:tp\d-)?(?P<name>[^\]]+)\]"
)


class ByFile(LoadScopeScheduling):
    """A file's tests run in one process, for its fixtures; of files that go through all types, a type's, for its checkpoint."""

    def __init__(self, config: pytest.Config, log: object = None) -> None:
        config.option.loadscopereorder = False  # it is `filling_last` that says the order
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        found = _OF_A_TYPE.fullmatch(nodeid)
        return f"{found['file']}[{found['name']}]" if found else nodeid.partition("::")[0]


def filling_last(items: list[pytest.Item]) -> None:
    """Types come last: units of a second each fill up what whole files leave uneven between the processes."""
    items.sort(key=lambda item: _OF_A_TYPE.fullmatch(item.nodeid) is not None)
