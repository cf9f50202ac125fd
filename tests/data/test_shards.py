"""Tokenising in shards: the same bytes for any number of processes and interruptions."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import shards
from data.corpora.files import FilesConfig, FilesCorpus
from data.documents import Split
from data.shards import read_shard
from data.store import TokenStore
from data.tokenizers import BpeConfig, build_tokenizer
from kernels.errors import UserError
from tests.data.conftest import make_texts

SHARD = 4000
"""Characters: a dozen documents."""


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> FilesCorpus:
    """600 texts, near-duplicates among them, in some 50 shards."""
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", SHARD)
    texts = make_texts(400)
    texts += [f"again {index}: {text}" for index, text in enumerate(texts[::2])]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return FilesCorpus(FilesConfig(paths=[str(path)], validation_fraction=0.2), tmp_path)


@pytest.fixture
def tokenizer(corpus):
    return build_tokenizer(BpeConfig(vocab_size=300), corpus, corpus.cache_dir)


def content(store: TokenStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.path.iterdir()}


def test_the_number_of_processes_changes_nothing(corpus, tokenizer, tmp_path):
    stores = [corpus.tokenise(tokenizer, tmp_path / str(n), processes=n) for n in (1, 2, 3)]
    one, *others = map(content, stores)
    assert all(other == one for other in others)
    assert stores[0].manifest["splits"]["validation"]["near_duplicates"] > 0
    assert [path.suffix for path in stores[0].path.parent.iterdir() if path.is_dir()] == [""]


class Interrupted(Exception):
    pass


def test_an_interrupted_build_goes_on_where_it_stopped(
    corpus, tokenizer, tmp_path, monkeypatch, capfd
):
    whole = content(corpus.tokenise(tokenizer, tmp_path / "whole"))
    encode, read = tokenizer.encode_batch, corpus.entries
    encoded = []
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda texts: encoded.extend(texts) or encode(texts)
    )
    random.seed(0)
    for _ in range(10):
        stop_at = random.randrange(600)

        def entries(stop_at=stop_at):
            for index, entry in enumerate(read()):
                if index == stop_at:
                    raise Interrupted
                yield entry

        monkeypatch.setattr(corpus, "entries", entries)
        with pytest.raises(Interrupted):
            corpus.tokenise(tokenizer, tmp_path / "parts", processes=1)
        assert not [p for p in (tmp_path / "parts" / "stores").iterdir() if p.suffix == ""]
    monkeypatch.setattr(corpus, "entries", read)
    assert content(corpus.tokenise(tokenizer, tmp_path / "parts", processes=1)) == whole
    assert re.search(r"\d+ of \d\d parts were tokenised before", capfd.readouterr().err)
    # Nothing was tokenised twice, but the batches that were lost with their process.
    assert len(encoded) == 600


def test_shards_of_other_texts_or_damaged_ones_are_made_anew(corpus, tokenizer, tmp_path):
    whole = corpus.tokenise(tokenizer, tmp_path / "whole")
    partial = tmp_path / "parts" / "stores" / f"{whole.path.name}.partial" / "shards"
    partial.mkdir(parents=True)
    (partial / "00000000.npz").write_bytes(b"torn")
    other = FilesCorpus(corpus.config, tmp_path)
    other.entries = lambda: reversed(list(corpus.entries()))
    folder = tmp_path / "other"
    for path in shards.tokenise(
        other.documents(),
        tokenizer,
        folder,
        dtype="<u2",
        min_tokens=1,
        progress=shards.Progress("test", None),
    )[1:]:
        shutil.copy(path, partial)
    assert content(corpus.tokenise(tokenizer, tmp_path / "parts")) == content(whole)


def test_memory_holds_a_few_shards_whatever_the_corpus(corpus, tokenizer, tmp_path):
    """Text that was read and isn't yet tokenised: the queue of two workers, not the corpus."""
    waiting = largest = total = 0

    class Counter:
        def add(self, num_bytes: int) -> None:
            nonlocal waiting
            waiting -= num_bytes

    def documents():
        nonlocal waiting, largest, total
        for document in corpus.documents():
            waiting += len(document.text.encode())
            total += len(document.text.encode())
            largest = max(largest, waiting)
            yield document

    shards.tokenise(
        documents(),
        tokenizer,
        tmp_path / "shards",
        dtype="<u2",
        min_tokens=1,
        progress=Counter(),
        processes=2,
    )
    assert waiting == 0
    assert 3 * SHARD < largest < 10 * SHARD < total / 3


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
)
def test_workers_end_with_their_parent(corpus, tokenizer, tmp_path, number):
    """They hold its lock: a next build must not wait for them. It ends without waiting for them."""
    tokenizer.save(tmp_path / "tokenizer.json")
    process = start_build(corpus, tmp_path)
    children = []
    while len(children) < 2:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    assert process.wait(5) != 0
    process.stdout.close()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_flipped_bit_in_a_shard_is_noticed(corpus, tokenizer, tmp_path):
    (path, *_) = shards.tokenise(
        corpus.documents(),
        tokenizer,
        tmp_path / "shards",
        dtype="<u2",
        min_tokens=1,
        progress=shards.Progress("test", None),
        processes=1,
    )
    job = next(shards._jobs(corpus.documents(), tmp_path / "shards", SHARD))
    assert shards._is_there(job)
    content = path.read_bytes()
    whole = [part.tokens.tolist() for part in read_shard(path).values()]
    random.seed(2)
    noticed = 0
    for bit in random.sample(range(8 * len(content)), 400):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if shards._is_there(job):
            # Dates and the like: whatever is accepted is whole.
            assert [part.tokens.tolist() for part in read_shard(path).values()] == whole
        else:
            noticed += 1
    assert noticed > 300


def test_a_small_corpus_takes_no_process(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 10**9)
    monkeypatch.setattr(shards, "ProcessPoolExecutor", None)
    assert len(corpus.tokenise(tokenizer, tmp_path).train) > 0


def test_a_process_that_dies_is_one_clear_error(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: os.kill(os.getpid(), 9))
    with pytest.raises(UserError, match=r"^tokenising processes must stay alive .* goes on where"):
        corpus.tokenise(tokenizer, tmp_path, processes=2)


SCRIPT = """
import sys, time
from pathlib import Path
from data import shards
from data.corpora.files import FilesConfig, FilesCorpus
from data.tokenizers import FileConfig, FileTokenizer
shards.SHARD_CHARACTERS = 4000
folder = Path(sys.argv[1])
corpus = FilesCorpus(FilesConfig(paths=[sys.argv[2]], validation_fraction=0.2), folder)
tokenizer = FileTokenizer.load(FileConfig(path=sys.argv[3]), corpus, folder)
encode = tokenizer.encode_batch
tokenizer.encode_batch = lambda texts: time.sleep(0.2) or encode(texts)
next(corpus.entries())
print("ready", flush=True)
print(corpus.tokenise(tokenizer, folder, processes=2).path, flush=True)
"""


def start_build(corpus: FilesCorpus, tmp_path: Path) -> subprocess.Popen:
    """A build by two slow workers in a process group of its own, about to tokenise."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "parts")]
    command += [corpus.config.paths[0], str(tmp_path / "tokenizer.json")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_killed_at_ten_random_points_the_store_is_the_same_bytes(corpus, tokenizer, tmp_path):
    whole = content(corpus.tokenise(tokenizer, tmp_path / "whole"))
    tokenizer.save(tmp_path / "tokenizer.json")
    random.seed(1)
    for _ in range(10):
        process = start_build(corpus, tmp_path)
        time.sleep(random.uniform(0.0, 0.6))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    done = list((tmp_path / "parts" / "stores").glob("*.partial/shards/*.npz"))
    assert len(done) > 0
    process = start_build(corpus, tmp_path)
    path = Path(process.stdout.read().strip())
    assert process.wait() == 0
    process.stdout.close()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == whole


def test_a_shard_holds_both_sides(corpus, tokenizer, tmp_path):
    paths = shards.tokenise(
        corpus.documents(),
        tokenizer,
        tmp_path / "shards",
        dtype="<u2",
        min_tokens=40,
        progress=shards.Progress("test", None),
    )
    assert len(paths) > 20
    parts = [read_shard(path) for path in paths]
    for split in Split:
        texts = [d.text for d in corpus.documents() if d.split is split]
        ids = tokenizer.encode_batch(texts)
        kept = [(text, tokens) for text, tokens in zip(texts, ids, strict=True) if len(tokens) > 39]
        tokens = np.concatenate([part[split].tokens for part in parts])
        assert tokens.tolist() == [token for _, tokens in kept for token in tokens]
        bytes_N = np.concatenate([part[split].bytes_N for part in parts])
        assert bytes_N.tolist() == [len(text.encode()) for text, _ in kept]
        assert sum(part[split].dropped for part in parts) == len(texts) - len(kept) > 0
