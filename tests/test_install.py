"""`make install`: its messages, and which wheels of PyTorch it takes.

pip is a stand-in that notes its arguments.
"""

import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


ROOT = Path(__file__).parent.parent
PIP = """#!/bin/sh
if [ "$1" = -c ]; then exec {python} "$@"; fi
echo "$@" >> {log}
case "$*" in *--extra-index-url*) exit {code};; esac
"""


@pytest.fixture
def install(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "tools").mkdir()

    def run(index, *, gpu=False, code=0, system="Linux"):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        (tmp_path / ".venv" / ".installed").unlink(missing_ok=True)
        for name, text in (
            (".venv/bin/python", PIP.format(python=sys.executable, log=log, code=code)),
            ("tools/uname", f"#!/bin/sh\necho {system}\n"),
            ("tools/nvidia-smi", "#!/bin/sh\n" if gpu else None),
        ):
            (tmp_path / name).unlink(missing_ok=True)
            if text is not None:
                (tmp_path / name).write_text(text)
                (tmp_path / name).chmod(0o755)
        env = {
            **os.environ,
            "no_proxy": "127.0.0.1",
            "PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}",
        }
        done = subprocess.run(
            ["make", "install", f"TORCH_CPU={index}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=env,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, log.read_text().splitlines()

    return run


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU is here")
def test_the_wheels_of_torch(install, tmp_path):
    (tmp_path / "index" / "torch").mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here, nowhere = (
        f"http://127.0.0.1:{server.server_port}/{name}" for name in ("index", "nowhere")
    )
    said, (torch, rest) = install(here)
    assert "without CUDA, about 0.2 GB" in said
    assert torch.endswith(f"--extra-index-url {here} torch")
    assert rest.endswith("-e .[text,dev,docs]")
    assert "compiling the CPU kernels" in said
    for index, options, words in (
        (nowhere, {}, "3 to 4 GB with CUDA's libraries"),
        ("", {}, "3 to 4 GB with CUDA's libraries"),
        (here, {"gpu": True}, "for NVIDIA GPUs, 3 to 4 GB"),
        (here, {"system": "Darwin"}, "about 0.2 GB"),
    ):
        said, (torch, _) = install(index, **options)
        assert words in said
        assert torch.endswith("-c constraints.txt torch")
    _, calls = install(here, code=1)  # it answered, and then did not
    assert [call.rpartition("constraints.txt ")[2] for call in calls] == [
        f"--extra-index-url {here} torch",
        "torch",
        "--quiet -e .[text,dev,docs]",
    ]
    server.shutdown()
    server.server_close()
