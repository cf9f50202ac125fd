"""Corpora: what is read, and a split that depends on the text alone."""

import bz2
import gzip
import json
import lzma
import socket

import pyarrow as pa
import pyarrow.parquet
import pytest

from data.corpora import AustenConfig, FilesConfig, HubConfig
from data.corpora.austen import AustenCorpus, AustenUnit
from data.corpora.files import FilesCorpus
from data.corpora.hub import HubCorpus
from data.documents import Split


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def jsonl(texts, field="text") -> bytes:
    return "".join(json.dumps({field: text, "x": 1}) + "\n" for text in texts).encode()


def write_parquet(path, texts):
    pyarrow.parquet.write_table(pa.table({"text": texts}), path, row_group_size=2)


def test_files_of_every_format_are_read_in_order(tmp_path, no_network, capfd):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a one", None, "a three"]))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(jsonl(["b one"])))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(jsonl(["c one"])))
    write_parquet(tmp_path / "d.parquet", ["d one", "d two", "d three"])
    (tmp_path / "e.txt").write_text("e one\n\nstill e one\n")
    (tmp_path / "f.md.bz2").write_bytes(bz2.compress(b"# f one\nf"))
    (tmp_path / "a_empty.jsonl").write_bytes(b"")
    (tmp_path / "ignored.csv").write_text("no")
    config = FilesConfig(paths=[str(tmp_path / "[a-f][._]*"), str(tmp_path / "a*")])
    assert list(FilesCorpus(config, tmp_path / "cache").entries()) == [
        "a one",
        "",
        "a three",
        "b one",
        "c one",
        "d one",
        "d two",
        "d three",
        "e one\n\nstill e one\n",
        "# f one\nf",
    ]
    assert capfd.readouterr() == ("", "")


def test_a_text_field_by_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "two"], field="content"))
    config = FilesConfig(paths=[str(tmp_path / "a.jsonl")], text_field="content")
    assert list(FilesCorpus(config, tmp_path).entries()) == ["one", "two"]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_laid_out_like_a_hub_data_set(tmp_path, no_network, capfd, streaming):
    folder = tmp_path / "some-data"
    (folder / "data").mkdir(parents=True)
    texts = [f"text {index}" for index in range(10)]
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", texts[:6])
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", texts[6:])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", ["held out elsewhere"])
    config = HubConfig(name=str(folder), streaming=streaming)
    corpus = HubCorpus(config, tmp_path / "cache")
    assert list(corpus.entries()) == texts
    assert (
        list(HubCorpus(HubConfig(name=str(folder), max_documents=3), tmp_path).entries())
        == texts[:3]
    )
    before = corpus.source
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", ["changed"])
    assert HubCorpus(config, tmp_path / "cache").source != before
    assert capfd.readouterr() == ("", "")


def held_out(corpus) -> set[str]:
    """Keys of the source entries on the validation side."""
    return {d.entry for d in corpus.documents() if d.split is Split.validation}


def test_austen_split_is_by_chapter_whatever_the_unit(tmp_path):
    chapters = AustenCorpus(AustenConfig(), tmp_path)
    paragraphs = AustenCorpus(AustenConfig(unit=AustenUnit.paragraphs), tmp_path)
    assert held_out(chapters) == held_out(paragraphs)
    assert 5 < len(held_out(chapters)) < 30
    pieces = list(paragraphs.documents())
    assert (len(list(chapters.documents())), len(pieces)) == (269, 10_009)
    training = {d.entry for d in pieces if d.split is Split.train}
    assert training.isdisjoint(held_out(paragraphs))
    words = " ".join(d.text for d in pieces).split()
    assert words == " ".join(chapters.entries()).split()


def test_split_follows_the_text_not_its_place(tmp_path):
    """Renaming, reordering or adding entries moves none to the other side."""
    texts = [f"text number {index}" for index in range(60)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "z.jsonl").write_bytes(jsonl(["new text", *reversed(texts), texts[0]]))
    sides = []
    for name in ("a.jsonl", "z.jsonl"):
        config = FilesConfig(paths=[str(tmp_path / name)], validation_fraction=0.2)
        corpus = FilesCorpus(config, tmp_path)
        sides.append({d.text: d.split for d in corpus.documents()})
    assert sides[0].items() <= sides[1].items()
    assert 3 < sum(split is Split.validation for split in sides[0].values()) < 25


def test_tokenizers_see_no_validation_text(tmp_path):
    corpus = AustenCorpus(AustenConfig(unit=AustenUnit.paragraphs), tmp_path)
    training = list(corpus.training_texts())
    assert len(training) == 269 - len(held_out(corpus))
    chapters = AustenCorpus(AustenConfig(), tmp_path).documents()
    assert training == [d.text for d in chapters if d.split is Split.train]


def test_reading_is_lazy(tmp_path):
    """A corpus may be larger than memory: the first document comes before the last is read."""
    good = jsonl([f"text {index} " + "word " * 2000 for index in range(2000)])
    (tmp_path / "a.jsonl").write_bytes(good)
    (tmp_path / "b.jsonl").write_bytes(b"not json")
    config = FilesConfig(paths=[str(tmp_path / "*.jsonl")])
    texts = FilesCorpus(config, tmp_path).entries()
    assert next(texts).startswith("text 0 ")
