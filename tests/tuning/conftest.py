"""Databases of trials, whose writes need not outlive a machine that loses its power."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine


@pytest.fixture(scope="package", autouse=True)
def unsynchronized() -> Iterator[None]:
    """SQLite waits for the disk at each of a thousand commits otherwise."""

    def connected(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", connected)
    yield
    event.remove(Engine, "connect", connected)
