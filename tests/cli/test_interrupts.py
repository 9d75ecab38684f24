"""Ctrl-C: status 130 without a traceback, whether the program is still imported or a command runs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from spade_faiss.cli.main import cli
from spade_faiss.system import interrupts

# Stops where a module is about to be imported.
PROGRAM = """
import builtins, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = [{program!r}, "info", "nosuch.gallery"]
sys.orig_argv = ["python", *{orig!r}, *sys.argv[1:]]
really = builtins.__import__
def stopping(name, *args, **kwargs):
    if name.endswith({module!r}):
        os.kill(os.getpid(), signal.SIGINT)
    return really(name, *args, **kwargs)
builtins.__import__ = stopping
import spade_faiss.cli.main
"""


@pytest.mark.parametrize("module", ["faiss", "cluster.cluster", "evaluate_command", "serve_command", "messages"])
@pytest.mark.parametrize(
    ("program", "orig"), [("/usr/bin/spade-faiss", ["spade-faiss"]), ("-m", ["-W", "ignore", "-m", "spade_faiss.cli"])]
)
def test_while_it_is_imported(tmp_path: Path, program: str, orig: list[str], module: str) -> None:
    code = PROGRAM.format(program=program, orig=orig, module=module)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")


@pytest.mark.parametrize(("program", "orig"), [("other.py", ["other.py"]), ("-m", ["-m", "other"])])
def test_another_program_keeps_its_own_handler(tmp_path: Path, program: str, orig: list[str]) -> None:
    code = PROGRAM.format(program=program, orig=orig, module="messages")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 130
    assert "KeyboardInterrupt" in run.stderr


def test_a_command_is_interrupted_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        monkeypatch.setattr(sys, "argv", ["spade-faiss.exe"])
        interrupts.end_quietly()
        assert signal.getsignal(signal.SIGINT) is interrupts._end
        interrupts.raise_as_usual()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and shells do in the background
        interrupts.end_quietly()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("words", [("info", "x"), ("push", "x", "s3://b/g"), ("cluster", "info", "x")])
def test_in_a_command(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spade_faiss.gallery.gallery.Gallery.open", stop)
    monkeypatch.setattr("spade_faiss.cluster.cluster.Cluster.open", stop)
    monkeypatch.setattr("spade_faiss.cli.object_commands.push_gallery", stop)
    run = CliRunner().invoke(cli, list(words))
    assert run.exit_code == 130
    assert run.output.strip() == ""
