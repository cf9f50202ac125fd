"""The bench of attention kinds, on a shape that takes no time."""

import json

import pytest
import torch

from kernels.errors import UserError
from models.attention import ATTENTIONS
from scripts.bench_kinds import __doc__ as usage
from scripts.bench_kinds import main, parse_shape, variants


def test_every_kind_is_timed():
    timed = {kind for kind, _, _ in variants().values()}
    assert timed == set(ATTENTIONS) and "--only KIND" in usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2,3"], "--shape must be four positive numbers B,T,H,D, got '1,2,3'"),
        (["--only", "tanh"], "--only must be one of softmax, off_by_one"),
        (["--rounds", "1"], "--rounds must be >= 2, got 1"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert message in str(caught.value)


def test_shapes():
    assert parse_shape("32,2048,12,64") == (32, 2048, 12, 64)


@pytest.mark.slow
# Of PyTorch's own compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_small_run(tmp_path, capsys):
    path = tmp_path / "kinds.json"
    arguments = ["--shape", "1,32,2,8", "--rounds", "2", "--only", "sink_token"]
    main([*arguments, "--only", "softmax alibi", "--json", str(path)])
    (environment, *records) = json.loads(path.read_text())
    assert environment["environment"]["torch"] == torch.__version__
    assert [record["kind"] for record in records] == ["softmax", "sink_token", "softmax alibi"]
    assert records[0]["layer_ratio"] == records[0]["core_ratio"] == 1
    assert all(record["core_ms"] > 0 for record in records)
    assert capsys.readouterr().out.count("layer") == 3
