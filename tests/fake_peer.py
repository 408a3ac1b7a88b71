"""A quantization tool that does as it is told: works, hangs, crashes, prints garbage, eats memory, writes nothing, NaN.

As a script: the process of its adapter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from quern.peers.base import PEERS, Peer, Variant

NAME = "fake"
BEHAVIOURS = (
    "good",
    "calibrated",
    "hang",
    "crash",
    "garbage",
    "memory",
    "nothing",
    "raise",
    "unloadable",
    "nan",
    "dies",
    "endless",
    "talkative",
)


class FakePeer(Peer):
    tool = "Fake Tool"
    package = "fake-tool"
    also = ("fake-kernels",)
    modules = ("fake_tool",)
    versions = ">=1,<2"
    requirements = ()
    licence = "MIT"
    homepage = "https://example.org"
    runtime = "transformers"
    targets = ("transformers",)
    variants = tuple(
        Variant(
            name=name, bits=16, settings={"behaviour": name}, calibrated=name == "calibrated", default=name == "good"
        )
        for name in BEHAVIOURS
    )

    def quantize(self, job):
        behaviour = job.variant.settings["behaviour"]
        print("a tool prints to stdout")
        (Path.cwd() / "litter").write_text("x")
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        (job.output.parent / f"{behaviour}.pid").write_text(f"{os.getpid()} {child.pid}")
        if behaviour == "hang":
            time.sleep(600)
        if behaviour == "crash":
            print("the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 11)
        if behaviour == "garbage":
            os.write(int(os.environ["FAKE_ANSWERS"]), b"\x00\xff not an answer\n")
            time.sleep(600)
        if behaviour == "endless":
            while True:
                say_alive()
                time.sleep(0.05)
        if behaviour in ("memory", "talkative"):
            hoard = []
            while True:
                if behaviour == "talkative":
                    say_alive()
                hoard.append(bytearray(os.urandom(1 << 20)) * 64)
                time.sleep(0.02)
        if behaviour == "raise":
            raise ValueError("groups of 64 do not divide 96")
        child.kill()
        if behaviour == "nothing":
            return []
        assert job.sequences.ndim == 2
        assert job.text.read_text()
        for path in job.model.iterdir():
            shutil.copy(path, job.output / path.name)
        (job.output / "behaviour").write_text(behaviour)
        return [f"calibrated on {job.sequences.size} tokens"] if job.variant.calibrated else []

    def load(self, folder, threads):
        from transformers import AutoModelForCausalLM

        from quern.peers.transformers_model import TransformersModel

        behaviour = (folder / "behaviour").read_text()
        if behaviour == "unloadable":
            raise RuntimeError("no kernel for this processor")
        model = TransformersModel(AutoModelForCausalLM.from_pretrained(folder))
        if behaviour == "nan":
            next(model.model.parameters()).data[3] = float("nan")
        if behaviour == "dies":
            model.start = lambda: os.kill(os.getpid(), 9)
        return model


def say_alive():
    os.write(int(os.environ["FAKE_ANSWERS"]), b'{"advance": 1}\n')


if __name__ == "__main__":
    from quern.peers import worker

    sys.path.insert(0, os.getcwd())  # where a test may put fake_tool
    os.environ["FAKE_ANSWERS"] = str(os.dup(1))
    PEERS.add(NAME)(FakePeer)
    worker.main(NAME)
