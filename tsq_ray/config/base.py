"""Base class and types shared by all settings sections."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, SerializationInfo, model_serializer
from pydantic_core.core_schema import SerializerFunctionWrapHandler

Precision = Literal["auto", "fp32", "bf16"]

_RECORD = object()
"""Serialization context of `Section.record`."""


class Section(BaseModel):
    """A frozen section of the settings; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )
    NEWER: ClassVar[frozenset[str]] = frozenset()
    """Settings added after the records in tests/data/0.1.0 were written."""

    def record(
        self, *, include: Iterable[str] | None = None, exclude: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Return the settings as JSON for the record that a bundle or a run keeps of them.

        A newer setting is left out at its default, so that an older version without it can still
        read the record after a rollback.
        """
        fields = set(type(self).model_fields) if include is None else set(include)
        return self.model_dump(mode="json", include=fields - set(exclude), context=_RECORD)

    @model_serializer(mode="wrap")
    def _without_newer(
        self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        record: dict[str, Any] = serialize(self)
        if info.context is not _RECORD:
            return record
        fields = type(self).model_fields
        unset = {name for name in self.NEWER if getattr(self, name) == fields[name].get_default()}
        return {name: value for name, value in record.items() if name not in unset}
