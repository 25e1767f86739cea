"""Reading documents: files, folders, data sets, and the documentation inside Python."""

from __future__ import annotations

import inspect
import sys
import textwrap
from types import SimpleNamespace

import pytest

from fastsae.checks import BadType, BadValue, FastSAEError
from fastsae.data import read_texts
from fastsae.data.text import _python_docs, is_dataset, text_digest


@pytest.fixture
def corpus(tmp_path):
    """A folder of small files, among them a binary and a hidden one."""
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.md").write_text("zwölf\n", "utf-8")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "  "}\n{"text": "four", "n": 1}\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00\x00")
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / ".git" / "config").write_text("hidden")
    return tmp_path


def test_folder_in_sorted_order(corpus):
    assert list(read_texts(corpus)) == ["one", "three", "four", "zwölf\n"]
    assert list(read_texts(str(corpus))) == list(read_texts(corpus))


def test_files_in_the_order_given(corpus):
    assert list(read_texts([corpus / "b" / "two.md", corpus / "a.txt"])) == ["zwölf\n", "one"]


def test_long_file_comes_in_pieces_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("fastsae.data.text._PIECE", 10)
    lines = "".join(f"line {i}\n" for i in range(20))
    (tmp_path / "long.txt").write_text(lines)
    pieces = list(read_texts(tmp_path / "long.txt"))
    assert "".join(pieces) == lines
    assert len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces)


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a", "b"], "body": ["c", "d"]}), tmp_path / "x.parquet")
    assert list(read_texts(tmp_path)) == ["a", "b"]
    assert list(read_texts(tmp_path / "x.parquet", column="body")) == ["c", "d"]
    with pytest.raises(BadValue, match="the columns text, body, expected a column 'nope'"):
        list(read_texts(tmp_path / "x.parquet", column="nope"))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadValue, match="not a parquet file"):
        list(read_texts(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "not one JSON object per line"),
        ('{"body": "a"}', "got the fields body in line 1 of .* expected a field 'text'"),
        ('{"text": 3}', "got int in the field 'text' of line 1"),
        ("[1]", "got list in line 1"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(BadValue, match=message):
        list(read_texts(tmp_path / "x.jsonl"))


def test_bad_sources(corpus):
    for missing in ("missing.txt", "/no/such/folder", "./here", "a b"):
        with pytest.raises(BadValue, match=r"^text: got '.*', expected an existing file or folder"):
            read_texts(missing)
    with pytest.raises(BadValue, match="empty list"):
        read_texts([])
    with pytest.raises(BadType, match="text: got int"):
        read_texts(3)
    for name in ("image.png", "latin.txt"):
        with pytest.raises(BadValue, match="not utf-8 text"):
            list(read_texts(corpus / name))


def test_nothing_to_read(tmp_path, monkeypatch):
    (tmp_path / "folder" / ".hidden").mkdir(parents=True)
    (tmp_path / "folder" / ".hidden" / "a.txt").write_text("hidden")
    (tmp_path / "folder" / "image.png").write_bytes(b"\x89PNG\x00")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "blank.jsonl").write_text("\n")
    sources = [tmp_path / name for name in ("folder", "empty.txt", "blank.txt", "blank.jsonl")]
    for source in [*sources, *map(str, sources)]:
        for read in (lambda source: list(read_texts(source)), text_digest):
            with pytest.raises(BadValue) as caught:
                read(source)
            expected = "expected utf-8 text other than white space"
            assert str(caught.value) == f"text: got no documents from '{source}', {expected}"
    with pytest.raises(BadValue, match=r"from '.*folder', '.*', '.*blank.txt' and 1 more, expected"):
        list(read_texts(sources))
    (tmp_path / "line.txt").write_text("one line")
    assert list(read_texts([*sources, tmp_path / "line.txt"])) == ["one line"]
    text_digest([*sources, tmp_path / "line.txt"])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: []))
    with pytest.raises(BadValue, match="text: got no documents from 'a/b', expected"):
        list(read_texts("a/b"))


def test_what_counts_as_a_data_set(corpus):
    for name in ("wikitext", "roneneldan/TinyStories", "a/b:train:text", "a/b:train:text:config"):
        assert is_dataset(name)
    for name in ("python-docs", "notes.txt", "/a/b", "a/b/c", str(corpus)):
        assert not is_dataset(name)


def test_data_set_arguments(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return [{"text": "a", "body": "b"}, {"text": "", "body": "c"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(read_texts("a/b")) == ["a"]
    assert list(read_texts("a/b:test:body:small", split="train")) == ["b", "c"]
    assert list(read_texts("a/b", split="val", column="body", config="big")) == ["b", "c"]
    assert calls == [
        ("a/b", None, "train", True),
        ("a/b", "small", "test", True),
        ("a/b", "big", "val", True),
    ]
    with pytest.raises(BadValue, match="expected a field 'title'"):
        list(read_texts("a/b:train:title"))


def test_data_set_out_of_reach(monkeypatch):
    def load_dataset(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(FastSAEError, match=r"'a/b' is no file.*\(Couldn't reach the Hub\)$"):
        read_texts("a/b")


def test_data_set_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FastSAEError, match=r"pip install fastsae\[datasets\]"):
        read_texts("a/b")


def test_python_docs():
    documents = list(read_texts("python-docs"))
    assert 1_000_000 < sum(map(len, documents)) < 1_700_000  # about 340 k tokens of MiniLM
    assert len(set(documents)) == len(documents)
    assert tuple(documents) == _python_docs.__wrapped__()  # read again: the same, in the same order
    assert any("assert_stmt" in document for document in documents)
    assert inspect.getdoc(textwrap.dedent) in documents


def test_digest_follows_the_content(corpus, tmp_path):
    first = text_digest(corpus)
    assert text_digest([corpus]) == first
    (corpus / "a.txt").write_text("One")
    assert text_digest(corpus) != first
    assert text_digest("a/b") != text_digest("a/c")  # without a network
