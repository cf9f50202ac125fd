"""The token store: built once, whole or not at all, and refused when damaged."""

import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from data.corpora import FilesConfig, open_corpus
from data.corpora.files import FilesCorpus
from data.documents import Split, TextDocument
from data.store import StoreDtype, open_store, read_store
from data.tokenizers import BpeConfig, FileConfig, build_tokenizer
from kernels.errors import UserError

TOKENIZER = BpeConfig(vocab_size=300)


def make_store(config: FilesConfig, cache_dir: Path):
    return open_corpus(config, TOKENIZER, cache_dir).store


def test_store_holds_the_documents_and_their_figures(files_config, tmp_path):
    corpus = FilesCorpus(files_config, tmp_path)
    tokenizer = build_tokenizer(TOKENIZER, corpus, tmp_path)
    store = make_store(files_config, tmp_path)
    for split, documents in ((Split.train, store.train), (Split.validation, store.validation)):
        texts = [document.text for document in corpus.documents() if document.split is split]
        ids = tokenizer.encode_batch(texts)
        pieces = np.split(documents.tokens, documents.starts_N[1:])
        assert [piece.tolist() for piece in pieces] == ids
        figures = store.manifest["splits"][split.value]
        lengths = [len(piece) for piece in ids]
        assert figures["documents"] == len(texts) and figures["tokens"] == sum(lengths)
        assert figures["text_bytes"] == sum(len(text.encode()) for text in texts)
        assert figures["length_mean"] == pytest.approx(np.mean(lengths))
        assert dict(figures["length_quantiles"])[50] == np.median(lengths)
        assert figures["share_of_64_tokens"] == np.mean([n >= 64 for n in lengths])
        assert 0 < figures["share_of_64_tokens"] < 1
    assert store.train.tokens.dtype == np.uint16
    names = {"train.bin", "train.offsets.npy", "validation.bin", "validation.offsets.npy"}
    assert set(store.manifest["files"]) == names | {"tokenizer.json"}
    assert any("documents dropped" in line for line in store.describe())


def test_second_open_does_not_build(files_config, tmp_path, monkeypatch):
    first = make_store(files_config, tmp_path)

    def build(*_, **__):
        raise AssertionError("built again")

    monkeypatch.setattr("data.store.build_store", build)
    assert make_store(files_config, tmp_path).sha256 == first.sha256
    with pytest.raises(AssertionError, match="built again"):
        open_corpus(files_config, BpeConfig(vocab_size=290), tmp_path)


def test_a_store_is_the_same_bytes_wherever_it_is_built(files_config, tmp_path):
    one = make_store(files_config, tmp_path / "one")
    two = make_store(files_config, tmp_path / "two")
    assert one.sha256 == two.sha256 and one.path.name == two.path.name
    for file in one.path.iterdir():
        assert file.read_bytes() == (two.path / file.name).read_bytes()


def test_changed_content_of_a_file_is_another_store(tmp_path):
    path = tmp_path / "text.jsonl"
    stores = []
    for change in ("", "!"):
        rows = [{"text": f"text number {index}{change}"} for index in range(40)]
        path.write_text("\n".join(map(json.dumps, rows)))
        stores.append(make_store(FilesConfig(paths=[str(path)]), tmp_path).path)
    assert stores[0] != stores[1]


def test_short_documents_are_dropped_and_counted(files_config, tmp_path):
    everything = make_store(files_config, tmp_path)
    files_config.min_document_tokens = 64
    store = make_store(files_config, tmp_path)
    for split, before in (
        (Split.train, everything.train),
        (Split.validation, everything.validation),
    ):
        figures = store.manifest["splits"][split.value]
        assert figures["dropped"] == (before.lengths_N < 64).sum() > 0
        assert figures["documents"] == (before.lengths_N >= 64).sum()
        assert figures["length_quantiles"][0][1] >= 64


def test_uint32_is_taken_where_asked(files_config, tmp_path):
    small = make_store(files_config, tmp_path)
    files_config.store_dtype = StoreDtype.uint32
    store = make_store(files_config, tmp_path)
    assert store.train.tokens.dtype == np.uint32
    assert np.array_equal(store.train.tokens, small.train.tokens)


def damage_flip(path: Path):
    content = bytearray((path / "train.bin").read_bytes())
    content[1000] ^= 1
    (path / "train.bin").write_bytes(content)
    return "train.bin: its SHA-256"


def damage_truncate(path: Path):
    content = (path / "validation.offsets.npy").read_bytes()
    (path / "validation.offsets.npy").write_bytes(content[:-8])
    return "validation.offsets.npy: it has"


def damage_remove(path: Path):
    (path / "tokenizer.json").unlink()
    return "tokenizer.json: it is missing"


def damage_manifest(path: Path):
    content = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(content[: len(content) // 2])
    return "manifest.json: it is not a manifest"


def damage_manifest_value(path: Path):
    content = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(content.replace('"dropped": 0', '"dropped": 1', 1))
    return "manifest.json: its SHA-256"


@pytest.mark.parametrize(
    "damage",
    [damage_flip, damage_truncate, damage_remove, damage_manifest, damage_manifest_value],
)
def test_damage_is_refused_with_the_file_named(files_config, tmp_path, damage):
    path = make_store(files_config, tmp_path).path
    reason = damage(path)
    with pytest.raises(UserError, match=f"^token store must be intact, got .*{reason}"):
        make_store(files_config, tmp_path)


def test_another_format_version_is_refused(files_config, tmp_path):
    path = make_store(files_config, tmp_path).path
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(UserError, match=r"^token store must have format version 2, got 99 "):
        read_store(path)


def _open_and_report(tokenizer_path, cache_dir, start, results):
    tokenizer = build_tokenizer(FileConfig(path=str(tokenizer_path)), None, cache_dir)
    built = []

    def documents():
        built.append(True)
        for index in range(20):
            # Slow enough that both processes want to build before either has.
            time.sleep(0.02)
            split = Split.validation if index % 4 == 0 else Split.train
            yield TextDocument(split, f"text {index}")

    start.wait()
    store = open_store(
        documents(),
        tokenizer,
        cache_dir=cache_dir,
        key={},
        dtype=StoreDtype.auto,
        min_document_tokens=1,
    )
    results.put((store.sha256, len(built)))


def test_two_processes_build_once(files_config, tmp_path):
    path = make_store(files_config, tmp_path).path / "tokenizer.json"
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_open_and_report, args=(path, tmp_path / "both", start, results))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    reports = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert reports[0][0] == reports[1][0]
    assert sum(built for _, built in reports) == 1
