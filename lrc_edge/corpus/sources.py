"""Sources of text: files, folders and hub datasets, streamed as documents."""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrc_edge.corpus.filters import Filters
from lrc_edge.errors import UserError, one_line

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

SUFFIXES = (".txt", ".jsonl", ".parquet")
SELF = "self"  # the teacher's own samples (train/data/self_data.py)
WANTED = ("give a .txt, .jsonl or .parquet file, a folder of them, or a hub dataset id "
          "(name, name:config or name:config:split)")
PASSAGE_CHARS = 4_000  # a .txt file is cut at blank lines into documents of about this size
LONGEST_PASSAGE = 64_000  # without blank lines: cut at the next line end
SHAREGPT_FIELD = "conversations"
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Messages = list[dict[str, str]]  # a conversation: a list of {"role": ..., "content": ...}
Document = str | Messages


class LeftOut:
    """Stands in a stream for a record that a filter left out: a resumed run counts records, whether kept or not."""


LEFT_OUT = LeftOut()


@dataclass(frozen=True)
class Fields:
    """Names of a record's fields, and the filters of records.

    A record with `messages` is a conversation, one with `text` is plain text.
    """

    text: str = "text"
    messages: str = "messages"  # empty: no record is a conversation
    filters: Filters = field(default_factory=Filters)

    @property
    def wanted(self) -> list[str]:
        """The field names, in the order in which a record is searched for them."""
        return list(dict.fromkeys(([self.messages, SHAREGPT_FIELD] if self.messages else []) + [self.text]))

    def __str__(self) -> str:
        """The field names for error messages, without ShareGPT's, which the user did not set."""
        return f"text field {self.text!r}" + (f" or messages field {self.messages!r}" if self.messages else "")


def documents(sources: Iterable[str], fields: Fields) -> Iterator[Document]:
    """Stream the documents of all sources that pass the filters. Raises UserError as `source_documents` does."""
    for source in sources:
        yield from (document for document in source_documents(source, fields) if not isinstance(document, LeftOut))


def source_documents(source: str, fields: Fields) -> Iterator[Document | LeftOut]:
    """Stream one source: a .txt/.jsonl/.parquet file, a folder of them, or a hub dataset (name:config:split).

    Records that a filter leaves out are LEFT_OUT in the stream. Raises UserError on any other source, an unreadable
    file, a record without text or messages, or a value that a filter cannot compare.
    """
    path = Path(source).expanduser()
    if source == SELF:
        raise UserError("--data self: works only with `build` and `train`, which have a teacher; " + WANTED)
    if path.is_dir():
        files = local_files([source])
        if not files:
            raise UserError(f"{path}: no {', '.join(SUFFIXES)} file in this folder; pass a folder with text files")
        for file in files:
            yield from _file_documents(file, fields)
    elif path.exists():
        yield from _file_documents(path, fields)
    elif looks_local(source):
        raise UserError(f"{source}: no such file or folder; {WANTED}")
    else:
        yield from _hub_documents(source, fields)


def looks_local(source: str) -> bool:
    """Whether the source can only be a path: hub datasets have no such names."""
    return Path(source).suffix in SUFFIXES or source.startswith(("/", ".", "~"))


def local_files(sources: Iterable[str]) -> list[Path]:
    """Return the files of the local sources, in reading order."""
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if source == SELF or not path.exists():
            continue
        found += sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES) if path.is_dir() else [path]
    return found


def known_fields(source: str) -> list[str] | None:
    """Return the names of the fields of a source's records, nested ones by their paths, without reading a record.

    None if only the records show them (jsonl; a hub dataset without a schema). Raises UserError as `source_documents`
    does.
    """
    path = Path(source).expanduser()
    if source == SELF or path.suffix == ".txt":
        return []
    if path.exists():
        files = local_files([source])
        return None if any(file.suffix == ".jsonl" for file in files) else [
            name for file in files if file.suffix == ".parquet" for name in _parquet_fields(file)]
    features = None if looks_local(source) else _hub_dataset(source).features
    return None if features is None else list(_paths(features))


def _paths(features: Mapping[str, Any]) -> Iterator[str]:
    for name, kind in features.items():
        yield from (f"{name}.{inner}" for inner in _paths(kind)) if isinstance(kind, Mapping) else (name,)


def _parquet_fields(path: Path) -> list[str]:
    import pyarrow.parquet

    try:
        return _column_paths(pyarrow.parquet.ParquetFile(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable_parquet(path, error) from error


def _column_paths(file: ParquetFile) -> list[str]:
    return [file.schema.column(i).path for i in range(len(file.schema))]


def _unreadable_parquet(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable parquet file ({one_line(error)}); download it again")


def _file_documents(path: Path, fields: Fields) -> Iterator[Document | LeftOut]:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of text file; need one of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        yield from _parquet_documents(path, fields)
        return
    try:
        with path.open(encoding="utf-8") as lines:
            if path.suffix == ".txt":
                yield from _passages(iter(lambda: lines.readline(LONGEST_PASSAGE), ""))
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _row_documents(json.loads(line), fields, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}:{number}: not JSON ({error}); write one JSON object per line") from error


def _parquet_documents(path: Path, fields: Fields) -> Iterator[Document | LeftOut]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        columns = [name for name in fields.wanted if name in names]
        if not columns:
            raise UserError(f"{path}: no {fields} among its columns ({', '.join(names)}); "
                            "name the right one with --set data.text_field=...")
        fields.filters.note(_column_paths(file))
        columns = list(dict.fromkeys(columns + fields.filters.columns))  # pyarrow reads those that exist
        for batch in file.iter_batches(columns=columns, batch_size=1024):
            for table in batch.to_pylist():
                row += 1
                yield from _row_documents(table, fields, f"{path} row {row}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable_parquet(path, error) from error


def _hub_dataset(source: str) -> Any:
    """Return the dataset for streaming; nothing of it is read yet."""
    from datasets import load_dataset

    name, config, split = (*source.split(":"), "", "")[:3]
    try:
        return load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # offline, misspelt, gated, no such split: the client raises many types
        raise UserError(f"{source}: no such file, and the hub has no such dataset ({one_line(error)}); "
                        f"{WANTED}") from error


def _hub_documents(source: str, fields: Fields) -> Iterator[Document | LeftOut]:
    stream, number = iter(_hub_dataset(source)), 0
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        except Exception as error:  # as above
            raise UserError(f"{source}: the hub failed after row {number} ({one_line(error)}); run the same "
                            "command again to resume") from error
        number += 1
        yield from _row_documents(row, fields, f"{source} row {number}")


def _row_documents(row: Any, fields: Fields, where: str) -> Iterator[Document | LeftOut]:
    """Yield the record's document, or LEFT_OUT; nothing if all its fields are null."""
    found = [name for name in fields.wanted if name in row] if isinstance(row, dict) else []
    if not found:
        has = f"has {', '.join(row)}" if isinstance(row, dict) else f"is a {type(row).__name__}"
        raise UserError(f"{where}: no {fields} ({has}); name the right field with --set data.text_field=...")
    name = next((name for name in found if row[name] is not None), None)
    if name is None:
        return
    value = row[name]
    if not fields.filters.keeps(row, where):
        yield LEFT_OUT
    elif name != fields.text:
        yield _messages(value, f"{where}: {name}")
    elif isinstance(value, str):
        yield value
    else:
        raise UserError(f"{where}: {name} is {type(value).__name__}, need text; "
                        "name another field with --set data.text_field=...")


def _messages(value: Any, where: str) -> Messages:
    """Convert a conversation of {role, content} or of ShareGPT's {from, value} to {role, content}."""
    if not isinstance(value, list):
        raise UserError(f"{where} is a {type(value).__name__}, need a list of {{role, content}}; "
                        'name the field with --set data.messages_field=..., "" for none')
    if not value:
        raise UserError(f"{where} is an empty conversation; need at least a question and an answer; remove the record")
    return [_message(message, f"{where}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise UserError(f"{where} is a {type(message).__name__}, need {{role, content}}; fix the record")
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:
        content = message.get("value")
        role = SHAREGPT_ROLES.get(message["from"])
        if role is None:
            raise UserError(f"{where} is from {message['from']!r}, need one of {', '.join(SHAREGPT_ROLES)}; "
                            "fix the record")
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{where} has role {role!r} and a {type(content).__name__} as content, need two texts; "
                        "fix the record")
    return {"role": role, "content": content}


def _passages(lines: Iterator[str]) -> Iterator[str]:
    """Yield passages of complete paragraphs, about PASSAGE_CHARS long, so that a book can be split into documents."""
    passage: list[str] = []
    size = 0
    for line in lines:
        if (size >= PASSAGE_CHARS and line == "\n") or size >= LONGEST_PASSAGE:
            yield "".join(passage).removesuffix("\n")
            passage, size = [], 0
            if line == "\n":
                continue
        passage.append(line)
        size += len(line)
    if size:
        yield "".join(passage)
