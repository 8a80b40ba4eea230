"""Fields of annotation records, checked as they are taken: a sentence says which record of which file is wrong."""

from collections.abc import Iterator
from typing import Any

from uground.training.data.masks import check_size, shown


class Record:
    """
    An object with named fields out of an annotation file.

    Args:
        value: what stands in the file.
        name: what to call it in messages, with its file.

    Every method raises a `ValueError` that begins with `name` where a field is missing or of another type.
    """

    def __init__(self, value: object, name: str):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object with named fields, got {shown(value)}")
        self.value, self.name = value, name

    def __contains__(self, key: str) -> bool:
        return self.value.get(key) is not None

    def take(self, key: str) -> Any:
        """The field as it stands."""
        if key not in self.value:
            held = ", ".join(shown(name) for name in list(self.value)[:10]) or "nothing"
            raise ValueError(f"{self.name} must have {key!r}, got {held}")
        return self.value[key]

    def text(self, key: str) -> str:
        """A text without the space around it; it may be empty."""
        return checked_text(self.take(key), f"{self.name}: {key}")

    def optional_text(self, key: str) -> str | None:
        """A text that is not blank, or None."""
        return (self.text(key) or None) if key in self else None

    def filled_text(self, key: str) -> str:
        """A text that is not blank, such as the name of a file."""
        text = self.text(key)
        if not text:
            raise ValueError(f"{self.name}: {key} must not be empty, got {self.value[key]!r}")
        return text

    def key(self, key: str) -> int | str:
        """A number or text that names a record."""
        return checked_key(self.take(key), f"{self.name}: {key}")

    def flag(self, key: str) -> bool:
        """True or false, also as 1 or 0; false where the field is missing."""
        return key in self and checked_flag(self.value[key], f"{self.name}: {key}")

    def items(self, key: str) -> list:
        """A list."""
        return checked_list(self.take(key), f"{self.name}: {key}")

    def optional_items(self, key: str) -> list:
        """A list, empty where the field is missing or null."""
        return self.items(key) if key in self else []

    def texts(self, key: str) -> list[str]:
        """A list of texts, each without the space around it."""
        return [checked_text(one, f"{self.name}: {key} {number}") for number, one in enumerate(self.items(key))]

    def record(self, key: str) -> "Record":
        """Another object with named fields."""
        return Record(self.take(key), f"{self.name}: {key}")

    def records(self, key: str, label: str) -> list["Record"]:
        """A list of objects, each called `label` and its number from 0."""
        return records(self.items(key), f"{self.name},", label)

    def keyed_records(self, key: str, label: str) -> dict[int | str, "Record"]:
        """A list of objects by their `id`."""
        found = {}
        for record in self.records(key, label):
            number = record.key("id")
            found[number] = Record(record.value, f"{self.name} {label} {shown(number)}")
        return found

    def size(self) -> tuple[int, int]:
        """`height` and `width` in pixels."""
        return check_size([self.take("height"), self.take("width")], self.name)


def records(value: object, name: str, label: str) -> list[Record]:
    """A list of objects, each called `name`, `label` and its number from 0."""
    return [
        Record(one, f"{name} {label} {number}") for number, one in enumerate(checked_list(value, name.rstrip(",")))
    ]


def keyed(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Keys and values of an object whose keys are names; null stands for none."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be an object with named fields, got {shown(value)}")
    return iter((value or {}).items())


def checked_text(value: object, name: str) -> str:
    """A text of whole characters, without the space around it."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be a text of whole characters, got half of one in {shown(value)}") from None
    return value.strip()


def checked_list(value: object, name: str) -> list:
    """A list; tuples are lists too."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list, got {shown(value)}")
    return list(value)


def checked_key(value: object, name: str) -> int | str:
    """A whole number or a text."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{name} must be a whole number or a text, got {shown(value)}")
    return checked_text(value, name) if isinstance(value, str) else value


def checked_flag(value: object, name: str) -> bool:
    """True or false, also as 1 or 0."""
    if value not in (True, False):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")
    return bool(value)
