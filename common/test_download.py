"""Downloads and reading: resumable, never hanging, and honest about the fallback."""

import gzip
import json
import lzma
import sys
import time

import pytest

from common import DATA, download
from common.download import download_text, flatten, open_text, read_documents


def write_rows(folder, count=60, files=2):
    """A local dataset of `count` rows in JSON Lines files, as the hub would stream it."""
    folder.mkdir()
    rows = [{"text": f"document {i}\n\nsecond line of {i} \u2028 third", "n": i} for i in range(count)]
    for k in range(files):
        part = rows[k * count // files : (k + 1) * count // files]
        (folder / f"part-{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return [f"document {i} second line of {i} third" for i in range(count)]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Puts a local dataset in the hub's place; `hub.fail_after` breaks the connection after so many rows."""
    datasets = pytest.importorskip("datasets")

    class Hub:
        lines = write_rows(tmp_path / "rows")
        fail_after = None
        opened = 0

    class Breaking:
        def __init__(self, stream):
            self.stream = stream
            self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict

        def __iter__(self):
            for number, row in enumerate(self.stream):
                if number == Hub.fail_after:
                    raise ConnectionError("the line went dead")
                yield row

    def open_stream(dataset, subset, split):
        Hub.opened += 1
        files = sorted(str(file) for file in (tmp_path / "rows").glob("*.jsonl"))
        return Breaking(datasets.load_dataset("json", data_files=files, split=split, streaming=True))

    monkeypatch.setattr(download, "_open_stream", open_stream)
    monkeypatch.setattr(download, "_probe", lambda dataset: None)
    monkeypatch.setattr(download, "SAVE_BYTES", 200)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    return Hub


@pytest.fixture
def offline(monkeypatch):
    """A machine without a network."""

    def probe(dataset):
        raise download.HubError("no network")

    monkeypatch.setattr(download, "_probe", probe)


def read_lines(path):
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def test_download_writes_one_document_per_line(hub, tmp_path):
    path = tmp_path / "out" / "corpus.txt"
    assert download_text(path, dataset="owner/name", max_bytes=10**6) == "hub"
    assert read_lines(path) == hub.lines
    assert not list(path.parent.glob("*.part*"))
    assert download_text(path, dataset="owner/name", max_bytes=10**6) == "hub"
    assert hub.opened == 1  # it stood already


def test_download_stops_at_the_asked_size(hub, tmp_path):
    path = tmp_path / "corpus.txt"
    download_text(path, dataset="owner/name", max_bytes=500)
    lines = read_lines(path)
    assert lines == hub.lines[: len(lines)]
    assert 500 <= path.stat().st_size < 500 + 60
    download_text(path, dataset="owner/name", max_bytes=900)  # another size is another request
    assert path.stat().st_size >= 900


@pytest.mark.parametrize("fail_after", [2, 7, 31])
def test_a_broken_download_resumes_with_the_same_bytes(hub, tmp_path, fail_after):
    path, bundled = tmp_path / "corpus.txt", tmp_path / "bundled.txt"
    bundled.write_text("the sample\n")
    hub.fail_after = fail_after
    outcome = download_text(path, dataset="owner/name", max_bytes=10**6, fallback=bundled)
    if fail_after == 2:  # breaks before the first note each time: no progress, so it gives up
        assert outcome == "fallback" and path.read_text() == "the sample\n" and hub.opened == 3
        hub.fail_after = None
        outcome = download_text(path, dataset="owner/name", max_bytes=10**6, fallback=bundled)
    assert outcome == "hub"
    assert read_lines(path) == hub.lines
    assert not list(tmp_path.glob("*.part*"))


def test_resuming_does_not_start_over(hub, tmp_path):
    path = tmp_path / "corpus.txt"
    hub.fail_after = 0
    part, note = tmp_path / "corpus.txt.part", tmp_path / "corpus.txt.part.json"
    with pytest.raises(SystemExit) as stopped:
        download_text(path, dataset="owner/name", max_bytes=10**6, no_fallback=True)
    assert stopped.value.code == 1 and not path.exists()
    request = {"dataset": "owner/name", "subset": None, "split": "train", "column": "text", "max_bytes": 10**6}
    kept = "".join(f"kept line {i}\n" for i in range(10))
    part.write_text(kept + "half a li")  # killed while writing
    note.write_text(json.dumps({"request": request, "documents": 10, "bytes": len(kept), "position": {}}))
    hub.fail_after = None
    assert download_text(path, dataset="owner/name", max_bytes=10**6) == "resumed"
    assert read_lines(path) == [f"kept line {i}" for i in range(10)] + hub.lines[10:]


def test_a_part_of_another_request_is_not_continued(hub, tmp_path):
    path = tmp_path / "corpus.txt"
    (tmp_path / "corpus.txt.part").write_text("foreign\n")
    (tmp_path / "corpus.txt.part.json").write_text(
        json.dumps({"request": {"dataset": "other"}, "documents": 1, "bytes": 8, "position": {}})
    )
    assert download_text(path, dataset="owner/name", max_bytes=10**6) == "hub"
    assert read_lines(path) == hub.lines


def test_a_reader_joins_rows(hub, tmp_path):
    path = tmp_path / "pairs.txt"

    def pairs(rows):
        for row in rows:
            yield f"{row['n']} and {next(rows)['n']}"

    download_text(path, dataset="owner/name", max_bytes=10**6, reader=pairs)
    assert read_lines(path) == [f"{i} and {i + 1}" for i in range(0, 60, 2)]


def test_json_lines_keep_structure(hub, tmp_path):
    path = tmp_path / "chat.jsonl"
    download_text(
        path, dataset="owner/name", max_bytes=10**6, reader=lambda rows: ({"messages": [row["text"]]} for row in rows)
    )
    assert json.loads(read_lines(path)[3]) == {"messages": ["document 3\n\nsecond line of 3 \u2028 third"]}


def test_a_wrong_column_names_the_right_ones(hub, tmp_path):
    with pytest.raises(ValueError, match="column='body' is not in this dataset: it has text, n"):
        download_text(tmp_path / "x.txt", dataset="owner/name", column="body", max_bytes=100)


def test_offline_writes_the_sample_and_says_so(offline, tmp_path, capsys):
    path = tmp_path / "corpus.txt"
    bundled = DATA / "sample_corpus.jsonl.xz"
    assert download_text(path, dataset="owner/name", max_bytes=10**9, fallback=bundled) == "fallback"
    said = capsys.readouterr()
    assert "owner/name" in said.err and "no network" in said.err and "sample_corpus.jsonl.xz" in said.out
    assert read_lines(path)[:3] == [flatten(text) for text, _ in zip(read_documents(bundled), range(3))]
    with pytest.raises(SystemExit) as stopped:
        download_text(tmp_path / "no.txt", dataset="owner/name", max_bytes=99, fallback=bundled, no_fallback=True)
    assert stopped.value.code == 1 and not (tmp_path / "no.txt").exists()


def test_the_sample_replaces_an_earlier_sample_and_nothing_else(hub, monkeypatch, tmp_path, capsys):
    path, bundled = tmp_path / "corpus.txt", tmp_path / "bundled.txt"
    bundled.write_text("one\ntwo\n")
    request = {"dataset": "owner/name", "fallback": bundled}
    assert download_text(path, **request, max_bytes=500) == "hub"
    from_the_hub = path.read_bytes()

    def no_network(dataset):
        raise download.HubError("no network")

    monkeypatch.setattr(download, "_probe", no_network)
    assert download_text(path, **request, max_bytes=900) == "kept" and path.read_bytes() == from_the_hub
    assert f"Kept {path} as it is" in capsys.readouterr().out
    path.unlink()
    (tmp_path / "corpus.txt.json").unlink()
    path.write_text("the user's own\n")
    assert download_text(path, **request, max_bytes=900) == "kept" and path.read_text() == "the user's own\n"
    path.unlink()
    assert download_text(path, **request, max_bytes=900) == "fallback" and path.read_text() == "one\ntwo\n"
    bundled.write_text("one\ntwo\nthree\n")
    assert download_text(path, **request, max_bytes=900) == "fallback" and path.read_text() == "one\ntwo\nthree\n"
    path.write_text("the user's own, in place of the sample\n")
    assert download_text(path, **request, max_bytes=900) == "kept" and "own" in path.read_text()


def test_hub_offline_variable_is_respected(monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    pytest.importorskip("datasets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(download.HubError, match="HF_HUB_OFFLINE"):
        download._probe("owner/name")


def test_without_datasets_the_group_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it now fails
    bundled = tmp_path / "bundled.txt"
    bundled.write_text("one\ntwo\n")
    assert download_text(tmp_path / "x.txt", dataset="owner/name", max_bytes=99, fallback=bundled) == "fallback"
    assert "uv sync --group data" in capsys.readouterr().err
    assert (tmp_path / "x.txt").read_text() == "one\ntwo\n"


def test_a_silent_connection_does_not_hang(monkeypatch, tmp_path, capsys):
    def silent(dataset, subset, split):
        time.sleep(30)

    monkeypatch.setattr(download, "_open_stream", silent)
    monkeypatch.setattr(download, "_probe", lambda dataset: None)
    monkeypatch.setattr(download, "STALL_S", 0.05)
    monkeypatch.setattr(download, "RETRIES", 0)
    monkeypatch.setattr(download.threading.Thread, "join", lambda self, timeout=None: None)
    bundled = tmp_path / "bundled.txt"
    bundled.write_text("one\n")
    assert download_text(tmp_path / "x.txt", dataset="owner/name", max_bytes=99, fallback=bundled) == "fallback"
    assert "no answer for" in capsys.readouterr().err


def test_a_full_disk_is_an_error_of_its_own(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(download.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"could not write .*part \(No space left\): free some space"):
        download_text(tmp_path / "x.txt", dataset="owner/name", max_bytes=10**6, fallback=DATA / "shakespeare.txt")
    assert not (tmp_path / "x.txt").exists()


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_reads_text_and_json_lines_compressed_or_not(tmp_path, suffix):
    texts = ["first", "with\nnewline, unicode \u00e9\u2028 and \x85", "last"]
    jsonl = "".join(json.dumps({"text": text, "source": "s"}) + "\n" for text in texts) + "\n"
    plain = "first\r\n\nsecond \u2028 still second\nlast"
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}.get(suffix)
    if pack is None:
        pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    for name, content, expected in (
        ("a.jsonl", jsonl, texts),
        ("a.txt", plain, ["first", "second \u2028 still second", "last"]),
    ):
        path = tmp_path / (name + suffix)
        path.write_bytes(pack(content.encode()))
        assert list(read_documents(path)) == expected
        with open_text(path) as file:
            assert file.read() == content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"body": 1}\n', "line 2: not a JSON object with a text field"),
        ("a.jsonl", b'{"text": "ok"}\nnot json\n', "line 2: not a JSON object"),
        ("a.txt", b"\xff\xfe\x00", "damaged or not UTF-8"),
        ("a.txt.gz", gzip.compress(b"hello\n" * 1000, mtime=0)[:-9], "damaged"),
        ("a.txt.gz", b"no gzip at all", "damaged"),
        ("a.txt.xz", lzma.compress(b"hello\n" * 1000)[:-20], "damaged"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        list(read_documents(tmp_path / name))
    assert name in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        list(read_documents(tmp_path / "none.txt"))
    with pytest.raises(FileNotFoundError, match="is a folder"):
        open_text(tmp_path)


def test_the_bundled_sample_is_sound():
    documents = list(read_documents(DATA / "sample_corpus.jsonl.xz"))
    assert len(documents) > 1000 and sum(len(text.encode()) for text in documents) > 7e6
    assert len(set(documents)) == len(documents)
    assert (DATA / "sample_corpus.jsonl.xz").stat().st_size < 2.2e6


if __name__ == "__main__":
    print("flatten:", repr(flatten("A title\n\nand a paragraph.")))
    for text, _ in zip(read_documents(DATA / "sample_corpus.jsonl.xz"), range(3)):
        print("document:", repr(text[:70]))
    raise SystemExit(pytest.main([__file__, "-q"]))
