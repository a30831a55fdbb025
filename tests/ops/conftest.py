"""The matrix holds each case on the implementations that it has."""

from typing import Any


def pytest_collection_modifyitems(items: list[Any]) -> None:
    def exists(item: Any) -> bool:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        return (
            "case" not in given
            or "impl" not in given
            or given["impl"] in given["case"].implementations
        )

    items[:] = [item for item in items if exists(item)]
