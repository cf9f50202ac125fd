"""Corpora: what is read, and a split that depends on the text alone."""

import bz2
import gzip
import json
import lzma
import socket

import pyarrow as pa
import pyarrow.parquet
import pytest

from data.corpora import AustenConfig, FilesConfig, HubConfig, open_corpus
from data.corpora.austen import AustenCorpus, AustenUnit
from data.corpora.files import FilesCorpus
from data.corpora.hub import HubCorpus
from data.corpora.reading import text_bytes
from data.cutting import Cut, Entry, documents_of
from data.documents import Split
from data.tokenizers import BpeConfig


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def jsonl(texts, field="text") -> bytes:
    return "".join(json.dumps({field: text, "x": 1}) + "\n" for text in texts).encode()


def texts_of(corpus) -> list[str]:
    return [entry.text for entry in corpus.entries()]


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
    assert texts_of(FilesCorpus(config, tmp_path / "cache")) == [
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
    assert texts_of(FilesCorpus(config, tmp_path)) == ["one", "two"]


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
    assert texts_of(corpus) == texts
    assert texts_of(HubCorpus(HubConfig(name=str(folder), max_documents=3), tmp_path)) == texts[:3]
    before = corpus.source
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", ["changed"])
    assert HubCorpus(config, tmp_path / "cache").source != before
    assert capfd.readouterr() == ("", "")


def words(corpus, split: Split) -> list[str]:
    return " ".join(d.text for d in corpus.documents() if d.split is split).split()


def test_austen_split_is_by_chapter_whatever_the_unit(tmp_path):
    chapters = AustenCorpus(AustenConfig(), tmp_path)
    paragraphs = AustenCorpus(AustenConfig(unit=AustenUnit.paragraphs), tmp_path)
    counts = [len(list(corpus.documents())) for corpus in (chapters, paragraphs)]
    assert counts == [269, 10_009]
    for split in Split:
        assert words(chapters, split) == words(paragraphs, split)
    assert 5 < sum(d.split is Split.validation for d in chapters.documents()) < 30


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
    chapters = list(AustenCorpus(AustenConfig(), tmp_path).documents())
    assert training == [d.text for d in chapters if d.split is Split.train]
    assert 0 < len(training) < 269


def test_reading_is_lazy(tmp_path):
    """A corpus may be larger than memory: the first document comes before the last is read."""
    good = jsonl([f"text {index} " + "word " * 2000 for index in range(2000)])
    (tmp_path / "a.jsonl").write_bytes(good)
    (tmp_path / "b.jsonl").write_bytes(b"not json")
    config = FilesConfig(paths=[str(tmp_path / "*.jsonl")])
    texts = FilesCorpus(config, tmp_path).entries()
    assert next(texts).text.startswith("text 0 ")


CODE = """import os


def first():
    a = 1

    return a
\t

    # Kept where it is.
class Second:
    pass



"""


def test_entries_are_cut_by_their_rule():
    assert list(documents_of(Entry(CODE))) == [CODE]
    assert list(documents_of(Entry(CODE, Cut.two_blank_lines))) == [
        "import os",
        "def first():\n    a = 1\n\n    return a",
        "    # Kept where it is.\nclass Second:\n    pass",
    ]
    assert list(documents_of(Entry(CODE, Cut.blank_line))) == [
        "import os",
        "def first():\n    a = 1",
        "return a",
        "# Kept where it is.\nclass Second:\n    pass",
    ]
    for cut in (Cut.blank_line, Cut.two_blank_lines):
        assert list(documents_of(Entry(" \n\n\n \n", cut))) == []


def test_files_are_cut_where_asked(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\nthree")
    cuts = {"whole": 1, "two_blank_lines": 2, "blank_line": 3}
    for cut, count in cuts.items():
        config = FilesConfig(paths=[str(tmp_path / "a.txt")], cut=Cut(cut))
        entries = list(FilesCorpus(config, tmp_path).entries())
        assert sum(len(list(documents_of(entry))) for entry in entries) == count


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package as pip leaves it: two sources, one of them not UTF-8, and other files."""
    site = tmp_path / "site"
    (site / "small").mkdir(parents=True)
    (site / "small" / "b.py").write_text(CODE)
    (site / "small" / "a.py").write_bytes(b"# \xff")
    (site / "small" / "c.txt").write_text("no source")
    info = site / "small-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: small\nVersion: 1.5\n")
    names = ["small/b.py", "small/a.py", "small/c.txt", "small/gone.py"]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    monkeypatch.syspath_prepend(site)
    return site / "small"


def test_sources_of_installed_packages_are_entries_cut_at_two_blank_lines(installed, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n\ntwo")
    config = FilesConfig(paths=[str(tmp_path / "a.txt")], packages=["small"])
    corpus = FilesCorpus(config, tmp_path)
    entries = list(corpus.entries())
    # What was removed since counts as empty.
    assert [(entry.text, entry.cut) for entry in entries] == [
        ("one\n\n\ntwo", Cut.whole),
        (CODE, Cut.two_blank_lines),
        ("", Cut.two_blank_lines),
    ]
    assert corpus.source["packages"][0][:2] == ["small", "1.5"]
    assert corpus.num_bytes() == len("one\n\n\ntwo") + len(CODE) + 3
    before = corpus.source
    (installed / "b.py").write_text(CODE + "\n")
    assert FilesCorpus(config, tmp_path).source != before


def test_two_packages_make_a_corpus(tmp_path):
    config = FilesConfig(packages=["packaging", "tqdm"], validation_fraction=0.1)
    store = open_corpus(config, BpeConfig(vocab_size=300), tmp_path).store
    packages = store.manifest["corpus"]["texts"]["source"]["packages"]
    assert [name for name, _, _ in packages] == ["packaging", "tqdm"]
    assert store.manifest["splits"]["train"]["documents"] > 100


def test_sizes_are_known_well_enough_for_a_progress_bar(tmp_path):
    text = "".join(f"{index} some text to pack\n" for index in range(400_000))
    plain = text.encode()
    for name, content in {
        "a.txt": plain,
        "a.txt.xz": lzma.compress(plain, preset=0),
        "a.txt.gz": gzip.compress(plain, 1),
        "a.txt.bz2": bz2.compress(plain, 1),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert text_bytes([tmp_path / name]) == pytest.approx(len(plain), rel=0.25)
    write_parquet(tmp_path / "a.parquet", [text])
    assert text_bytes([tmp_path / "a.parquet"]) == pytest.approx(len(plain), rel=0.1)
    (tmp_path / "torn.xz").write_bytes(b"torn")
    assert text_bytes([tmp_path / "torn.xz"]) is None
    assert text_bytes([tmp_path / "a.txt", tmp_path / "a.txt.zst"]) is None
