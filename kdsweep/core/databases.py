"""Addresses of databases, as SQLAlchemy, MLflow and Optuna take them."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from kdsweep.core.errors import InputError

PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306, "mssql": 1433}
LOCAL = (None, "", "127.0.0.1", "::1")


def sqlite_url(file: Path) -> str:
    """Return the URL of a SQLite file; raise InputError if the installed SQLAlchemy has none for this path."""
    # With a driver in its scheme, MLflow does not make a folder of the quoted name.
    quoted = URL.create("sqlite+pysqlite", database=str(file)).render_as_string()
    for url in (f"sqlite:///{file}", quoted):
        if make_url(url) == URL.create(make_url(url).drivername, database=str(file)):
            return url
    raise InputError(f"{file}: a database cannot have this address; use a store without ? in its path")


def absolute(url: str) -> str:
    """Return the address of a SQLite file from the root, whatever the working directory; others as they are."""
    file = _sqlite_file(url)
    return url if file is None or file.is_absolute() else sqlite_url(file.absolute())


def database_of(url: str) -> tuple[object, ...] | None:
    """Return a key that all spellings of a database's address share; None if it is not one."""
    if file := _sqlite_file(url):
        return "sqlite", file.resolve()
    if (parts := _parse(url)) is None:
        return None
    kind, host = parts.get_backend_name(), "localhost" if parts.host in LOCAL else str(parts.host).lower()
    # A PostgreSQL database holds schemas, which its options may choose.
    return kind, host, parts.port or PORTS.get(kind), parts.database or parts.username, parts.query.get("options")


def shown(url: str) -> str:
    """Return an address without its password."""
    parts = _parse(url)
    return url if parts is None else parts.render_as_string(hide_password=True)


def _parse(url: str) -> URL | None:
    try:
        return make_url(url)
    except ArgumentError:
        return None


def _sqlite_file(url: str) -> Path | None:
    parts = _parse(url)
    if parts is None or parts.get_backend_name() != "sqlite" or parts.database in (None, "", ":memory:"):
        return None
    return Path(str(parts.database).removeprefix("file:"))
