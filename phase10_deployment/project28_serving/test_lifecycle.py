"""The script: it serves, survives a killed engine, drains when it is told to go, and says why it cannot start."""

import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import openai
import pytest

from common import ROOT, checkpoint

TEXT = "/v1/completions"
LONG_TEXT = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def checkpoint_path(model, tokenizer, tmp_path_factory):
    """The tiny model as a file."""
    path = tmp_path_factory.mktemp("models") / "tiny.pt"
    checkpoint.save(path, {
        "iter": 0, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "train_loss": 0.0,
        "val_loss": 0.0, "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": {}},
        "tokenizer": tokenizer.to_dict(),
    })  # fmt: skip
    return path


@pytest.fixture
def script(checkpoint_path, eventually):
    """Starts serve.py: (its process, its URL, what it has said)."""
    started = []

    def start(*flags, ready=True):
        command = [sys.executable, str(ROOT / "phase10_deployment" / "project28_serving" / "serve.py"), "--port", "0",
                   "--device", "cpu", "--checkpoint", str(checkpoint_path), *flags]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, **pipes, env=environment)
        lines: list[str] = []
        threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()
        started.append(process)
        found = lambda: re.search(r"running on (http://\S+)", "".join(lines))  # noqa: E731
        if ready:
            eventually(lambda: found() or process.poll() is not None, 60)
            eventually(lambda: any(line.startswith("ready") for line in lines), 60)
        return process, found()[1] if ready else None, lines

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_script_serves_survives_a_killed_engine_and_drains(script, eventually):
    process, url, lines = script("--drain_seconds", "30")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    ask = {"model": "tiny", "prompt": "Once", "max_tokens": 20, "temperature": 0}
    before = client.completions.create(**ask).choices[0].text
    os.kill(int(re.search(r"; process (\d+)", "".join(lines))[1]), signal.SIGKILL)  # the engine
    eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
    eventually(lambda: httpx.get(f"{url}/health").status_code == 200, 60)
    assert client.completions.create(**ask).choices[0].text == before
    with httpx.stream("POST", url + TEXT, json=LONG_TEXT | {"stream": True}) as stream:
        read = stream.iter_lines()
        next(read)
        process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{url}/health").json()["status"] == "draining")
        refused = httpx.post(url + TEXT, json={"prompt": "x"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        rest = [line for line in read if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    assert process.wait(20) == 0
    assert any(line.startswith("draining: 1 ") for line in lines)


def test_a_drain_that_takes_too_long_is_ended(script, eventually):
    process, url, _ = script("--drain_seconds", "0.2")
    with httpx.stream("POST", url + TEXT, json=LONG_TEXT | {"stream": True}) as stream:
        read = stream.iter_lines()
        next(read)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in read if line]
    assert "error" in rest[-1] or rest[-1] == "data: [DONE]"  # a quick machine may have finished
    assert process.wait(20) == 0


def test_a_model_that_is_not_there_ends_the_script_with_a_reason(script, tmp_path):
    process, _, lines = script("--checkpoint", str(tmp_path / "none.pt"), ready=False)
    assert process.wait(60) == 2
    assert lines[-1].startswith("error: ") and "none.pt" in lines[-1]


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
