"""Text in and out: public data through Hugging Face ``datasets``, and any text file as documents.

`download_text` writes one document per line, resumes where an interrupted download stopped, and takes the bundled
sample when the hub cannot be reached. `read_documents` reads what it wrote, and JSON Lines, compressed or not.
"""

import contextlib
import gzip
import io
import json
import lzma
import os
import queue
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

from common.progress import track

PROBE_S = 10  # seconds in which the hub must answer at all
STALL_S = 45  # seconds without a document after which a connection counts as dead
RETRIES = 2  # reconnections in a row without a new document
SAVE_BYTES = 4 << 20  # the place to resume from is written down this often
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, UnicodeDecodeError)


class HubError(Exception):
    """The hub cannot be reached, or stopped answering."""


class _DocumentError(ValueError):
    """A document that cannot be used; the message says which and why."""


def open_text(path):
    """Open a text file as UTF-8 for reading; ``.gz``, ``.xz`` and ``.zst`` are decompressed on the way.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: ``.zst`` without the zstandard library.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: give a text file (.txt or .jsonl, also .gz, .xz or .zst)")
    if path.suffix in _OPENERS:
        return _OPENERS[path.suffix](path, "rt", encoding="utf-8", newline="\n")
    if path.suffix == ".zst":
        return io.TextIOWrapper(_zstd().ZstdDecompressor().stream_reader(open(path, "rb")), "utf-8", newline="\n")
    return open(path, encoding="utf-8", newline="\n")


def damage_of(path):
    """The exceptions that reading a damaged file of this kind raises."""
    return (*DAMAGED, _zstd().ZstdError) if Path(path).suffix == ".zst" else DAMAGED


def _zstd():
    """The zstandard library, which only the ``data`` group brings."""
    try:
        import zstandard
    except ImportError as error:
        raise ValueError("reading .zst files needs zstandard: install it with `uv sync --group data`") from error
    return zstandard


def read_documents(path):
    """Yield the documents of a file, one string each; empty ones are left out.

    ``.txt`` holds one document per line, ``.jsonl`` one object with a ``text`` field per line; both may be compressed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not UTF-8, or a line of it is no such object; the message says which.
    """
    path = Path(path)
    kinds = [suffix for suffix in path.suffixes[-2:] if suffix not in (*_OPENERS, ".zst")]
    jsonl = bool(kinds) and kinds[-1] in (".jsonl", ".json")
    damaged = damage_of(path)
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, 1):
                text = _field(line, path, number) if jsonl and line.strip() else line.rstrip("\r\n")
                if text.strip():
                    yield text
        except _DocumentError:
            raise
        except damaged as error:
            raise ValueError(f"{path} is damaged or not UTF-8 text ({error}): get it again") from error


def _field(line, path, number):
    """The text of one JSON line."""
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise _DocumentError(f'{path}, line {number}: not a JSON object with a text field such as {{"text": "..."}}')
    return text


def flatten(text):
    """One line of a document: whatever breaks lines becomes a single space.

    >>> flatten("A title\\n\\nAnd a  paragraph.\\r\\n")
    'A title And a  paragraph.'
    """
    return " ".join(line for line in map(str.strip, text.splitlines()) if line)


def fetch(settings, path, sources, sizes, fallback):
    """What a download script does: get the SOURCE in the SIZE that its settings name; see `download_text`.

    Args:
        sources: name -> arguments of `download_text`.
        sizes: name -> bytes at most.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    for name, known in (("SIZE", sizes), ("SOURCE", sources)):
        if getattr(settings, name) not in known:
            raise ValueError(f"{name}={getattr(settings, name)} is unknown: use one of {', '.join(known)}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends it at once: it resumes
    source, most = sources[settings.SOURCE], sizes[settings.SIZE]
    return download_text(path, **source, max_bytes=most, fallback=fallback, no_fallback=settings.NO_FALLBACK)


def download_text(path, *, dataset, subset=None, split="train", column="text", max_bytes,
                  fallback=None, no_fallback=False, reader=None):  # fmt: skip
    """Stream a public dataset into a text file, one document per line; resumes, and falls back when offline.

    Args:
        path: where to write; a path that ends in ``.jsonl`` gets JSON Lines, any other flattened text.
        dataset: ``owner/name`` on the Hugging Face hub, or a local folder that ``datasets`` can load.
        subset: the dataset's configuration, such as ``wikitext-103-raw-v1``.
        column: the field that holds the text.
        max_bytes: stop when that much is written.
        fallback: bundled file to write instead when the hub cannot be reached; it replaces nothing but an earlier one.
        no_fallback: exit with status 1 then, and write nothing.
        reader: turns the iterator of rows into an iterator of documents (strings, or dicts for ``.jsonl``); by
            default each row's `column`.

    Returns:
        ``"hub"``: it is all there; ``"resumed"``: so it is, and an earlier download was continued;
        ``"fallback"``: the bundled sample was written; ``"kept"``: nothing was, the file that stands there is better.

    Raises:
        ValueError: the dataset has no such column.
        OSError: the disk is full or not writable; what was downloaded is kept for the next try.
        SystemExit: 1, without a connection and without a fallback.
    """
    path = Path(path)
    request = {"dataset": str(dataset), "subset": subset, "split": split, "column": column, "max_bytes": int(max_bytes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    note = _read_json(_note_path(path))
    if note and path.is_file() and note == {"request": request, "origin": "hub", "bytes": path.stat().st_size}:
        print(f"{path} stands already ({note['bytes'] / 1e6:.1f} MB of {dataset})")
        return "hub"
    download = _Download(path, request, reader)
    try:
        _probe(dataset)
        download.run()
    except HubError as error:
        print(f"Could not read {dataset} from the Hugging Face hub: {error}", file=sys.stderr)
        if download.bytes:
            print(f"{download.bytes / 1e6:.1f} MB are kept; the same command continues there later.", file=sys.stderr)
        if no_fallback or fallback is None:
            raise SystemExit(1) from None
        if path.is_file() and not (note and note.get("origin") == "fallback" and note.get("bytes") == _size(path)):
            print(f"Kept {path} as it is ({_size(path) / 1e6:.1f} MB): the bundled sample replaces no other text")
            return "kept"
        _write_fallback(path, fallback, max_bytes, request)
        return "fallback"
    print(f"Wrote {download.bytes / 1e6:.1f} MB ({download.documents:,} documents of {dataset}) to {path}")
    return "resumed" if download.resumed else "hub"


class _Download:
    """One download into ``path.part``; ``path.part.json`` notes how much of it is sure and where the stream was."""

    def __init__(self, path, request, reader):
        self.path, self.request, self.reader = path, request, reader
        self.part = path.with_name(path.name + ".part")
        self.note = path.with_name(path.name + ".part.json")
        self._rewind()
        self.resumed = self.bytes > 0

    def _rewind(self):
        """Go back to what the note vouches for."""
        self.documents, self.bytes, self.position = 0, 0, None  # of the stream, in the file, the stream's own place
        note = _read_json(self.note)
        if note and note.get("request") == self.request and _size(self.part) >= note["bytes"]:
            self.documents, self.bytes, self.position = note["documents"], note["bytes"], note["position"]

    def run(self):
        """Read to the end, reconnecting a few times, and put the file in place."""
        if self.resumed:
            print(f"Continuing after the {self.bytes / 1e6:.1f} MB that are there")
        tries = 0
        while True:
            before = self.bytes
            try:
                self._read()
                break
            except HubError as error:
                self._rewind()
                tries = 1 if self.bytes > before else tries + 1
                if tries > RETRIES:
                    raise
                print(f"{error}; reconnecting ({tries} of {RETRIES}) ...", file=sys.stderr)
                time.sleep(2 * tries)
        os.replace(self.part, self.path)
        _write_json(_note_path(self.path), {"request": self.request, "origin": "hub", "bytes": self.bytes})
        self.note.unlink(missing_ok=True)

    def _read(self):
        """Append documents until the file has `max_bytes` or the dataset ends."""
        left = self.request["max_bytes"] - self.bytes
        reading = _in_thread(self._documents())
        with _explained(self.part), _open_part(self.part, self.bytes) as file, reading as documents:
            for document, position in track(documents, left, self.path.name, "B", size=self._size):
                line = _line(document, self.path)
                file.write(line)
                self.documents, self.bytes = self.documents + 1, self.bytes + len(line)
                if position is not None:
                    self._save(file, position)
                if self.bytes >= self.request["max_bytes"]:
                    break

    def _size(self, item):
        """What an item adds to the file, for the progress bar (about: the exact number is known when written)."""
        return len(item[0]) + 1

    def _save(self, file, position):
        """Note that all up to here is safely written."""
        file.flush()
        os.fsync(file.fileno())
        self.position = position
        _write_json(
            self.note,
            {"request": self.request, "documents": self.documents, "bytes": self.bytes, "position": position},
        )

    def _documents(self):
        """(document, position) from where the download stands; the position is None but for one in many.

        Runs in the reading thread, the only one that may ask the stream where it is.
        """
        try:
            stream, skip = _open_stream(self.request["dataset"], self.request["subset"], self.request["split"]), 0
            if self.position:
                stream.load_state_dict(self.position)
            else:
                skip = self.documents  # a reader joins rows, so that only its documents can be counted
            unsaved = 0
            documents = self.reader(iter(stream)) if self.reader else _column(stream, self.request["column"])
            for number, document in enumerate(documents):
                if number < skip:
                    continue
                unsaved += len(document) if isinstance(document, str) else len(str(document))
                position = None
                if unsaved >= SAVE_BYTES:
                    unsaved, position = 0, {} if self.reader else stream.state_dict()
                yield document, position
        except (HubError, _DocumentError):
            raise
        except Exception as error:  # datasets raises whatever its many layers raise
            raise HubError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}") from error


def _column(stream, column):
    """The text of each row."""
    for row in stream:
        if column not in row:
            raise _DocumentError(f"column={column!r} is not in this dataset: it has {', '.join(row)}")
        yield row[column] or ""


def _line(document, path):
    """One encoded line of the file, or nothing for an empty document."""
    if path.suffix == ".jsonl":
        record = {"text": document} if isinstance(document, str) else document
        text = json.dumps(record, ensure_ascii=False)
    else:
        text = flatten(document)
    return (text + "\n").encode("utf-8", "replace") if text else b""


def _open_part(part, size):
    """Open the partial file for appending, without what came after the last note."""
    file = open(part, "r+b" if size else "wb")  # noqa: SIM115 - the caller closes it
    file.truncate(size)
    file.seek(size)
    return file


@contextlib.contextmanager
def _explained(path):
    """Say what a full disk means here."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"could not write {path} ({error.strerror or error}): free some space and run the same command again, "
            f"a download continues where it stopped"
        ) from error


@contextlib.contextmanager
def _in_thread(iterator):
    """Run an iterator in a thread of its own; a connection that goes silent for `STALL_S` raises HubError."""
    items, stop, end = queue.Queue(maxsize=256), threading.Event(), object()

    def put(item):
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=0.2)
                return

    def work():
        try:
            for item in iterator:
                put((item, None))
                if stop.is_set():
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    def take():
        while True:
            try:
                item, error = items.get(timeout=STALL_S)
            except queue.Empty:
                raise HubError(f"no answer for {STALL_S} seconds") from None
            if error is not None:
                raise error
            if item is end:
                return
            yield item

    thread = threading.Thread(target=work, daemon=True)  # a daemon: a dead socket must not keep the script alive
    thread.start()
    try:
        yield take()
    finally:
        stop.set()
        thread.join(timeout=2)


def _probe(dataset):
    """Ask the hub for a sign of life, so that no script waits minutes for a machine without a network."""
    if Path(dataset).exists():
        return
    try:
        import datasets  # noqa: F401 - only whether it is there
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session
    except ImportError as error:
        raise HubError(f"{error.name} is not installed: `uv sync --group data` brings it") from error
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise HubError("HF_HUB_OFFLINE is set")
    answer = []

    def ask():
        try:
            answer.append(get_session().head(constants.ENDPOINT, timeout=PROBE_S))
        except Exception as error:  # requests and httpx have no error in common
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # name resolution knows no timeout of its own
    thread.start()
    thread.join(PROBE_S + 1)
    if not answer:
        raise HubError(f"{constants.ENDPOINT} did not answer within {PROBE_S} seconds")
    if isinstance(answer[0], Exception):
        raise HubError(f"{constants.ENDPOINT} cannot be reached ({answer[0]})")


def _open_stream(dataset, subset, split):
    """The rows of a dataset as a stream (tests put local files in its place)."""
    try:
        import datasets
    except ImportError as error:
        raise HubError("datasets is not installed: `uv sync --group data` brings it") from error
    return datasets.load_dataset(dataset, subset, split=split, streaming=True)


def _write_fallback(path, fallback, max_bytes, request):
    """Put the bundled sample where the download would have gone."""
    raw = path.suffix == ".jsonl"  # lines of JSON are copied as they are
    temporary, size, documents = path.with_name(path.name + ".tmp"), 0, 0
    try:
        with contextlib.ExitStack() as files:
            source = files.enter_context(open_text(fallback)) if raw else read_documents(fallback)
            files.enter_context(_explained(path))
            file = files.enter_context(open(temporary, "wb"))
            for document in source:
                line = document.encode() if raw else _line(document, path)
                file.write(line)
                size, documents = size + len(line), documents + 1
                if size >= max_bytes:
                    break
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _write_json(_note_path(path), {"request": request, "origin": "fallback", "bytes": size})
    print(f"Wrote the bundled {Path(fallback).name} to {path} instead ({size / 1e6:.1f} MB, {documents:,} documents)")


def _note_path(path):
    """Where the origin of a finished file is noted."""
    return path.with_name(path.name + ".json")


def _size(path):
    """Bytes of a file; -1 where there is none."""
    return path.stat().st_size if path.is_file() else -1


def _read_json(path):
    """What a JSON file holds, or None."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write_json(path, value):
    """Write a JSON file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)
