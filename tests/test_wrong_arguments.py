"""Wrong arguments of every command: one line that says what is wrong, exit code 2, and nothing is begun."""

from __future__ import annotations

import argparse
import logging
import shlex
from pathlib import Path

import pytest

from llcompile.commands import cli, hub, spec
from llcompile.errors import ExampleError, SpecError

DATA = "--data text.txt --batch 2 --length 8 --held-length 8"

FACTORIES = """
import torch
thing = 3
def fine(): return torch.nn.Linear(3, 3), torch.zeros(2, 3)
def lone(): return (torch.nn.Linear(3, 3),)
def no_model(): return 3, torch.zeros(2)
def listed(): return [torch.nn.Linear(3, 3), torch.zeros(2, 3)]
def leaves(): raise SystemExit(5)
def other_width(): return torch.nn.Linear(3, 3), torch.zeros(2, 4)
"""

# What is typed, and what the answer must contain.
TABLE = (
    # SPEC
    ("inspect ''", "expected a config.json, a model_type"),
    ("inspect :", "or module:factory"),
    ("inspect makers:", "or module:factory"),
    ("inspect :fine", "or module:factory"),
    ("inspect makers.py", "name a function in it, makers:FUNCTION"),
    ("inspect makers.py:fine", "as in an import statement, makers:fine"),
    ("inspect makers:fin", "did you mean 'fine'?"),
    ("inspect makerss:fine", "cannot import 'makerss'"),
    ("inspect leaves:anything", "cannot import 'leaves': SystemExit: 3"),
    ("inspect makers:lone", "returned a tuple of 1; expected a tuple (model, *example_inputs)"),
    ("inspect makers:listed", "returned list; expected a tuple"),
    ("inspect makers:no_model", "returned (int, ...); expected (model, *example_inputs) with an nn.Module"),
    ("inspect makers:leaves", "raised SystemExit: 5"),
    ("inspect makers:other_width", "does not run on the example inputs (torch.float32 [2, 4])"),
    ("inspect /no/such/folder", "'/no/such/folder' is not a file"),
    ("inspect text.txt", "is a file, but no config"),
    ("inspect empty", "empty/config.json does not exist"),
    ("inspect untyped", "it has no model_type"),
    ("inspect listed.json", "it has no model_type"),
    ("inspect wrong_value", "expected int, got str"),
    ("inspect binary.json", "is not a transformers config"),
    ("inspect Mamba-2", "did you mean 'mamba2'?"),
    ("inspect mamba2 more", "unrecognized arguments: more"),
    # --set, --length, --device
    ("inspect makers:fine --set a=1", "has no config"),
    ("inspect makers:fine --length 12", "--length has no effect"),
    ("inspect makers:fine --device cpu", "--device has no effect"),
    ("inspect mamba2 --set hidden_size", "expected KEY=VALUE with a KEY of Mamba2Config"),
    ("inspect mamba2 --set =3", "expected KEY=VALUE"),
    ("inspect mamba2 --set hiden_size=3", "did you mean 'hidden_size'?"),
    ("inspect mamba2 --set to_dict=3", "has no such KEY"),
    ("inspect mamba2 --set model_type=llama", "has no such KEY"),
    ("inspect mamba2 --set hidden_size=abc", "expected int, got str"),
    ("inspect mamba2 --set hidden_size=null", "expected int, got NoneType"),
    ("inspect mamba2 --set num_hidden_layers=1.5", "expected int, got float"),
    ("inspect mamba2 --set hidden_size=-32", "cannot build a Mamba2Config"),
    ("inspect mamba2 --set hidden_act=nonsense", "KeyError: 'nonsense'"),
    ("inspect mamba2 --length 0", "--length: expected an integer of at least 1, got '0'"),
    ("inspect mamba2 --length -3", "at least 1, got '-3'"),
    ("inspect mamba2 --length abc", "at least 1, got 'abc'"),
    ("inspect mamba2 --length 1.5", "at least 1, got '1.5'"),
    ("inspect mamba2 --device nonsense", "--device nonsense: torch has no such device here"),
    ("inspect mamba2 --mixer layers.0", "add --mlir"),
    ("inspect mamba2 --chip", "--chip: expected one argument"),
    ("inspect mamba2 --length ²", "at least 1, got '²'"),
    ("inspect mamba2 --length nan", "at least 1, got 'nan'"),
    ("inspect mamba2 --length 99999999999999999999", "from 1 to 9223372036854775807, got '99999999999999999999'"),
    (f"inspect mamba2 --length {'9' * 5000}", f"from 1 to 9223372036854775807, got '{'9' * 40}…'"),
    ("repro mamba2 --mixer x --length 0", "at least 1, got '0'"),
    ("repro makers:fine --mixer x", "named 'x'; known: none"),
    ("repro mamba2", "--mixer"),
    # trial
    ("trial mamba2 --data nowhere.pt", "no such file"),
    ("trial mamba2 --data text.txt --steps 0", "--steps: expected an integer of at least 1"),
    ("trial mamba2 --data text.txt --seeds 1", "--seeds: expected an integer from 2 to 10000"),
    ("trial mamba2 --data text.txt --held-length 0", "--held-length: expected an integer of at least 2"),
    ("trial mamba2 --data text.txt --rate abc", "abc is not one or more positive numbers"),
    ("trial mamba2 --data text.txt --level-rate nan", "--level-rate: expected a number above 0"),
    (f"trial mamba2 {DATA} --kinds liner", "unknown 'liner'"),
    (f"trial mamba2 {DATA} --loss makers:nothing", "--loss makers:nothing"),
    (f"trial mamba2 {DATA} --device nonsense", "device: 'nonsense' cannot be used here"),
    (f"trial mamba2 {DATA} --worth nan", "--worth: expected a number of at least 0, got 'nan'"),
    (f"trial mamba2 {DATA} --worth inf", "--worth: expected a number of at least 0, got 'inf'"),
    (f"trial mamba2 {DATA} --worth -1e-3", "--worth: expected"),
    (f"trial mamba2 {DATA} --level-rate inf", "--level-rate: expected a number above 0"),
    (f"trial mamba2 {DATA} --first-seed -1", "--first-seed: expected an integer from 0 to 4294957295, got '-1'"),
    (f"trial mamba2 {DATA} --seeds 10001", "--seeds: expected an integer from 2 to 10000, got '10001'"),
    (f"trial mamba2 {DATA} --workers 1.5", "--workers: expected an integer from 1 to 1024, got '1.5'"),
    (f"trial mamba2 {DATA} --checkpoint nowhere.pt", "--checkpoint nowhere.pt: no such file"),
    (f"trial mamba2 {DATA} --set hiden_size=1", "did you mean 'hidden_size'?"),
    # kernels, doctor, demo, bench
    ("kernels show --dtype int8", "invalid choice: 'int8'"),
    ("kernels show --levels 0", "from 1 to 64, got '0'"),
    ("kernels show --levels 65", "--levels: expected an integer from 1 to 64, got '65'"),
    ("kernels show --target cuda --key-dim 4096", "--key-dim 4096: there are no Triton kernels for it"),
    ("kernels show --repeat -1", "at least 1, got '-1'"),
    ("kernels cost --budgets --calls", "not allowed with argument --budgets"),
    ("kernels cost --budgets --family scalar/none", "--family has no effect with --budgets"),
    ("kernels cost --calls --json x.json", "--json has no effect with --calls"),
    ("kernels cost --json missing/x.json", "cannot be written (no folder missing)"),
    ("kernels cost --family scalar/delta --key-dim 300", "K = 300 does not fit on the chip"),
    ("kernels cost --levels 65", "from 1 to 64, got '65'"),
    ("kernels cost --length 1e6", "at least 1, got '1e6'"),
    ("kernels cost --heads ²", "at least 1, got '²'"),
    ("kernels show --key-dim abc", "at least 1, got 'abc'"),
    ("kernels show --chip sm_1", "unknown chip"),
    ("kernels matrix sm_1", "sm_1"),
    ("doctor --inner nonsense", "invalid choice: 'nonsense'"),
    ("doctor --device nonsense", "torch has no such device here"),
    ("demo --seeds abc", "at least 1, got 'abc'"),
    ("bench operator --device nonsense", "expected cpu or cuda"),
    ("bench decode --device nonsense", "torch has no such device here"),
    ("demo --seed -1", "--seed: expected an integer from 0 to 4294967295, got '-1'"),
    ("bench rewrite --lengths 0", "at least 1, got '0'"),
    ("bench rewrite --limit nan", "--limit: expected a number above 0, got 'nan'"),
    ("bench operator --minutes nan", "--minutes: expected a number above 0, got 'nan'"),
    ("bench operator --repeats 0", "--repeats: expected an integer of at least 1, got '0'"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "makers.py": FACTORIES,
        "leaves.py": "raise SystemExit(3)",
        "text.txt": "a text " * 100,
        "untyped/config.json": '{"hidden_size": 3}',
        "listed.json": "[1]",
        "wrong_value/config.json": '{"model_type": "mamba2", "hidden_size": "x"}',
        "empty/other": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("typed", "words"), TABLE, ids=[typed for typed, _ in TABLE])
def test_one_line_that_says_what_to_do(
    typed: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(logging, "raiseExceptions", False)  # a library's handler may hold another test's stderr
    before = {path.name for path in folder.iterdir()} | {"__pycache__", "trial-output"}
    assert cli.main(shlex.split(typed)) == cli.USAGE_ERROR
    said = capsys.readouterr()
    *progress, line = said.err.splitlines()
    assert words in line
    assert len(progress) <= typed.startswith("trial")  # a trial tells how much it would train before it builds a model
    assert not said.out
    assert {path.name for path in folder.iterdir()} <= before


def test_a_model_of_transformers_that_does_not_run_says_what_to_change() -> None:
    for name, words in (("mamba2", "change --set or --length"), ("makers:fine", "^not these$")):
        with pytest.raises(ExampleError, match=words), spec.explained(argparse.Namespace(spec=name)):
            raise ExampleError("not these")


class TestHub:
    """Names of models on the Hub."""

    @pytest.mark.parametrize(
        ("name", "known"),
        [("org/name", True), ("state-spaces/mamba2-130m", True), ("mamba2", False), ("a/b/c", False), ("/a/b", False),
         ("../b", False), ("empty/nothing", False)],
    )  # fmt: skip
    def test_what_is_a_name(self, name: str, known: bool, folder: Path) -> None:
        assert hub.is_id(name) == known

    def test_without_network(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("transformers")

        def unknown(*_: object) -> None:
            raise OSError(-2, "Name or service not known")

        monkeypatch.setattr(hub.socket, "getaddrinfo", unknown)
        monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
        for name in hub._OFFLINE:
            monkeypatch.delenv(name, raising=False)
        assert cli.main(["inspect", "org/name"]) == cli.USAGE_ERROR
        assert "org/name is not in the cache of the Hub, and there is no network" in capsys.readouterr().err
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert cli.main(["repro", "org/name", "--mixer", "x"]) == cli.USAGE_ERROR
        assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err

    def test_with_network(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        transformers = pytest.importorskip("transformers")
        asked = []

        def answer(name: str, **settings: object) -> object:
            asked.append((name, settings))
            if name == "org/nothing":
                raise OSError("org/nothing is not a valid model identifier\nmore lines")
            return transformers.LlamaConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=8
            )

        monkeypatch.setattr(hub, "_unreachable", str)
        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", answer)
        model, (tokens,) = spec.load("org/name", ["num_hidden_layers=2"], 5, "meta")
        assert len(model.model.layers) == 2
        assert tokens.shape == (1, 5)
        assert asked == [("org/name", {"trust_remote_code": False, "local_files_only": False})]
        with pytest.raises(SpecError, match=r"identifier$"):
            spec.load("org/nothing", [], 5, "meta")
