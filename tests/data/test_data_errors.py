"""A user's mistakes in the data settings: one line each, that names setting, rule and value."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data.corpora import AustenConfig, BigramBackcopyConfig, FilesConfig, HubConfig, open_corpus
from data.documents import Documents
from data.evaluation import ProbeKind, probe_batch
from data.module import TokenDataModule
from data.packing import BosKind, PackingConfig
from data.rows import SpecialIds
from data.store import StoreDtype
from data.tokenizers import BpeConfig, CharactersConfig, FileConfig, HubTokenizerConfig
from kernels.errors import UserError

BPE = BpeConfig(vocab_size=300)


def write(folder: Path, name: str, content: bytes) -> list[str]:
    (folder / name).write_bytes(content)
    return [str(folder / name)]


def rows(*texts, field="text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def files(folder: Path, content: bytes, name: str = "a.jsonl", **settings) -> None:
    open_corpus(FilesConfig(paths=write(folder, name, content), **settings), BPE, folder)


def tokenizer_file(folder: Path, vocab_size: int = 3) -> str:
    vocab = {f"t{index}": index for index in range(vocab_size)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="t0"))
    core.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def packed(folder: Path, tokenizer, **settings) -> None:
    many = rows(*(f"text {index}" for index in range(60)))
    corpus = FilesConfig(paths=write(folder, "a.jsonl", many))
    TokenDataModule(corpus, tokenizer, PackingConfig(**settings), cache_dir=folder).setup()


def module(folder: Path, **settings) -> TokenDataModule:
    return TokenDataModule(AustenConfig(), BPE, PackingConfig(), cache_dir=folder, **settings)


def hub_offline(folder: Path) -> None:
    config = HubTokenizerConfig(name="no/such-model")
    open_corpus(FilesConfig(paths=write(folder, "a.jsonl", rows("a"))), config, folder)


def wide_vocabulary(folder: Path) -> None:
    config = FileConfig(path=tokenizer_file(folder, 70_000), bos=None, eos=None, pad=None)
    many = rows(*(f"text {index}" for index in range(60)))
    corpus = FilesConfig(paths=write(folder, "a.jsonl", many), store_dtype=StoreDtype.uint16)
    open_corpus(corpus, config, folder)


def short_held_out(folder: Path) -> None:
    documents = Documents.end_to_end(np.arange(10), np.array([0, 10]))
    specials = SpecialIds(None, None)
    probe_batch(documents, ProbeKind.text, PackingConfig(), specials, num_tokens=64, num_rows=1)


def probe_without_bos(folder: Path) -> None:
    documents = Documents.end_to_end(np.arange(90), np.array([0, 90]))
    specials = SpecialIds(None, None)
    probe_batch(documents, ProbeKind.bos_text, PackingConfig(), specials, num_tokens=64, num_rows=1)


def tiny_probe(folder: Path) -> None:
    documents = Documents.end_to_end(np.arange(90), np.array([0, 90]))
    probe_batch(
        documents, ProbeKind.text, PackingConfig(), SpecialIds(None, None), num_tokens=2, num_rows=1
    )


SHARED_BOS = {"bos": "t1", "eos": "t1", "pad": "t2"}
TORN = lzma.compress(rows("text " * 1000))[:-20]
MANY = rows(*(f"text {index}" for index in range(60)))

MISTAKES = {
    # Settings that are wrong by themselves.
    "packing.context must be >= 2, got 1": lambda _: PackingConfig(context=1),
    "packing.batch_tokens must be a multiple of packing.context = 256, got 1000": lambda _: (
        PackingConfig(batch_tokens=1000)
    ),
    "packing.micro_batch_rows must be >= 1 or null, got 0": lambda _: PackingConfig(
        micro_batch_rows=0
    ),
    "packing.batch_tokens must be a multiple of context 256 x micro-batch rows 3 x 2 ranks = 1536, "
    "got 4096": lambda _: PackingConfig(micro_batch_rows=3).micro_batches(2),
    "packing.fixed_token must be set together with packing.fixed_position, got None": lambda _: (
        PackingConfig(fixed_position=0)
    ),
    "packing.prefix must be in 0, ..., 255, got 256": lambda _: PackingConfig(prefix=256),
    "packing.loss_from must be in 0, ..., 255, got -1": lambda _: PackingConfig(loss_from=-1),
    "packing.fixed_position must be in the row of 256, got 256": lambda _: PackingConfig(
        fixed_position=256, fixed_token="a"
    ),
    "packing.fixed_position must be in the row of 256 and after the pinned BOS, got 0": lambda _: (
        PackingConfig(fixed_position=0, fixed_token="a", bos=BosKind.pinned)
    ),
    "packing.random_positions must be in the row of 256, got -1": lambda _: PackingConfig(
        random_positions=[-1]
    ),
    "packing.random_positions must be distinct, got [1, 1]": lambda _: PackingConfig(
        random_positions=[1, 1]
    ),
    "packing.random_positions must leave packing.fixed_position out, got [2]": lambda _: (
        PackingConfig(random_positions=[2], fixed_position=2, fixed_token="a")
    ),
    "packing.fixed_token must be one token of the tokenizer, got 'two words'": lambda folder: (
        packed(folder, CharactersConfig(), fixed_position=2, fixed_token="two words")
    ),
    "corpus.near_duplicate_tokens must be >= 0, got -1": lambda _: AustenConfig(
        near_duplicate_tokens=-1
    ),
    "corpus.near_duplicate_tokens must leave documents on the validation side, got 1: ": (
        lambda folder: files(folder, MANY, near_duplicate_tokens=1)
    ),
    "corpus.packages must be installed, got 'no-such-package'": lambda folder: open_corpus(
        FilesConfig(packages=["no-such-package"]), BPE, folder
    ),
    "corpus.packages must be installed versions (torch==2.": lambda folder: open_corpus(
        FilesConfig(packages=["torch==0.1"]), BPE, folder
    ),
    "corpus.unique_tokens must be >= 1 or null, got 0": lambda _: AustenConfig(unique_tokens=0),
    "corpus.unique_tokens must be at most the corpus's ": lambda folder: files(
        folder, MANY, unique_tokens=10**9
    ),
    "corpus.validation_fraction must be above 0 and below 1, got 0.0": lambda _: AustenConfig(
        validation_fraction=0.0
    ),
    "corpus.min_document_tokens must be >= 1, got 0": lambda _: AustenConfig(min_document_tokens=0),
    "corpus.paths must name at least one file (or corpus.packages a package), got []": lambda _: (
        FilesConfig()
    ),
    "corpus.name must name a data set, got ''": lambda _: HubConfig(),
    "corpus.max_documents must be >= 2 or null, got 1": lambda _: HubConfig(
        name="a/b", max_documents=1
    ),
    "corpus.num_triggers must be >= 1, got 0": lambda _: BigramBackcopyConfig(num_triggers=0),
    "corpus.triggers must name at least one token, or be null, got []": lambda _: (
        BigramBackcopyConfig(triggers=[])
    ),
    "corpus.document_tokens must be >= 3, got 2": lambda _: BigramBackcopyConfig(document_tokens=2),
    "corpus.documents must be >= 1, got 0": lambda _: BigramBackcopyConfig(documents=0),
    "corpus.validation_documents must be >= 1, got 0": lambda _: BigramBackcopyConfig(
        validation_documents=0
    ),
    "corpus.seed must be >= 0, got -1": lambda _: BigramBackcopyConfig(seed=-1),
    "tokenizer.vocab_size must be >= 259 (256 bytes and the special tokens), got 258": lambda _: (
        BpeConfig(vocab_size=258)
    ),
    "tokenizer.bos must be a token or null, got ''": lambda _: BpeConfig(bos=""),
    "tokenizer.bos must differ from tokenizer.eos, got '<s>'": lambda _: CharactersConfig(
        bos="<s>", eos="<s>"
    ),
    "tokenizer.pad must differ from tokenizer.bos and tokenizer.eos, got '<s>'": lambda _: (
        FileConfig(path="x", eos="<s>", pad="<s>")
    ),
    "tokenizer.path must name a tokenizer.json, got ''": lambda _: FileConfig(),
    "tokenizer.name must name a model of the hub, got ''": lambda _: HubTokenizerConfig(),
    "data_seed must be >= 0, got -1": lambda folder: module(folder, data_seed=-1),
    "num_workers must be >= 0, got -1": lambda folder: module(folder, num_workers=-1),
    "canonical_rows must be >= 1, got 0": lambda folder: module(folder, canonical_rows=0),
    "own_rows must be >= 1, got 0": lambda folder: module(folder, own_rows=0),
    "evaluation_batch_rows must be >= 1, got 0": lambda folder: module(
        folder, evaluation_batch_rows=0
    ),
    # Files and data sets that can't be read.
    "corpus.paths must match at least one file, got '/no/such/*.txt'": lambda folder: open_corpus(
        FilesConfig(paths=["/no/such/*.txt"]), BPE, folder
    ),
    "corpus.paths must match readable files, got {folder}/a.jsonl: ArrowInvalid: ": lambda folder: (
        files(folder, b'{"text": "torn')
    ),
    "corpus.paths must match readable files, got {folder}/a.jsonl.xz: EOFError": lambda folder: (
        files(folder, TORN, "a.jsonl.xz")
    ),
    "corpus.paths must match readable files, got {folder}/a.parquet: ArrowInvalid": lambda folder: (
        files(folder, b"no parquet", "a.parquet")
    ),
    "corpus.paths must match readable files, got {folder}/a.txt: Unicode": lambda folder: files(
        folder, b"\xff\xfe\x00", "a.txt"
    ),
    "corpus.text_field must be a field of {folder}/a.jsonl (content), got 'text'": lambda folder: (
        files(folder, rows("a", field="content"))
    ),
    "corpus.text_field must hold text in {folder}/a.jsonl, got int in 'text'": lambda folder: files(
        folder, rows(5)
    ),
    "corpus.validation_fraction must leave source entries on both sides of the split, "
    "got 0.05 of 2 entries (2 train, 0 validation)": lambda folder: files(folder, rows("a", "b")),
    "corpus must hold at least two source entries (a row, or a whole text file), to hold one out, "
    "got 0": lambda folder: files(folder, b""),
    "corpus.min_document_tokens must leave documents on the train side, got 999: all ": (
        lambda folder: files(folder, MANY, min_document_tokens=999)
    ),
    "corpus.name must name a data set that can be read, got no/such-data: ": lambda folder: (
        open_corpus(HubConfig(name="no/such-data"), BPE, folder)
    ),
    "cache_dir must be writable and have room (what was done is kept), got /proc/x: ": lambda _: (
        open_corpus(AustenConfig(), BPE, Path("/proc/x"))
    ),
    "tokenizer.path must be an existing file, got '/no/such.json'": lambda folder: packed(
        folder, FileConfig(path="/no/such.json")
    ),
    "tokenizer.path must be a tokenizer.json, got {folder}/a.txt: ": lambda folder: packed(
        folder, FileConfig(path=write(folder, "a.txt", b"no json")[0])
    ),
    "tokenizer.name must be a model of the hub that can be fetched at revision 'main', "
    "got 'no/such-model': ": hub_offline,
    # Settings that don't go together.
    "tokenizer.bos must be in the tokenizer's vocabulary of 3 tokens, or null, got '<bos>'": (
        lambda folder: packed(folder, FileConfig(path=tokenizer_file(folder)))
    ),
    "packing.bos must be none for a tokenizer without BOS (tokenizer.bos is null), got 'pinned'": (
        lambda folder: packed(folder, CharactersConfig(bos=None), bos=BosKind.pinned)
    ),
    "packing.eos must be false for a tokenizer without EOS (tokenizer.eos is null), got True": (
        lambda folder: packed(folder, CharactersConfig(eos=None))
    ),
    "packing.bos must not be pinned if tokenizer.bos and tokenizer.eos are one token, "
    "got 'pinned'": lambda folder: packed(
        folder, FileConfig(path=tokenizer_file(folder), **SHARED_BOS), bos=BosKind.pinned
    ),
    "corpus.store_dtype must hold the tokenizer's vocabulary of 70000 tokens (uint32 does), "
    "got 'uint16'": wide_vocabulary,
    "corpus.store_dtype must hold the tokenizer's vocabulary of 65537 tokens": lambda folder: (
        open_corpus(
            AustenConfig(store_dtype=StoreDtype.uint16), BpeConfig(vocab_size=65_537), folder
        )
    ),
    "probe.num_tokens must be >= 3, got 2": tiny_probe,
    "corpus must hold out a document of at least 64 tokens, got 'at most 10'": short_held_out,
    "tokenizer.bos must be set for a probe with BOS, got None": probe_without_bos,
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistake_is_one_line(message, tmp_path):
    with pytest.raises(UserError) as caught:
        MISTAKES[message](tmp_path)
    got = str(caught.value)
    assert got.startswith(message.replace("{folder}", str(tmp_path)))
    assert "\n" not in got
    assert not list(tmp_path.rglob("*partial*"))
